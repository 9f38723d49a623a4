"""Every command and snippet of the README and of docs/ runs, on small data and for few steps."""

import importlib
import re
import shlex
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from documents import COMMANDS, PAGES, ROOT, SNIPPETS, snippet
from test_dsprites import archive
from torch import nn

import bvae
from bvae import exporting, hub, infogan
from bvae.compat.pytorch_vae_weights import export_state
from bvae.evaluation import jobs, sweeping
from bvae.evaluation.options import Protocol
from bvae.model import BetaVAE
from bvae.pipelines import faces, sprites
from bvae.train import main

README = ROOT / "README.md"
PYTHON = ".venv/bin/python -m "
TRAIN = PYTHON + "bvae.train "
SHORT = "--max-steps 2 --no-compile --image-size 32 --hidden-dims 4 8 --latent-dim 3 --batch-size 8"
SHORT_SHAPES = "--max-steps 2 --no-compile --batch-size 8"


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
def test_training_command(command, data, few_rooms, run_folder, tmp_path, monkeypatch):
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
        shapes = "sprites" in arguments or "rooms" in arguments
        short = SHORT_SHAPES if shapes else SHORT
        drawn = [] if "--data" in arguments or shapes else ["--data-root", str(data)]
        assert main([*shlex.split(arguments, comments=True), *short.split(), *drawn, "--out", "run"]) == 0
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
        "docs": "ARGS=",
    }
    if target == "oldest":  # would install another Python's torch
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True)
        return
    subprocess.run(["make", target, short[target]], cwd=ROOT, check=True)
    assert target != "train" or (tmp_path / "run" / "traversals.gif").is_file()
    if target == "docs":
        page = (ROOT / "build" / "docs" / "bvae.html").read_text()
        assert [name for name in bvae.__all__ if f'<section id="{name}">' not in page] == []


TINY_INFOGAN = "--max-steps 2 --image-size 32 --width 2 --codes 2 --categories 3 --batch-size 8"


def infogan_folder(data, out):
    assert infogan.main(["--data-root", str(data), "--out", str(out), *TINY_INFOGAN.split()]) == 0
    return out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(PYTHON) and not c.startswith(TRAIN)])
