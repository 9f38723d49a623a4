"""`python -m bvae.train` as a user runs it: the run folder, resuming, and what it says of bad input."""

import errno
import fcntl
import itertools
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import pytest
import torch
import yaml
from pictures import write_folder
from PIL import Image
from safetensors.torch import load_file
from tiny import MEASURED, NETWORK

from bvae import files
from bvae.errors import UsageError
from bvae.kernels import launch
from bvae.model import BetaVAE
from bvae.pipelines import celeba, faces
from bvae.train import main
from bvae.training import checkpoint, step
from bvae.training.cli import parse
from bvae.training.setup import open_run

TINY = [
    *NETWORK,
    *("--log-every", "5", "--checkpoint-every", "7", "--no-compile"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """150 drawn faces: 120 to train on, 7 steps an epoch."""
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=150, seed=0, progress=False)


def run(data, out, *options):
    return main(["--data-root", str(data), "--out", str(out), *TINY, *map(str, options)])


def metrics(out, split="train"):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records if r["split"] == split]


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    assert metrics(a, "valid") == metrics(b, "valid")
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_run_folder(data, tmp_path, capsys):
    out = tmp_path / "runs" / "first"
    assert run(data, out, "--epochs", 2) == 0
    names = {path.name for path in out.iterdir() if "tfevents" not in path.name}
    assert names == {
        *("config.yaml", "metrics.jsonl", "checkpoints", "model.safetensors", "config.json", "finished.json"),
        *("reconstructions.png", "samples.png", "traversals.png", "traversals.gif", "kl_per_latent.png"),
        "explorer.html",
    }
    assert list(out.glob("events.out.tfevents.*"))
    assert [path.name for path in (out / "checkpoints").iterdir()]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-4].startswith("explained variance: ")
    assert printed[-3].startswith("validation: MSE ")
    assert printed[-2].startswith("speed: ")
    assert str(out) in printed[-1]

    last = metrics(out)[-1]
    assert {"loss", "mse", "kld", "capacity", "beta_norm", "active_units", "lr", "recon_nats"} <= last.keys()
    assert [record["step"] for record in metrics(out)] == [5, 10, 14]
    assert [record["step"] for record in metrics(out, "valid")] == [7, 14]
    for record in metrics(out) + metrics(out, "valid"):
        assert sum(record["kl_per_dim"]) == pytest.approx(record["kld"], rel=1e-3)
    with Image.open(out / "traversals.gif") as gif:
        assert gif.n_frames > 8
    with Image.open(out / "traversals.png") as png:
        assert png.height > 3 * 32


