"""The gallery in examples/ runs."""

import os
import subprocess
import sys

import pytest
from documents import ROOT
from pictures import write_folder


@pytest.mark.slow
def test_own_photos_to_explorer(tmp_path):
    photos = write_folder(tmp_path / "photos", 40)
    script = ROOT / "examples" / "own_photos_to_explorer" / "run.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*options):
        command = [sys.executable, str(script), *options]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run(str(photos), "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "open runs/photos/explorer.html"
    assert (tmp_path / "runs" / "photos" / "explorer.html").stat().st_size > 1e5
    again = run(str(photos), "--max-steps", "3")
    assert again.returncode == 2
    assert "runs/photos exists" in again.stderr.splitlines()[-1]