def test_other_command(command, data, few_rooms, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "bvae.export" in command:
        pytest.importorskip("onnxruntime")
    line = command.removeprefix(PYTHON).replace("DIR", str(data))
    if "infogan --resume" in line:
        run_folder = infogan_folder(data, tmp_path / "infogan")
    line = re.sub(r"runs/(NAME|OTHER|faces-\w+-1)", str(run_folder), line)
    module, *arguments = shlex.split(line, comments=True)
    few = ["--points", "50", "--factor-bins", "2"]
    tiny = f"--data faces --data-root {data} --channels 3 --arch pytorch-vae {SHORT} --points 50 --seeds 1"
    short = {
        "faces": ["--n", "9"],
        "bvae.evaluate": [*few, "--seeds", "1"],
        "bvae.compare": few,
        "bvae.infogan": [] if "--resume" in line else [*TINY_INFOGAN.split(), "--data-root", str(data)],
        "bvae.sweep": ["--points", "50"] if "--baselines" in line else tiny.split(),
    }
    if module == "bvae.sweep":
        # A process of its own takes seconds to start.
        monkeypatch.setattr(
            sweeping,
            "run_all",
            lambda left, arguments: [(job, jobs.train_and_evaluate(job, arguments)) for job in left],
        )
        monkeypatch.setattr(jobs, "Protocol", partial(Protocol, factor_bins=2))
    arguments += short.get(module, []) + short.get("".join(arguments[:1]), [])
    assert importlib.import_module(module).main(arguments) == 0


def test_every_command_is_run_by_a_test():
    assert len(COMMANDS) > 12
    assert [c for c in COMMANDS if not c.startswith((PYTHON, TORCHRUN, "make "))] == []


def test_every_snippet_is_run_by_a_test():
    """Here, in test_dropin.py or in test_trackers.py."""
    names = "test_readme.py", "test_dropin.py", "test_trackers.py"
    code = "".join((ROOT / "tests" / name).read_text() for name in names)
    for name, language, text in SNIPPETS:
        assert name, f"no <!-- test: name --> before this {language} snippet:\n{text}"
        assert f'snippet("{name}")' in code, f"no test runs the snippet {name}"


@pytest.fixture
def fitting(tmp_path, monkeypatch):
    """What the snippets of `bvae.fit` use: images, and a `fit` of few steps of a small network."""
    monkeypatch.chdir(tmp_path)
    small = {"hidden_dims": (4, 8), "latent_dim": 3, "batch_size": 8, "max_steps": 3, "compile": False}
    fit = bvae.fit
    monkeypatch.setattr(bvae, "fit", lambda *data, **options: fit(*data, **{**options, **small}))
    images = torch.randint(256, (40, 64, 64, 3), dtype=torch.uint8)
    return {"bvae": bvae, "images": images, "held_out": images[:5]}


def test_fit_snippet(fitting, capsys):
    exec(snippet("fit"), fitting)
    assert fitting["new"].shape == (8, 3, 64, 64)
    weights = fitting["model"].state_dict()
    assert all(torch.equal(weights[k], v.cpu()) for k, v in fitting["fitted"].model.state_dict().items())
    shown = [float(word) for word in capsys.readouterr().out.splitlines()[-1].split()]
    assert shown == [fitting["fitted"].validation.mse, fitting["fitted"].validation.kld]


def test_fit_snippet_with_options(fitting, tmp_path):
    exec(snippet("fit-options"), fitting)
    assert fitting["config"].data.image_size == 32
    assert (tmp_path / "runs" / "mine" / "model.safetensors").is_file()


def test_fit_snippets_with_a_callback_and_a_loss(fitting, capsys):
    exec(snippet("fit-callback"), fitting)
    assert capsys.readouterr().out.splitlines()[-1] == f"3 {fitting['fitted'].validation.mse}"
    exec(snippet("fit-loss"), fitting)
    assert fitting["fitted"].validation.mse > 0
    exec(snippet("fit-network"), fitting)
    assert len(list(fitting["fitted"].model.parameters())) == 4


def test_model_snippet(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(export_state(BetaVAE(hidden_dims=[4, 8]).state_dict()), "last.ckpt")
    names: dict = {}
    exec(snippet("model").replace("runs/NAME", str(run_folder)), names)
    assert names["faces"].shape == (8, 3, 32, 32)
    assert torch.equal(names["again"], names["model"].reconstruct(names["faces"]))
    assert isinstance(names["old"], BetaVAE)


def test_export_snippet(run_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    exporting.export(BetaVAE.from_pretrained(run_folder), tmp_path / "runs" / "NAME" / "export")
    exec(snippet("export"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "(5, 3, 32, 32) [-1, 1]"


def test_hub_snippet(run_folder, tmp_path, monkeypatch):
    """Here the Hub is a folder; tests/test_hub.py has the client."""
    monkeypatch.setattr(hub, "upload", lambda model, repo_id, *_: model.save_pretrained(tmp_path / repo_id))
    monkeypatch.setattr(hub, "download", lambda repo_id, _: tmp_path / repo_id)
    names: dict = {}
    exec(snippet("hub").replace("runs/NAME", str(run_folder)), names)
    assert names["again"].config == names["model"].config


def test_score_snippet(capsys):
    factors = np.indices((2, 2)).reshape(2, 4).T.repeat(50, 0)
    exec(snippet("score"), {"codes": factors.astype(float), "factors": factors})
    mig, disentanglement = map(float, capsys.readouterr().out.split())
    assert mig == pytest.approx(1)
    assert disentanglement > 0.9


def test_drop_in_snippet():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    decoder = nn.Sequential(nn.Linear(2, 48), nn.Unflatten(1, (3, 4, 4)))
    images = torch.rand(5, 3, 4, 4) * 2 - 1
    names = {"encoder": encoder, "decoder": decoder, "images": images}
    exec(snippet("drop-in"), names)
    squared = (decoder(names["z"]).tanh() - images).square().flatten(1).sum(1).mean()
    mu, log_var = names["mu"], names["log_var"]
    kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1).mean()
    torch.testing.assert_close(names["loss"], squared + 4 * kl)
    assert all(p.grad.abs().sum() > 0 for net in (encoder, decoder) for p in net.parameters())


def test_pictures_and_linked_pages_are_there():
    for page in [*PAGES, ROOT / "docs" / "evidence.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if "://" not in target:
                path, _, heading = target.partition("#")
                linked = page.parent / path
                assert linked.exists(), f"{page.name} links to {path}"
                if heading:
                    slugs = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
                    assert heading in [slug.lower().replace(" ", "-") for slug in slugs], f"{path}: {heading}"


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 900


def test_every_file_has_its_reason_in_the_tree():
    """docs/development.md names each file of the package, one line each, and no other."""
    listed: list[str] = []
    folders: list[str] = []
    for line in snippet("tree").splitlines():
        if line.lstrip().startswith("--"):
            continue
        name, reason = re.fullmatch(r"( *\S+) *(.*)", line).groups()
        del folders[(len(name) - len(name.lstrip())) // 2 :]
        path = "".join(folders) + name.strip()
        if path.endswith("/"):
            folders.append(name.strip())
        else:
            assert reason, f"docs/development.md: say what {path} is for"
            listed.append(path)
    files = {
        str(path.relative_to(ROOT))
        for folder in ("bvae", "kernels", "pipelines")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    matched = {pattern: {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)} for pattern in listed}
    missing = sorted(files.difference(*matched.values()))
    gone = [pattern for pattern, found in matched.items() if not found]
    assert not missing, "docs/development.md: add a line to the tree for\n" + "\n".join(missing)
    assert not gone, "docs/development.md: remove from the tree\n" + "\n".join(gone)
    assert len(set(listed)) == len(listed)


def test_module_runs_without_an_install(tmp_path):
    """A clone is enough for `python -m bvae.train`, wherever the package's parts are found."""
    shown = subprocess.run(
        [sys.executable, "-m", "bvae.train", "--data", "celeba"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert "--data celeba needs --data-root" in shown.stderr
    assert "Traceback" not in shown.stderr
