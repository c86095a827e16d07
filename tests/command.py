"""`tandemkv` with arguments, in this process, to spare the imports."""

import json
import sys
from typing import Any, NamedTuple

import pytest

from tandemkv import cli


class Done(NamedTuple):
    """How it ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What `--json` ends with."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


def run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: object) -> Done:
    """As the shell would."""
    monkeypatch.setattr(sys, "argv", ["tandemkv", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return Done(int(stop.value.code or 0), out, err)
