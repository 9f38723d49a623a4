"""The gallery in examples/ runs."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from documents import ROOT
from pictures import write_folder


def run_example(name, folder, *options):
    """Run a script of the gallery in a folder; return the lines that it prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_fused_loss(tmp_path):
    lines = run_example("fused_loss.py", tmp_path, "--epochs", "3")
    nats = [float(line.split()[2]) for line in lines]
    assert nats == sorted(nats, reverse=True)
    assert nats[2] < 30


@pytest.mark.slow
def test_own_network(tmp_path):
    lines = run_example("own_network.py", tmp_path, "--n", "60", "--max-steps", "2")
    assert lines[-1].endswith("parameters; see runs/gelu/traversals.gif")
    assert (tmp_path / "runs" / "gelu" / "traversals.gif").is_file()


@pytest.mark.slow
def test_fit_notebook(monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    path = ROOT / "examples" / "fit.ipynb"
    assert path.stat().st_size < 400_000
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("n=1500", "n=60").replace("STEPS = 1200", "STEPS = 12")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2


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


# The network and the sizes of the test.
SMALL = {
    "bvae.sweep": "--arch pytorch-vae --hidden-dims 4 8 --max-steps 3 --batch-size 8 --seeds 1 --points 40",
    "bvae.compare": "--points 40",
    "bvae.explore": "",
}


@pytest.mark.slow
def test_beta_on_rooms(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    page = (ROOT / "examples" / "beta_on_rooms" / "README.md").read_text()
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for line in commands.splitlines():
        _, _, module, *options = shlex.split(line)
        command = [sys.executable, "-m", module, *options, *SMALL[module].split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "sweep-rooms"
    rows = (out / "sweep.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| 1", "1"], ["| 4", "1"], ["| 16", "1"]]
    made = (
        out / "sweep.png",
        out / "beta-1-seed-0" / "explorer-beta-16-seed-0.html",
        tmp_path / "compare.png",
    )
    assert [path for path in made if not path.is_file()] == []
