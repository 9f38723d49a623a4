"""A stranger's run folder resumes, or is refused in one line: no crash, no traceback, nothing overwritten."""

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import struct
import time
import traceback

import pytest
import torch
import yaml
from hostile_checkpoints import mutations
from safetensors.torch import save_file
from tiny import NETWORK

from bvae.errors import UsageError
from bvae.model import BetaVAE
from bvae.pipelines import faces
from bvae.train import main
from bvae.training import checkpoint, cli
from bvae.training.cli import parse
from bvae.training.restore import _load_scaler, restore
from bvae.training.setup import open_run
from bvae.training.step import NotFinite

OPTIMIZERS = ("adam", "muon", "adagrad")
TINY = [*NETWORK, "--no-compile", *("--log-every", "1", "--max-steps", "3", "--device", "cpu")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder for each optimizer."""
    where = tmp_path_factory.mktemp("runs")
    data = faces.write(where / "faces", n=60, seed=0, progress=False)
    for optimizer in OPTIMIZERS:
        places = [
            "--data-root",
            str(data),
            "--out",
            str(where / optimizer),
            "--cache-dir",
            str(where / "cache"),
        ]
        assert main([*places, *TINY, "--optimizer", optimizer]) == 0
    return where


def check_line(message, what):
    assert len(message.splitlines()) == 1, (what, message)
    assert len(message) < 1000, (what, message)


def in_a_fork(work, *arguments):
    """What the work returns in a process of its own, which it may crash."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def call():
        torch.set_num_threads(1)
        try:
            theirs.send(work(*arguments))
        except BaseException:
            theirs.send(traceback.format_exc())

    process = context.Process(target=call)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = "crashed"
    process.join()
    assert process.exitcode == 0, f"{found}: exit code {process.exitcode}"
    return found


def resume_each(out, number, seed):
    """How many of the changed checkpoints were refused, and how many resumed and took two steps."""
    refused = resumed = 0
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = parse(["--resume", str(out), "--max-steps", "5"], "")
        with open_run(arguments) as run:
            batch = run.train.head(run.train.batch_size)
            path = checkpoint.checkpoints(out / checkpoint.FOLDER)[-1]
            state = torch.load(path, weights_only=True)
            for what, changed in mutations(state, number, seed):
                said = io.StringIO()
                torch.save(changed, path)
                try:
                    with contextlib.redirect_stderr(said):
                        cli._checkpointed(out)
                        restore(run, accept_changed_images=True)
                        while run.done < run.steps:
                            run.advance(batch)
                            run.step.metrics_buffer.send(run.done)
                            run.step.receive(wait=True)
                    resumed += 1
                except (UsageError, NotFinite) as error:
                    check_line(str(error), what)
                    refused += 1
                except BaseException as error:
                    raise AssertionError(what) from error
                assert len(said.getvalue().splitlines()) <= 1, what
                path.with_suffix(".damaged").unlink(missing_ok=True)
    return refused, resumed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("changes", "seed", "least"), [(20, 1, 10), pytest.param(334, 0, 200, marks=pytest.mark.slow)]
)
def test_changes_of_a_checkpoint(runs, tmp_path, optimizer, changes, seed, least):
    shutil.copytree(runs / optimizer, tmp_path / "run")
    refused, resumed = in_a_fork(resume_each, tmp_path / "run", changes, seed)
    assert refused + resumed == changes
    assert refused > least


SCALERS = [
    *(("scale", value) for value in (0.0, -1.0, torch.inf, torch.nan, "1", 1, None, torch.ones(()))),
    *(("_growth_tracker", value) for value in (-1, 10**30, 0.5, True, None, "1")),
]


def test_the_state_of_the_scaler():
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))  # creates its tensors
    saved = {**scaler.state_dict(), "scale": 8.0, "_growth_tracker": 5}
    for name, value in SCALERS:
        with pytest.raises(UsageError, match="the scaler's"):
            _load_scaler(scaler, {**saved, name: value})
    for value in (None, [], "scale"):
        with pytest.raises(UsageError, match="it holds no scaler"):
            _load_scaler(scaler, value)
    _load_scaler(scaler, {})  # of a run in float32
    assert scaler.get_scale() == 65536
    _load_scaler(scaler, {**saved, "growth_factor": "hostile"})
    assert scaler.state_dict() == saved


