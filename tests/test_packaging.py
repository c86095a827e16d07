"""The package as installed: what importing it loads, the names it offers, what it asks pip for."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tandemkv

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules_loaded_by(module: str, after: str = "sys") -> set[str]:
    """Modules that `import module` loads in a new process in which `after` was imported before."""
    code = f"import sys, {after}; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_import_of_the_package_loads_nothing_heavy() -> None:
    loaded = modules_loaded_by("tandemkv")
    assert "tandemkv" in loaded
    heavy = {"torch", "numpy", "transformers", "triton", "typer", "rich"}
    assert not {name for name in loaded if name.split(".")[0] in heavy}
    assert not {name for name in loaded if name.startswith("tandemkv.")}


# What a module must not load; `triton` and `transformers` beside what torch itself brings.
LIGHT = {
    "tandemkv.errors": ("torch", "typer", "transformers", "triton", "tandemkv._native"),
    "tandemkv.machine": ("torch", "typer", "transformers", "triton", "tandemkv._native"),
    "tandemkv.cli": ("torch", "transformers", "triton", "tandemkv._native"),
    "tandemkv.types": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels": ("transformers", "triton", "tandemkv._native", "tandemkv.kernels."),
    "tandemkv.kernels.devices": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels.torch_ops": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels.checks": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels.reference": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels.blocks": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels.sample": ("transformers", "triton", "tandemkv._native"),
    "tandemkv.kernels.cpu": ("transformers", "triton"),
    "tandemkv.kernels.probes": ("transformers", "triton"),
    "tandemkv.schedule": ("torch", "transformers", "triton", "tandemkv._native"),
    "tandemkv.systems": ("torch", "numpy", "transformers", "triton", "tandemkv._native"),
}


@pytest.mark.parametrize("module", LIGHT)
def test_a_module_loads_only_what_it_needs(module: str) -> None:
    needs_torch = "torch" not in LIGHT[module]
    loaded = modules_loaded_by(module, after="torch" if needs_torch else "sys")
    assert module in loaded
    for name in LIGHT[module]:
        found = {other for other in loaded if other.startswith(name if name.endswith(".") else (name, f"{name}."))}
        assert not found, f"import {module} loads {sorted(found)}"


def test_every_backend_is_listed_above() -> None:
    backends = {f"tandemkv.kernels.{path.stem}" for path in (ROOT / "src/tandemkv/kernels").glob("[!_]*.py")}
    assert backends <= set(LIGHT)


def test_importing_the_kernels_starts_no_cuda() -> None:
    code = "import tandemkv.kernels.cpu, tandemkv.kernels.torch_ops, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


@pytest.mark.parametrize("name", tandemkv.__all__)
def test_exported_names_resolve(name: str) -> None:
    assert getattr(tandemkv, name).__name__ == name


def test_exported_names_are_sorted_and_unique() -> None:
    assert tandemkv.__all__ == sorted(set(tandemkv.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tandemkv.no_such_name


def test_version_agrees_with_the_installed_metadata() -> None:
    assert metadata.version("tandemkv") == tandemkv.__version__


def test_the_wheel_asks_only_for_lower_bounds() -> None:
    requirements = [Requirement(text) for text in metadata.requires("tandemkv") or []]
    needed = {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert set(needed) == {"torch", "transformers", "typer", "rich"}
    for requirement in needed.values():
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == [">="], f"{requirement}: a pin or a cap in a library breaks its users' environments"
        assert requirement.url is None
    assert metadata.metadata("tandemkv")["Requires-Python"] == ">=3.11"


def test_types_and_the_stub_are_shipped() -> None:
    source = Path(str(tandemkv.__file__)).parent
    assert (source / "py.typed").exists()
    assert (source / "_native.pyi").exists()


def test_the_stub_names_what_the_native_module_has() -> None:
    from tandemkv import _native

    stub = (ROOT / "src/tandemkv/_native.pyi").read_text()
    assert set(re.findall(r"^(?:class|def) (\w+)", stub, re.MULTILINE)) == {n for n in dir(_native) if n[0] != "_"}


def test_constraints_pin_every_requirement_of_the_environment() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}
    assert all([specifier.operator for specifier in pin] == ["=="] for pin in pins.values())
    assert str(pins[canonicalize_name("torch")]) == "==2.13.0", (
        "a looser range takes the newest build with several GB of CUDA libraries"
    )
    project = PYPROJECT["project"]
    asked = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    asked += [Requirement(text) for text in project["optional-dependencies"]["plot"]]
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        if name == "tandemkv":
            continue
        assert name in pins, f"{name} is not pinned in constraints.txt"
        pinned = str(pins[name]).removeprefix("==")
        assert requirement.specifier.contains(pinned), f"the pin {pinned} of {name} is outside {requirement}"


def test_the_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    """Built from the sources, unpacked elsewhere, used with nothing on PATH: native module, attention, version."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("tandemkv-*.whl")
    site, empty = tmp_path / "site", tmp_path / "bin"
    empty.mkdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE_OF_THE_WHEEL],
        env={"PATH": str(empty), "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "tandemkv" / "__init__.py"), tandemkv.__version__, "7.0"]


USE_OF_THE_WHEEL = """
import shutil, sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]  # our editable self
import torch, tandemkv
from tandemkv import kernels
from tandemkv.types import Arena, PagedKV, PageLayout, ScoreRule

assert not any(map(shutil.which, ("c++", "g++", "cc", "gcc", "clang", "cmake", "ninja")))
arena = Arena.allocate(PageLayout(torch.bfloat16, 16, "panels"), 1, 1, 8)
table = torch.zeros((1, 1, 1), dtype=torch.int32)
kernels.append(arena, table, 0, torch.ones(1, 1, 3, 8).bfloat16(), torch.full((1, 1, 3, 8), 7.0).bfloat16())
kv = PagedKV(arena, table, torch.tensor([0]), torch.tensor([3]))
out, _ = kernels.attend(torch.ones(1, 1, 1, 8), kv, rule=ScoreRule(1.0))
print(tandemkv.__file__, tandemkv.__version__, out.mean().item())
"""
