"""Training that is killed with SIGKILL and resumed ends with the weights of the run that was not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 5  # `python tests/killed.py FOLDER 50 1` makes more


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    script = str(Path(__file__).with_name("killed.py"))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), str(KILLS), "0"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(kill["doing"] != "over" for kill in kills) == KILLS
    assert all(kill["same"] for kill in kills), kills
