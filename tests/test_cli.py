"""The command line: its entry point in a process of its own, its errors, its help."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tandemkv
from tandemkv import cli, machine
from tandemkv.errors import CapacityError


def run(*args: str, before: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """`tandemkv args` in a new process that has run `before` first, without spin settings or forced colours of ours."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "FORCE_COLOR")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    code = f"import sys; {before}\nfrom tandemkv.cli import main\nsys.argv = {['tandemkv', *args]!r}\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def failing_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command `fail` that raises one of our errors."""
    commands = list(cli.app.registered_commands)

    @cli.app.command()
    def fail() -> None:
        raise CapacityError("needed 9 [bold] bytes, available 1: lower near_tokens " + "and read on " * 20)

    monkeypatch.setattr(sys, "argv", ["tandemkv", "fail"])
    monkeypatch.setattr(machine, "set_passive_spin", lambda: True)
    yield
    cli.app.registered_commands[:] = commands


def test_doctor_json_is_the_last_line_and_torchs_threads_wait_passively() -> None:
    done = run("doctor", "--json", OMP_DISPLAY_ENV="verbose")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["threads"]["spin"] == {"passive": True, "setting": "GOMP_SPINCOUNT=0"}
    assert not any("spin" in warning for warning in report["warnings"])
    assert "GOMP_SPINCOUNT = '0'" in done.stderr, "libgomp did not read it: torch was imported too early"


def test_doctor_without_the_native_module_says_why() -> None:
    done = run("doctor", before="sys.modules['tandemkv._native'] = None", GOMP_SPINCOUNT="5", COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert "native cpu    not used: the native module is not there" in done.stdout
    assert "warning: the native module is not there" in done.stdout
    assert "not measured    the native module is not there" in done.stdout
    assert "(GOMP_SPINCOUNT=5): set GOMP_SPINCOUNT=0" in done.stdout


def test_doctor_without_torch_is_one_clear_line() -> None:
    done = run("doctor", before="sys.modules['torch'] = None")
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch cannot be imported")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("failing_command")
def test_an_error_of_ours_is_one_red_line_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("\x1b[31merror: needed 9 [bold] bytes, available 1")
    assert err.count("\n") == 1


def test_the_installed_script_prints_the_version() -> None:
    script = Path(sys.executable).with_name("tandemkv")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == tandemkv.__version__


def test_a_full_device_is_one_line() -> None:
    command = [str(Path(sys.executable).parent / "tandemkv"), "--version"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("args", [["doctor", "--frob"], ["--frob"], ["frob"]])
def test_an_unknown_option_or_command_is_refused_by_name(args: list[str]) -> None:
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 2
    assert "frob" in result.stderr


def test_help_teaches_every_command_with_an_example() -> None:
    assert "tandemkv doctor" in CliRunner().invoke(cli.app, ["--help"]).stdout
    for command in cli.app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        result = CliRunner().invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0
        assert f"Example: tandemkv {name}" in result.stdout


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, tandemkv.cli; print({'torch', 'transformers', 'tandemkv._native'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