def test_config_yaml_repeats_the_run(data, tmp_path):
    assert run(data, tmp_path / "a", "--epochs", 1) == 0
    assert main(["--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_the_seed_matters(data, tmp_path):
    run(data, tmp_path / "a", "--max-steps", 5)
    run(data, tmp_path / "b", "--max-steps", 5, "--seed", 3)
    assert metrics(tmp_path / "a") != metrics(tmp_path / "b")


def test_muon_with_a_schedule_and_warm_up_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and of the warm-up: the schedule is a function of the step alone."""
    options = ("--max-steps", 20, "--optimizer", "muon", "--schedule", "cosine", "--warmup", 15)
    options = (
        *options,
        "--weight-decay",
        0.1,
        "--muon-weight-decay",
        0.5,
        "--clip-grad",
        1,
        "--accumulate",
        2,
    )
    assert run(data, tmp_path / "whole", *options) == 0
    original = step.TrainingStep.__call__

    def stopped(self, images):
        original(self, images)
        if int(self.step) == 11:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(step.TrainingStep, "__call__", stopped)
    assert run(data, tmp_path / "part", *options) == 0
    monkeypatch.undo()
    assert main(["--resume", str(tmp_path / "part")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    assert metrics(tmp_path / "whole")[-1]["lr"] < 0.05 * 0.02


def test_resume_continues_bit_for_bit(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--epochs", 6, "--capacity-iters", 30, "--schedule", "exponential")
    assert run(data, whole, *options, "--max-steps", 40) == 0
    assert run(data, parts, *options, "--max-steps", 20) == 0
    assert main(["--resume", str(parts), "--max-steps", "40"]) == 0
    # The first part also validated at its end, in the middle of an epoch.
    extra = [record for record in metrics(parts, "valid") if record["step"] != 20]
    assert extra == metrics(whole, "valid")
    assert metrics(parts) == metrics(whole)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), name


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGTERM, 11),
        (signal.SIGUSR1, 11),
        (signal.SIGHUP, 11),
        (signal.SIGINT, 11),
        (signal.SIGINT, 14),
    ],
    ids=["SIGTERM", "SLURM", "closed terminal", "Ctrl-C", "at the end of an epoch"],
)
def test_stopped_and_resumed_is_the_run_never_stopped(data, tmp_path, monkeypatch, capsys, number, at):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(data, whole, "--max-steps", 20) == 0

    original = step.TrainingStep.__call__

    def signalled(self, images):
        original(self, images)
        if int(self.step) == at:
            signal.raise_signal(number)

    monkeypatch.setattr(step.TrainingStep, "__call__", signalled)
    assert run(data, stopped, "--max-steps", 20) == 0
    said = capsys.readouterr().out
    assert f"stopped at step {at} of 20." in said
    assert f"continue with: {sys.executable} -m bvae.train --resume {stopped}" in said
    assert not (stopped / "model.safetensors").exists()
    monkeypatch.undo()

    # A crash between a log line and its checkpoint leaves records of steps that will come again.
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "step": 15, "loss": 0}\n{"split": "tra')
    assert main(["--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(
    "options",
    [
        "--loss-type VAE",
        "--loss-type H --beta 4",
        "--loss-type B --gamma 5 --max-capacity 10",
        "--loss-type H --recon sum --likelihood bernoulli",
        "--loss-type B --recon sum --gamma 1000",
        "--likelihood bernoulli --channels 1 --no-flip",
        "--kl-weight 0.001 --decoder-variance 1",
        "--image-size 50 --crop 100 --weight-decay 0.1 --lr-gamma 1",
    ],
)
def test_every_objective_trains(data, tmp_path, options):
    assert run(data, tmp_path / "run", "--max-steps", 30, *options.split()) == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    mse = [record["mse"] for record in metrics(tmp_path / "run")]
    assert all(value == value for value in losses)
    assert mse[-1] < mse[0]


def test_conventions_agree(data, tmp_path):
    """PyTorch-VAE's mean with weight w is the papers' sum with weight w D: one objective, other units."""
    weight, pixels = 0.01, 3 * 32 * 32
    first_step = ("--max-steps", 1, "--loss-type", "VAE")
    run(data, tmp_path / "mean", *first_step, "--kl-weight", weight)
    run(data, tmp_path / "sum", *first_step, "--recon", "sum", "--kl-weight", weight * pixels)
    (mean,), (sums,) = metrics(tmp_path / "mean"), metrics(tmp_path / "sum")
    assert sums["loss"] == pytest.approx(pixels * mean["loss"], rel=1e-5)
    for name in ("mse", "kld", "recon_nats", "beta_norm"):
        assert sums[name] == pytest.approx(mean[name], rel=1e-5), name
    assert mean["beta_norm"] == pytest.approx(weight * pixels * 3 / pixels)


def test_folder_of_images(data, tmp_path):
    images = data / "img_align_celeba"
    assert run(images, tmp_path / "run", "--data", "folder", "--max-steps", 5) == 0


SEED_YAML = """
model_params: {name: BetaVAE, in_channels: 3, latent_dim: 128, loss_type: B, gamma: 10.0, max_capacity: 25,
               Capacity_max_iter: 10000}
exp_params: {dataset: celeba, data_path: DATA, img_size: 64, batch_size: 24, LR: 0.0005, weight_decay: 0.0,
             scheduler_gamma: 0.95}
trainer_params: {gpus: 1, max_nb_epochs: 50, max_epochs: 50}
logging_params: {save_dir: SAVE, name: BetaVAE_B, manual_seed: 1265}
"""


def test_pytorch_vaes_configuration_runs_as_written(data, tmp_path, capsys):
    text = SEED_YAML.replace("DATA", str(data)).replace("SAVE", str(tmp_path / "logs"))
    (tmp_path / "bbvae.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "bbvae.yaml"), "--max-steps", "2", "--no-compile"]) == 0
    out = tmp_path / "logs" / "BetaVAE_B"
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["model"]["hidden_dims"] == [32, 64, 128, 256, 512]
    assert metrics(out)[-1]["beta_norm"] == 10 * (128 / 64**2) * 128  # gamma M_N M
    assert "trainer_params.gpus" in capsys.readouterr().out


@pytest.mark.parametrize("value", [["--data-root", "/absent"], ["--max-steps", "0"]])
def test_command_line_overrides_the_file(data, tmp_path, capsys, value):
    (tmp_path / "run.yaml").write_text(f"data: {{root: {data}}}\ntraining: {{max_steps: 2}}")
    assert main(["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), *value]) == 2
    assert value[1] in capsys.readouterr().err


def test_amp_on_this_cpu_says_what_it_does(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", "--max-steps", 2, "--amp", "--device", "cpu") == 0
    dtype, line = step.autocast_dtype(torch.device("cpu"), True)
    assert line in capsys.readouterr().out
    assert dtype is torch.bfloat16 or "no bfloat16 arithmetic" in line


@pytest.mark.slow
def test_compiled_run(data, tmp_path):
    """--compile trains the same model, up to the rounding of fused kernels."""
    run(data, tmp_path / "eager", "--max-steps", 5)
    run(data, tmp_path / "compiled", "--max-steps", 5, "--compile")
    (eager,), (compiled,) = metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")
    for name in ("loss", "mse", "kld"):
        assert compiled[name] == pytest.approx(eager[name], rel=1e-3)


# ---- bad input: a message, a status, no traceback, nothing overwritten -------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data-root /absent/faces --data celeba", "no folder at /absent/faces"),
        ("--data folder --data-root {empty}", "no image (.jpg, .jpeg, .jpe, .jfif, .png, .webp"),
        ("--data celeba --data-root {empty}", "holds a folder img_align_celeba/"),
        ("--crop 200", "135 of 135 images cannot be used"),
        (
            "--loss-type WAE",
            "Undefined loss type. --loss-type must be one of VAE, H, B, TC, Factor, DIP",
        ),
        ("--latent-dim 0", "model.latent_dim must be positive, got 0"),
        ("--lr -1", "training.lr must be positive, got -1.0"),
        ("--config /absent.yaml", "no configuration at /absent.yaml"),
        ("--resume /absent", "/absent is not a run folder"),
        ("--resume {empty} --config x.yaml", "remove --config"),
    ],
)
def test_usage_errors(data, tmp_path, capsys, options, message):
    (tmp_path / "empty").mkdir()
    arguments = options.format(empty=tmp_path / "empty").split()
    if "--resume" not in arguments:
        arguments = ["--data-root", str(data), *TINY, "--out", str(tmp_path / "run"), *arguments]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--latnt-dim", "3"], ["--lr", "fast"], ["--data", "mnist"]])
def test_unreadable_options(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_existing_run_folder_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    assert run(data, tmp_path / "run") == 2
    assert f"{tmp_path / 'run'} exists: name another folder with --out" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_resume_refuses_another_model(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--max-steps", 2)
    assert main(["--resume", str(tmp_path / "run"), "--latent-dim", "4"]) == 2
    assert "--resume cannot change model.latent_dim from 3 to 4" in capsys.readouterr().err


def test_resume_refuses_other_data(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--max-steps", 2)
    other = faces.write(tmp_path / "other", n=100, seed=0, progress=False)
    assert main(["--resume", str(tmp_path / "run"), "--data-root", str(other)]) == 2
    assert (
        "the dataset now has 80 images (120 at the checkpoint): cannot resume deterministically"
        in capsys.readouterr().err
    )


def test_extended_run_goes_on_as_extended(data, tmp_path, capsys):
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    options = ("--capacity-iters", 5, "--schedule", "exponential")  # neither depends on the run's length
    run(data, whole, "--max-steps", 10, *options)
    run(data, longer, "--max-steps", 5, *options)
    assert main(["--resume", str(longer), "--max-steps", "10"]) == 0
    assert main(["--config", str(longer / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(longer)[name]), name
        assert torch.equal(value, weights(tmp_path / "again")[name]), name
    assert main(["--resume", str(longer), "--max-steps", "3"]) == 2
    assert "is at step 10 already, beyond the 3 requested" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(data, tmp_path):
    run(data, tmp_path / "run", "--epochs", 2)
    before = weights(tmp_path / "run"), metrics(tmp_path / "run"), metrics(tmp_path / "run", "valid")
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert metrics(tmp_path / "run") == before[1]
    assert metrics(tmp_path / "run", "valid") == before[2]
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, before[0][name]), name


def test_config_of_a_run_follows_new_options(data, tmp_path):
    """What was 'm_over_n' or 'auto' is worked out anew, not frozen at the first run's numbers."""
    run(data, tmp_path / "a", "--max-steps", 4)
    again = ["--config", str(tmp_path / "a" / "config.yaml"), "--latent-dim", "6", "--max-steps", "8"]
    assert main([*again, "--out", str(tmp_path / "b")]) == 0
    state = checkpoint.load_newest(tmp_path / "b" / "checkpoints", torch.device("cpu"))
    objective = yaml.safe_load(state["config"])["objective"]
    assert (objective["kl_weight"], objective["capacity_iters"]) == (6 / 32**2, 4)


def test_learning_rate_falls_each_epoch(data, tmp_path):
    options = ("--optimizer", "adam", "--lr", 1e-3, "--schedule", "exponential", "--lr-gamma", 0.5)
    run(data, tmp_path / "run", "--epochs", 2, *options)
    assert [(r["step"], r["lr"]) for r in metrics(tmp_path / "run")] == [(5, 1e-3), (10, 5e-4), (14, 5e-4)]


def test_first_drawing_interrupted(tmp_path, monkeypatch):
    """What is left of it does not count as the data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "faces").mkdir(parents=True)
    monkeypatch.setattr("bvae.datasets.DRAWN", 60)
    assert main([*TINY, "--max-steps", "2", "--out", "run"]) == 0
    assert (tmp_path / "data" / "faces" / "celeba" / "factors.csv").is_file()


def test_damaged_checkpoint_falls_back_to_the_one_before(data, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(data, whole, "--epochs", 2)
    run(data, out, "--epochs", 2)
    _, newest = checkpoint.checkpoints(out / "checkpoints")
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(["--resume", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err.count(f"{newest} is damaged (it is cut short or overwritten) and set aside") == 1
    assert "steps 7 to 14" in said.out
    assert_same_run(whole, out)


def test_nan_stops_the_run_and_names_the_step(data, tmp_path, monkeypatch, capsys):
    original = step.TrainingStep.__call__

    def poisoned(self, images):
        if int(self.step) == 12:  # the 13th step's loss is the first to see it
            next(self.model.parameters()).data.fill_(float("nan"))
        original(self, images)

    monkeypatch.setattr(step.TrainingStep, "__call__", poisoned)
    assert run(data, tmp_path / "run", "--max-steps", 40) == 1
    error = capsys.readouterr().err
    assert "the loss is nan at step 13, on " in error
    assert "step-00000007.pt" in error
    named = (tmp_path / "run" / "batch-13.txt").read_text().split()
    assert len(set(named)) == 16
    assert set(named) <= set(celeba.inventory(data).splits["train"])
    assert f"{', '.join(named[:3])} and 13 more (all are in {tmp_path / 'run' / 'batch-13.txt'})" in error
    kept = checkpoint.load_newest(tmp_path / "run" / "checkpoints", torch.device("cpu"))
    assert kept["step"] == 7
    assert all(value.isfinite().all() for value in kept["model"].values())


@pytest.mark.parametrize(
    ("cause", "named"),
    [
        ("forward", "the output of encoder.0.0 (Downsample) is "),
        ("sample", "the input of "),
        ("backward", "the backward pass of decoder"),
        ("lr", "at step 9"),
    ],
)
def test_debug_nan_names_the_module_and_writes_nothing(data, tmp_path, monkeypatch, capsys, cause, named):
    out = tmp_path / "run"
    assert run(data, out, "--max-steps", 7) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    options = ["--lr", "1e38"] if cause == "lr" else []
    original = step.TrainingStep._backward

    def poisoned(self, images):
        number = int(self.step) + 1
        first = next(module for module in self.model.modules() if isinstance(module, torch.nn.Conv2d))
        if number == 9 and cause == "forward":
            first.weight.data.mul_(1e38).mul_(1e3)
        if number == 9 and cause == "sample":
            monkeypatch.setattr(
                step, "reparam_kl", lambda *a, **k: (a[0] * float("nan"), a[0].sum(1), a[0][0])
            )
        if number == 9 and cause == "backward":
            list(self.model.decoder.modules())[-1].register_full_backward_hook(
                lambda module, inputs, outputs: tuple(g * float("nan") for g in inputs)
            )
        return original(self, images)

    monkeypatch.setattr(step.TrainingStep, "_backward", poisoned)
    assert main(["--resume", str(out), "--max-steps", "20", "--debug-nan", *options]) == 0
    assert named in capsys.readouterr().out.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_debug_nan_of_a_sound_run(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--max-steps", 2)
    assert main(["--resume", str(tmp_path / "run"), "--max-steps", "9", "--debug-nan"]) == 0
    assert "every number up to step 9 is finite" in capsys.readouterr().out
    assert main(["--data-root", str(data), "--debug-nan"]) == 2


def test_deterministic(data, tmp_path):
    """On a CPU it changes nothing, and every operation has such a form."""
    run(data, tmp_path / "a", "--max-steps", 5)
    run(data, tmp_path / "b", "--max-steps", 5, "--deterministic")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    run(data, tmp_path / "c", "--max-steps", 1)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--amp", "--compile"]])
def test_deterministic_on_a_gpu(data, tmp_path, options):
    for name in "ab":
        run(data, tmp_path / name, "--max-steps", 30, "--deterministic", "--device", "cuda", *options)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_number_of_workers_changes_nothing(data, tmp_path, monkeypatch):
    for workers in (1, 3):
        monkeypatch.setattr("bvae.pipelines.torch_decode.cores", lambda workers=workers: workers)
        options = ("--max-steps", 10, "--stream", "--decoder", "torchvision")
        assert run(data, tmp_path / str(workers), *options) == 0
    assert_same_run(tmp_path / "1", tmp_path / "3")


def test_batch_that_is_named_is_the_one_that_was_read(data, tmp_path):
    arguments = parse(["--data-root", str(data), "--out", str(tmp_path / "run"), *TINY], "")
    files = celeba.inventory(data).splits["train"]
    with open_run(arguments) as prepared:
        for number, (_, index) in enumerate([*prepared.train.epoch(0), *prepared.train.epoch(1)], start=1):
            assert prepared.images(number) == [files[i] for i in index]


@pytest.mark.parametrize("layer", ["encoder", "decoder"])
def test_gradient_that_is_not_finite_stops_the_run_at_its_step(data, tmp_path, monkeypatch, capsys, layer):
    original = step.TrainingStep._backward

    def poisoned(self, images):
        number = int(self.step) + 1
        if number == 9:
            hook = self.model.get_submodule(layer).register_full_backward_pre_hook(
                lambda module, gradients: tuple(g * float("inf") for g in gradients)
            )
        result = original(self, images)
        if number == 9:
            hook.remove()
        return result

    monkeypatch.setattr(step.TrainingStep, "_backward", poisoned)
    assert run(data, tmp_path / "run", "--max-steps", 40, "--loss-type", "VAE") == 1
    assert re.search(r"the gradient is (nan|-?inf) at step 9, on ", capsys.readouterr().err)


@pytest.mark.parametrize("during", ["validation", "pictures", "ingest", "first step"])
def test_request_to_stop_is_heard_at_once_where_nothing_is_lost(data, tmp_path, monkeypatch, capsys, during):
    names = {
        "validation": "training.run.validate",
        "pictures": "training.results.save_pictures",
        "ingest": "training.setup.open_data",
    }

    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")

    if during == "first step":
        monkeypatch.setattr(step.TrainingStep, "__call__", interrupted)
    else:
        monkeypatch.setattr(f"bvae.{names[during]}", interrupted)
    kept = during in ("validation", "pictures")
    assert run(data, tmp_path / "run", "--epochs", 1) == (0 if kept else 130)
    assert ("--resume" if kept else "No checkpoint was written") in capsys.readouterr().out
    monkeypatch.undo()
    if kept:
        assert main(["--resume", str(tmp_path / "run")]) == 0


def test_other_images_of_the_same_number_are_refused(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--max-steps", 2)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "img_align_celeba" / "000001.jpg").rename(other / "img_align_celeba" / "000151.jpg")
    lists = other / "list_eval_partition.txt"
    lists.write_text(lists.read_text().replace("000001.jpg", "000151.jpg"))
    assert main(["--resume", str(tmp_path / "run"), "--data-root", str(other)]) == 2
    assert "files now have other names or another order" in capsys.readouterr().err


def test_checkpoint_of_something_else(data, tmp_path, capsys):
    run(data, tmp_path / "run", "--max-steps", 2)
    folder = tmp_path / "run" / "checkpoints"
    state = checkpoint.load_newest(folder, torch.device("cpu"))
    for absent in ("optimizer", "images", "config"):
        checkpoint.save(folder, 3, {**{k: v for k, v in state.items() if k != absent}, "step": 3})
        assert main(["--resume", str(tmp_path / "run"), "--max-steps", "9"]) == 2
        assert "its newest checkpoint is of another kind" in capsys.readouterr().err


def test_another_version_is_told(data, tmp_path, monkeypatch, capsys):
    run(data, tmp_path / "run", "--max-steps", 2)
    monkeypatch.setattr(checkpoint, "versions", lambda: {"torch": "3.0", "bvae": "0.9"})
    assert main(["--resume", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"trained so far with torch {torch.__version__}, " in said
    assert "now with torch 3.0, " in said
    assert "not bit for bit as without a stop" in said


@pytest.mark.parametrize("resumed", [False, True])
def test_read_only_run_folder_is_found_before_the_data_are_opened(
    data, tmp_path, monkeypatch, capsys, resumed
):
    out = tmp_path / "run"
    if resumed:
        run(data, out, "--max-steps", 2)
    monkeypatch.setattr("bvae.training.setup.open_data", lambda *_: pytest.fail("opened"))

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert (main(["--resume", str(out)]) if resumed else run(data, out)) == 2
    error = capsys.readouterr().err
    assert "Read-only file system: name another run folder with --out" in error
    assert str(out if resumed else tmp_path) in error


def test_full_disk_keeps_the_last_checkpoint(data, tmp_path, monkeypatch, capsys):
    assert run(data, tmp_path / "run", "--max-steps", 7) == 0
    folder = tmp_path / "run" / "checkpoints"

    def open_full(path, mode, **options):  # every write to the new checkpoint fails with ENOSPC
        full = "step-00000014" in str(path)
        return open("/dev/full", "wb") if full else open(path, mode, **options)

    monkeypatch.setattr(files, "open", open_full, raising=False)
    assert main(["--resume", str(tmp_path / "run"), "--max-steps", "14"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"step-00000007.pt", "best.json"}


def test_run_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("/absent", tmp_path / "file" / "run") == 2  # found before the data are looked for
    assert f"{tmp_path / 'file'} is a file: name another run folder" in capsys.readouterr().err


# ---- in a process of its own -------------------------------------------------------------------------------


def test_help_teaches():
    shown = subprocess.run([sys.executable, "-m", "bvae.train", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    text = " ".join(shown.stdout.replace("│", " ").split())
    for part in ("--data celeba --data-root DIR --amp", "--resume", "--loss-type", "Higgins et al. 2017"):
        assert part in text


def test_a_terminal_gets_one_live_bar(data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "bvae.train",
        "--data-root",
        str(data),
        "--out",
        str(tmp_path / "run"),
        *TINY,
    ]
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows, columns
    subprocess.run([*command, "--max-steps", "10"], stdout=terminal, stderr=terminal, check=True)
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 65536)
        except OSError:  # the end of a terminal whose writers are gone
            break
    assert b"\r" in shown
    last = shown[shown.rindex(b"step 10/10") :].split(b"\r")[0]
    for part in (b"ETA", b"epoch 2", b"loss", b"KL", b"C ", b"images/s"):
        assert part in last
    assert b"explained variance" in shown
    assert b"ETA 0:00:00" not in shown  # the lines that stand in for the bar elsewhere


SWITCHES = ("amp", "capture", "fused", "compile")


@pytest.mark.parametrize(
    "on",
    [
        pytest.param(on, marks=pytest.mark.slow if on[3] else (), id=" ".join(map(str, map(int, on))))
        for on in itertools.product((True, False), repeat=len(SWITCHES))
    ],
)
def test_every_combination_of_layers_trains_the_same(data, tmp_path, monkeypatch, on):
    monkeypatch.setattr(launch, "ENABLED", True)  # a run sets it for the whole process
    options = [("--" if is_on else "--no-") + name for name, is_on in zip(SWITCHES, on, strict=True)]
    assert run(data, tmp_path / "plain", "--max-steps", 5, "--no-amp") == 0
    assert run(data, tmp_path / "run", "--max-steps", 5, *options) == 0
    plain, layered = metrics(tmp_path / "plain")[-1], metrics(tmp_path / "run")[-1]
    assert layered["loss"] == pytest.approx(plain["loss"], rel=0.05 if on[0] else 1e-3)


# ---- a run at any time -------------------------------------------------------------------------------------
def test_a_run_loads_at_any_time(data, tmp_path):
    out = tmp_path / "run"
    assert run(data, out, "--max-steps", 21, "--lr", "1e-2") == 0
    last, best = (BetaVAE.from_pretrained(out, which).state_dict() for which in ("last", "best"))
    assert torch.equal(last["head.weight"], weights(out)["head.weight"])
    found = json.loads((out / "checkpoints" / "best.json").read_text())["step"]
    state = torch.load(out / "checkpoints" / f"step-{found:08d}.pt", weights_only=True)["model"]
    assert torch.equal(best["head.weight"], state["head.weight"])
    (out / "model.safetensors").unlink()  # as if it was still training
    again = BetaVAE.from_pretrained(out).state_dict()
    assert all(torch.equal(again[name], value) for name, value in last.items())


def test_a_fine_tuned_model_in_the_run_folder_is_the_newest(data, tmp_path):
    out = tmp_path / "run"
    assert run(data, out, "--max-steps", 3) == 0
    model = BetaVAE.from_pretrained(out)
    with torch.no_grad():
        model.head.bias.fill_(7)
    model.save_pretrained(out)
    assert (BetaVAE.from_pretrained(out).head.bias == 7).all()


def test_a_damaged_checkpoint_is_named_and_left_alone(data, tmp_path):
    out = tmp_path / "run"
    assert run(data, out, "--max-steps", 3) == 0
    (out / "model.safetensors").unlink()
    path = out / "checkpoints" / "step-00000003.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"step-00000003.pt is damaged"):
        BetaVAE.from_pretrained(out)
    assert path.is_file()


# ---- own photographs ---------------------------------------------------------------------------------------
def test_a_few_photographs_make_a_smaller_batch(tmp_path, capsys):
    write_folder(tmp_path / "photos", 12)
    options = ["--data", "folder", "--image-size", "32", "--hidden-dims", "4", "--latent-dim", "2"]
    options += ["--data-root", str(tmp_path / "photos"), "--out", str(tmp_path / "run"), "--max-steps", "25"]
    assert main(options) == 0  # 10 to train on, 32 in the preset's batch
    said = capsys.readouterr().out
    assert "options that are not on the command line come from the preset small" in said
    assert "10 training images: the batch size is 10" in said
    assert "steps 0 to 25" in said  # over as many epochs as that takes
    assert "warning" not in said
    assert [record["step"] for record in metrics(tmp_path / "run")] == [25]
    assert main(["--resume", str(tmp_path / "run"), "--max-steps", "30"]) == 0


def test_a_run_without_its_damaged_files_resumes_from_another_name_of_the_folder(
    tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "photos", 30)
    (tmp_path / "photos" / "002.jpg").write_text("")
    monkeypatch.chdir(tmp_path)
    options = [
        "--data",
        "folder",
        "--data-root",
        "photos",
        "--on-bad",
        "skip",
        "--out",
        "run",
        "--max-steps",
        "3",
    ]
    assert main([*options, *TINY, "--cache-dir", "cache"]) == 0
    assert main(["--resume", "run", "--max-steps", "4"]) == 0, capsys.readouterr().err


def test_epochs_replace_the_steps_of_a_preset(data, tmp_path, capsys):
    options = ["--data", "folder", "--data-root", str(data), *TINY, "--out", str(tmp_path / "run")]
    assert main([*options, "--epochs", "1"]) == 0
    assert "steps 0 to 7" in capsys.readouterr().out


def test_a_short_run_is_announced_with_its_remedy(data, tmp_path, capsys):
    assert run(data, tmp_path / "run", "--epochs", 2) == 0
    assert "warning: 14 steps are few for a VAE" in (said := capsys.readouterr().out)
    assert "--max-steps 5000" in said


def test_help_shows_the_defaults_that_apply(monkeypatch, capsys):
    shown = []
    for options in ([], ["--data", "folder"], ["--config", "celeba_b"]):
        with pytest.raises(SystemExit):
            main([*options, "--help"])
        shown.append(capsys.readouterr().out)
    assert [re.search(r"--batch-size INT.*?default: (\d+)", text, re.DOTALL)[1] for text in shown] == [
        "64",
        "32",
        "144",
    ]
    assert "preset faces_cpu" in shown[0]
    assert "preset small" in shown[1]


# ---- own networks ------------------------------------------------------------------------------------------
NETWORK = """
from torch import nn
from bvae import register_architecture
from bvae.architectures import Network

def linear(channels, size, latent_dim, widths):
    pixels = channels * size * size
    head, back = nn.Linear(pixels, 2 * latent_dim), nn.Linear(latent_dim, pixels)
    return Network(nn.Flatten(), head, back, (pixels,), nn.Unflatten(1, (channels, size, size)))

register_architecture("imported-linear", linear)
"""


def test_a_network_of_an_imported_module(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("networks_of_mine.py").write_text(NETWORK)
    options = ["--arch", "imported-linear", "--max-steps", 3]
    assert run(data, tmp_path / "run", *options) == 2
    assert "got 'imported-linear': your own network is known once" in capsys.readouterr().err
    assert run(data, tmp_path / "run", *options, "--import", "no_such_module") == 2
    assert "--import no_such_module: no such module" in capsys.readouterr().err
    assert run(data, tmp_path / "run", *options, "--import", "networks_of_mine") == 0
    assert len(BetaVAE.from_pretrained(tmp_path / "run").state_dict()) == 4