# ---- the command -------------------------------------------------------------------------------------------
@pytest.fixture
def out(runs, tmp_path):
    """A copy of Adam's run folder, to be changed."""
    return shutil.copytree(runs / "adam", tmp_path / "run")


def rewrite(out, change):
    """Change the newest checkpoint's state."""
    path = checkpoint.checkpoints(out / checkpoint.FOLDER)[-1]
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def set_moments(state):
    """With which fused Adam wrote beyond its memory."""
    for name in ("exp_avg", "exp_avg_sq"):
        state["optimizer"]["state"][0][name] = torch.full((1,), 0.5)


def set_config(**changes):
    def change(state):
        config = yaml.safe_load(state["config"])
        config["model"].update(changes)
        state["config"] = yaml.safe_dump(config)

    return change


CHANGES = {
    "moments of one element": (set_moments, "exp_avg is [1] instead of [4, 3, 3, 3]"),
    "moments in one element of memory": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1, 1, 1, 1).expand(4, 3, 3, 3)),
        "exp_avg has elements that overlap",
    ),
    "text as step": (lambda s: s.update(step="3"), "no checkpoint that is not damaged"),
    "float as step": (lambda s: s.update(step=3.0), "no checkpoint that is not damaged"),
    "tensor as step": (lambda s: s.update(step=torch.ones(3)), "no checkpoint that is not damaged"),
    "nested configuration": (lambda s: s.update(config={"a": {"b": 1}}), "it holds no configuration"),
    "deep configuration": (lambda s: s.update(config="[" * 10_000), "nested too deeply"),
    "16 GB of latents": (
        set_config(latent_dim=4_000_000),
        "head.weight is [6, 128] instead of [8000000, 128]",
    ),
    "100 000 stages": (set_config(hidden_dims=[4] * 100_000), "it holds no configuration"),
    "1000 stages": (set_config(hidden_dims=[4] * 1000), "must be 1 to 64 positive widths"),
    "wide stages": (set_config(hidden_dims=[10**18, 10**18]), "no such network"),
    "NaN": (lambda s: s["model"]["head.bias"].fill_(torch.nan), "head.bias is NaN or infinite"),
    "complex": (
        lambda s: s["model"].update({"head.bias": s["model"]["head.bias"] * 1j}),
        "head.bias is complex",
    ),
    "integers": (
        lambda s: s["model"].update({"head.bias": s["model"]["head.bias"].long()}),
        "head.bias is torch.int64 instead of torch.float32",
    ),
    "a path of NUL": (
        lambda s: s.update(config=s["config"].replace("root: /", 'root: "\\0" #')),
        "cannot hold a NUL character",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_strangers_checkpoint_is_refused_in_one_line_at_once(out, monkeypatch, capsys, change):
    rewrite(out, CHANGES[change][0])
    monkeypatch.setattr("bvae.training.setup.open_data", lambda *_: pytest.fail("opened the data"))
    if change.startswith("moments"):  # they are compared when the optimizer is there
        monkeypatch.undo()
    start = time.monotonic()
    assert main(["--resume", str(out), "--max-steps", "5"]) == 2
    assert time.monotonic() - start < 2
    lines = capsys.readouterr().err.splitlines()
    assert CHANGES[change][1] in lines[-1]
    assert len(lines) == 2 if "as step" in change else 1  # the file that was set aside is named too


MODELS = {
    "NaN": (lambda weights: weights["head.bias"].fill_(torch.nan), {}, "head.bias is NaN or infinite"),
    "infinite": (lambda weights: weights["head.bias"].fill_(torch.inf), {}, "head.bias is NaN or infinite"),
    "negative variance": (
        lambda weights: weights["encoder.0.1.running_var"].fill_(-1),
        {},
        "encoder.0.1.running_var is negative",
    ),
    "complex": (
        lambda weights: weights.update({"head.bias": torch.zeros(6, dtype=torch.complex64)}),
        {},
        "head.bias is 'C64' instead of torch.float32",
    ),
    "integers": (
        lambda weights: weights.update({"head.bias": torch.zeros(6, dtype=torch.int32)}),
        {},
        "head.bias is 'I32' instead of torch.float32",
    ),
    "16 GB of latents": (
        None,
        {"latent_dim": 4_000_000},
        r"head.weight is \[6, 128\] instead of \[8000000, 128\]",
    ),
    "50 000 stages": (None, {"hidden_dims": [4] * 50_000}, "hidden_dims must be 1 to 64 positive widths"),
    "a size beyond 64 bits": (None, {"latent_dim": 10**30}, "does not describe a BetaVAE"),
    "a size of no whole number": (None, {"latent_dim": 3.5}, "latent_dim takes whole numbers, got"),
}


@pytest.mark.parametrize("change", MODELS)
def test_a_strangers_model_is_refused_at_once(tmp_path, change):
    model = BetaVAE(3, 3, (4, 8, 8), 32)
    model.save_pretrained(tmp_path)
    changed, config, message = MODELS[change]
    if changed:
        state = model.state_dict()
        changed(state)
        save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**model.config, **config}))
    start = time.monotonic()
    with pytest.raises(UsageError, match=message):
        BetaVAE.from_pretrained(tmp_path)
    assert time.monotonic() - start < 2


