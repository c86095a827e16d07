"""Ten seconds of `make soak`, as a command."""

import json
import subprocess
import sys
from pathlib import Path


def test_ten_seconds_of_soak() -> None:
    command = [sys.executable, "-m", "tests.soak", "--minutes", "0.17", "--seed", "3", "--json"]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["ok"]
    assert report["operations"] > 10
    assert report["tokens"] > 0
    assert report["far_bytes_moved"] > 0
