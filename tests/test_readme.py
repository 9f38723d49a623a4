"""Every command and snippet of the README runs, on small data and for few steps."""

import importlib
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from test_dsprites import archive

from bvae import evaluate, sweep
from bvae.compat.pytorch_vae_weights import export_state
from bvae.model import BetaVAE
from bvae.pipelines import faces, sprites
from bvae.train import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]
PYTHON = ".venv/bin/python -m "
TRAIN = PYTHON + "bvae.train "
SHORT = "--max-steps 2 --no-compile --image-size 32 --hidden-dims 4 8 --latent-dim 3 --batch-size 8"
SHORT_SHAPES = "--max-steps 2 --no-compile --batch-size 8"


def snippet(name: str) -> str:
    """The code block that follows <!-- test: name -->."""
    found = re.search(rf"<!-- test: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no snippet {name}"
    return found[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=120, seed=0, progress=False)


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "NAME"
    assert main(["--data-root", str(data), "--out", str(out), *SHORT.split()]) == 0
    return out


TORCHRUN = ".venv/bin/torchrun "


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(TORCHRUN)])
def test_torchrun(command, data, tmp_path):
    arguments = command.removeprefix(TORCHRUN).replace("DIR", str(data)).replace("node 8", "node 2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [*shlex.split(arguments), *SHORT.split(), "--out", "run"]
    done = subprocess.run([*launcher, *options], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "traversals.gif").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(TRAIN)])
def test_training_command(command, data, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bbvae.yaml").write_text(snippet("bbvae.yaml"))
    arguments = command.removeprefix(TRAIN).replace("DIR", str(data)).replace("runs/NAME", str(run_folder))
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stopped:
            main([arguments])
        assert stopped.value.code == 0
    elif "--resume" in arguments:
        assert main(shlex.split(arguments)) == 0
    else:
        arguments = arguments.replace("FILE", str(tmp_path / "dsprites.npz"))
        archive(tmp_path / "dsprites.npz")
        monkeypatch.setattr(sprites, "COUNT", 50)
        short = SHORT_SHAPES if "sprites" in arguments else SHORT
        assert main([*shlex.split(arguments, comments=True), *short.split(), "--out", "run"]) == 0
        assert (tmp_path / "run" / "traversals.gif").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_target(command, data, tmp_path):
    target = shlex.split(command, comments=True)[1]
    short = {
        "train": f"ARGS=--data-root {data} --out {tmp_path / 'run'} {SHORT}",
        "test": "ARGS=tests/test_model.py",
        "bench": "ARGS=--collect-only",
        "lint": "ARGS=",
    }
    subprocess.run(["make", target, short[target]], cwd=ROOT, check=True)
    assert target != "train" or (tmp_path / "run" / "traversals.gif").is_file()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(PYTHON) and not c.startswith(TRAIN)])
def test_other_command(command, data, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = command.removeprefix(PYTHON).replace("DIR", str(data))
    line = line.replace("runs/NAME", str(run_folder)).replace("runs/OTHER", str(run_folder))
    module, *arguments = shlex.split(line, comments=True)
    few = ["--points", "50", "--factor-bins", "2"]
    tiny = f"--data faces --data-root {data} --channels 3 --arch pytorch-vae {SHORT} --points 50 --seeds 1"
    short = {
        "faces": ["--n", "9"],
        "bvae.evaluate": [*few, "--seeds", "1"],
        "bvae.compare": few,
        "bvae.sweep": ["--points", "50"] if "--baselines" in line else tiny.split(),
    }
    if module == "bvae.sweep":
        monkeypatch.setattr(
            sweep, "in_its_own_process", sweep.train_and_evaluate
        )  # it takes seconds to start
        monkeypatch.setattr(evaluate, "Arguments", partial(evaluate.Arguments, factor_bins=2))
    arguments += short.get(module, []) + short.get(arguments[0], [])
    assert importlib.import_module(module).main(arguments) == 0


def test_every_command_is_run_by_a_test():
    assert len(COMMANDS) > 12
    assert [c for c in COMMANDS if not c.startswith((PYTHON, TORCHRUN, "make "))] == []


def test_model_snippet(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import torch

    torch.save(export_state(BetaVAE(hidden_dims=[4, 8]).state_dict()), "last.ckpt")
    names: dict = {}
    exec(snippet("model").replace("runs/NAME", str(run_folder)), names)
    assert names["faces"].shape == (8, 3, 32, 32)
    assert torch.equal(names["again"], names["model"].reconstruct(names["faces"]))
    assert isinstance(names["old"], BetaVAE)


def test_pictures_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_module_runs_without_an_install(tmp_path):
    """A clone is enough for `python -m bvae.train`, wherever the package's parts are found."""
    shown = subprocess.run(
        [sys.executable, "-m", "bvae.train", "--data", "celeba"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert "--data celeba needs --data-root" in shown.stderr
    assert "Traceback" not in shown.stderr