def test_no_more_is_read_than_the_model_takes(tmp_path):
    """A header of gigabytes, and a sparse file of gigabytes behind a right header."""
    model = BetaVAE(3, 3, (4, 8, 8), 32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    os.truncate(path, 1 << 33)
    with pytest.raises(UsageError, match="is damaged: its tensors take 858993"):
        BetaVAE.from_pretrained(tmp_path)
    for data in (struct.pack("<Q", 1 << 34) + whole[8:], b"", whole[:100], bytes(len(whole)), whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(UsageError, match="is damaged: "):
            BetaVAE.from_pretrained(tmp_path)


def test_every_bit_of_a_header(tmp_path):
    """Refused in one line, or the model that was saved."""
    model = BetaVAE(1, 2, (4,), 32).eval()
    model.save_pretrained(tmp_path)
    path, z = tmp_path / "model.safetensors", torch.zeros(1, 2)
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in range(0, length, 5):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            again = BetaVAE.from_pretrained(tmp_path)
        except UsageError as error:
            check_line(str(error), place)
        else:
            assert torch.equal(again.decode(z), model.decode(z)), place


# ---- links -------------------------------------------------------------------------------------------------
WRITTEN = (
    *("config.yaml", "config.json", "metrics.jsonl", "model.safetensors", "finished.json"),
    *("reconstructions.png", "samples.png", "traversals.png", "traversals.gif", "checkpoints/best.json"),
    "explorer.html",
)


@pytest.mark.parametrize("kind", ["link", "hard link", "link to nothing"])
def test_links_in_the_place_of_results_are_replaced(out, tmp_path, kind):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (out / "checkpoints" / "best.json").unlink(missing_ok=True)
    for name in WRITTEN:
        planted, target = out / name, elsewhere / name.replace("/", "-")
        target.write_text("precious")
        planted.unlink(missing_ok=True)
        if kind == "hard link":
            os.link(target, planted)
        else:
            planted.symlink_to(target)
        if kind == "link to nothing":
            target.unlink()
    if kind == "link to nothing":  # a run folder is known by it
        (out / "config.yaml").unlink()
        (out / "config.yaml").write_text("")
    assert main(["--resume", str(out), "--max-steps", "5"]) == 0
    kept = {path.name: path.read_text() for path in elsewhere.iterdir()}
    assert kept == ({} if kind == "link to nothing" else {n.replace("/", "-"): "precious" for n in WRITTEN})
    for name in WRITTEN:
        assert (out / name).is_file()
        assert not (out / name).is_symlink()
        assert (out / name).stat().st_nlink == 1


@pytest.mark.parametrize("resume", ["--resume", "--resume auto --out"])
def test_a_link_to_other_checkpoints_is_refused(out, tmp_path, capsys, resume):
    elsewhere = tmp_path / "elsewhere"
    (out / "checkpoints").rename(elsewhere)
    (out / "checkpoints").symlink_to(elsewhere)
    for name in ("step-00000001.pt", "step-00000002.pt", "mine.tmp"):
        (elsewhere / name).write_text("precious")
    before = sorted(path.name for path in elsewhere.iterdir())
    options = [] if resume == "--resume" else [*TINY, "--optimizer", "adam"]
    assert main([*resume.split(), str(out), *options, "--max-steps", "5"]) == 2
    assert "checkpoints is a link: a run writes into its own folder alone" in capsys.readouterr().err
    assert sorted(path.name for path in elsewhere.iterdir()) == before
