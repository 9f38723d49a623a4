"""A run that is stopped while it validates loses nothing, and no step is logged twice."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import MEASURED, NETWORK

from bvae import fit
from bvae.pipelines import faces
from bvae.train import main
from bvae.training import run as training_run

TINY = [*NETWORK, "--no-compile", *("--log-every", "2", "--checkpoint-every", "4", "--max-steps", "10")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=60, seed=0, progress=False)


def train(data, out):
    return main(["--data-root", str(data), "--out", str(out), *TINY])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(data, out) == 0
    return out


def stop_in_validation(monkeypatch, number, what):
    """Let the n-th validation of this process stop in the middle."""
    original, count = training_run.validate, []

    def validate(*options):
        count.append(1)
        if len(count) == number:
            what()
        return original(*options)

    monkeypatch.setattr(training_run, "validate", validate)


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def scalars(out):
    """What TensorBoard shows: for each tag its steps and values."""
    # It sorts the files by name, in which those of one second and process are numbered without zeros before.
    for number, path in enumerate(sorted(out.glob("events*"), key=lambda path: path.stat().st_mtime_ns)):
        path.rename(out / f"events.out.tfevents.{number:010}")
    events = EventAccumulator(str(out))
    events.Reload()
    return {
        tag: [(each.step, each.value) for each in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.partition("/")[2] not in MEASURED
    }


def assert_same(out, whole):
    assert records(out) == records(whole)
    assert scalars(out) == scalars(whole)
    assert (out / "checkpoints" / "best.json").read_text() == (
        whole / "checkpoints" / "best.json"
    ).read_text()
    assert load_file(out / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(value, load_file(out / "model.safetensors")[name]), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("validation", "step"), [(1, 4), (2, 8), (3, 10)])
def test_a_validation_that_is_stopped_comes_first_in_the_resumed_run(
    data, whole, tmp_path, monkeypatch, capsys, number, validation, step
):
    out = tmp_path / "run"
    stop_in_validation(monkeypatch, validation, lambda: signal.raise_signal(number))
    assert train(data, out) == 0
    assert f"stopped at step {step} of 10" in capsys.readouterr().out
    assert not (out / "model.safetensors").exists()
    assert [each["step"] for each in records(out) if each["split"] == "valid"] == [4, 8][: validation - 1]
    monkeypatch.undo()
    assert main(["--resume", str(out)]) == 0
    assert_same(out, whole)


def test_stopped_in_the_same_validation_twice(data, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    for _ in range(2):
        stop_in_validation(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
        assert (main(["--resume", str(out)]) if out.exists() else train(data, out)) == 0
        monkeypatch.undo()
    assert main(["--resume", str(out)]) == 0
    assert_same(out, whole)


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize("after", ["validate", "mark_best"])
def test_killed_around_a_validation(data, whole, tmp_path, monkeypatch, after):
    """Also between the rating of the checkpoint and the record of the validation."""
    out = tmp_path / "run"
    original = getattr(training_run.Run, after)

    def killed(self, *options):
        result = original(self, *options)
        if self.done == 8:
            raise Killed
        return result

    monkeypatch.setattr(training_run.Run, after, killed)
    with pytest.raises(Killed):
        train(data, out)
    monkeypatch.undo()
    assert main(["--resume", str(out)]) == 0
    assert_same(out, whole)


def test_a_finished_run_that_is_resumed_shows_no_step_twice(data, whole, tmp_path):
    assert train(data, tmp_path / "run") == 0
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


def test_a_signal_before_the_validation_stops_at_once(data, whole, tmp_path, monkeypatch):
    """While the checkpoint is written; a scheduler gives some seconds."""
    out, original = tmp_path / "run", training_run.Run.save

    def save(self, due):
        original(self, due)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training_run.Run, "save", save)
    monkeypatch.setattr(training_run, "validate", lambda *_: pytest.fail("validated"))
    assert train(data, out) == 0
    monkeypatch.undo()
    assert main(["--resume", str(out)]) == 0
    assert_same(out, whole)


def test_ctrl_c_in_a_validation_of_fit_returns_the_model(monkeypatch):
    images = torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8)
    stop_in_validation(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    fitted = fit(images, hidden_dims=(4,), latent_dim=2, batch_size=8, max_steps=6, checkpoint_every=3)
    assert fitted.validation is None
    assert not fitted.model.training
    assert fitted.model.sample(2).isfinite().all()
