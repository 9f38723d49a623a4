"""What Weights & Biases and MLflow get of a run: through stubs of their API, and wandb itself, offline."""

import importlib
import importlib.util
import inspect
import json
import signal
import struct
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from documents import snippet
from tiny import FIT, NETWORK

import bvae
from bvae import fit
from bvae.pipelines import faces
from bvae.train import main
from bvae.training import run as training_run
from bvae.training import step as training_step
from bvae.training.trackers import TRACKERS, MlflowTracker, WandbTracker

COMMAND = [*NETWORK, "--no-compile", *("--log-every", "2", "--checkpoint-every", "4", "--max-steps", "10")]
SERVICES = list(TRACKERS)


@pytest.fixture(scope="module")
def images():
    """uint8 [40, 32, 32, 3]"""
    return torch.randint(256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def history_alone(images):
    """The log of the run without a tracker."""
    return fit(images, **FIT).history


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces.write(tmp_path_factory.mktemp("data") / "faces", n=60, seed=0, progress=False)


class Service:
    """What a stub has got: the arguments of its start, values by (name, step), pictures and the end."""

    def __init__(self):
        self.starts, self.values, self.pictures, self.ends = [], {}, [], []
        self.failing = None  # the name of a function that fails from now on

    def called(self, function):
        if function == self.failing:
            raise ConnectionError("no route to host\nand more lines")

    def get(self, step, values):
        for name, value in values.items():
            assert (name, step) not in self.values, f"{name} twice at step {step}"
            self.values[name, step] = value

    def steps(self, name):
        return [step for found, step in self.values if found == name]


class WandbStub(ModuleType):
    def __init__(self, service):
        super().__init__("wandb")
        self._service = service
        self.Image = str

    def init(self, **options):
        self._service.called("init")
        self._service.starts.append(options)
        self.id = options["id"] or f"run{len(self._service.starts)}"
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self._service.called("log")
        if "step" in values:
            self._service.get(values["step"], {k: v for k, v in values.items() if k != "step"})
        else:
            self._service.pictures += values.values()

    def finish(self):
        self._service.called("finish")
        self._service.ends.append("FINISHED")


class MlflowStub(ModuleType):
    def __init__(self, service):
        super().__init__("mlflow")
        self._service = service

    def start_run(self, run_id, run_name=None):
        self._service.called("init")
        run_id = run_id or f"run{len(self._service.starts) + 1}"
        self._service.starts.append({"id": run_id, "name": run_name})
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_params(self, params):
        assert "config" not in self._service.starts[-1]
        self._service.starts[-1]["config"] = params

    def log_metrics(self, metrics, step, synchronous):
        assert synchronous is False  # the step does not wait for the network
        self._service.called("log")
        self._service.get(step, metrics)
        return SimpleNamespace(wait=lambda: self._service.called("finish"))

    def log_artifact(self, path):
        self._service.pictures.append(path)

    def end_run(self, status):
        self._service.ends.append(status)


@pytest.fixture(params=SERVICES)
def name(request):
    return request.param


@pytest.fixture
def service(name, monkeypatch):
    service = Service()
    stub = {"wandb": WandbStub, "mlflow": MlflowStub}[name](service)
    monkeypatch.setitem(sys.modules, name, stub)
    return service


# --- fit --------------------------------------------------------------------------------------------------
def test_a_run_is_sent(images, tmp_path, name, service):
    out = tmp_path / "mine"
    fitted = fit(images, out=out, callbacks=[TRACKERS[name]()], checkpoint_every=3, **FIT)
    (start,) = service.starts
    assert start["name"] == "mine"
    assert start["config"]["training.batch_size"] == 8
    assert start["config"]["data.name"] == "memory"
    json.dumps(start["config"])
    assert service.steps("train/loss") == [2, 4, 6]
    assert service.steps("valid/elbo") == [3, 6]
    losses = {r["step"]: r["loss"] for r in fitted.history if r["split"] == "train"}
    assert {step: service.values["train/loss", step] for step in losses} == losses
    names = {name for name, _ in service.values}
    assert {"train/lr", "train/images_per_s", "train/peak_memory_gib", "valid/mse"} <= names
    kl = {f"valid/kl_per_dim/{i:03}": nats for i, nats in enumerate(fitted.validation.kl_per_dim)}
    found = {name: service.values[name, 6] for name, step in service.values if "kl_per" in name and step == 6}
    assert found == {name: nats for name, nats in kl.items() if nats > 0.01}
    assert service.pictures == [
        str(out / f"{each}.png") for each in ("reconstructions", "samples", "traversals")
    ]
    assert service.ends == ["FINISHED"]
    assert (out / f"{name}_id.txt").read_text() == "run1\n"


def test_without_a_folder_nothing_is_written(images, tmp_path, monkeypatch, name, service):
    monkeypatch.chdir(tmp_path)
    fit(images, callbacks=[TRACKERS[name]()], **FIT)
    assert service.steps("train/loss") == [2, 4, 6]
    assert (service.pictures, service.ends) == ([], ["FINISHED"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", ["init", "log", "finish"])
def test_a_failure_of_the_service_is_one_line(
    images, tmp_path, name, service, function, capsys, history_alone
):
    service.failing = function
    tracked = fit(images, out=tmp_path / "run", callbacks=[TRACKERS[name]()], **FIT)
    lines = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert lines == [f"{name}: ConnectionError: no route to host: training continues without it"]
    assert tracked.history == history_alone


def test_other_ranks_send_nothing(images, monkeypatch, name, service):
    tracker = TRACKERS[name]()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    tracker.on_start(None, None, {})
    tracker.on_log(2, {"loss": 1.0})
    tracker.on_end(None)
    assert (service.starts, service.values, service.ends) == ([], {}, [])


def test_options_reach_the_service(images, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", WandbStub(service))
    monkeypatch.setenv("WANDB_PROJECT", "faces")
    fit(images, callbacks=[WandbTracker(tags=["a"])], **FIT)
    fit(images, callbacks=[WandbTracker(project="given")], **FIT)
    monkeypatch.delenv("WANDB_PROJECT")
    fit(images, callbacks=[WandbTracker()], **FIT)
    assert [start["project"] for start in service.starts] == ["faces", "given", "bvae"]
    assert service.starts[0]["tags"] == ["a"]


def test_the_documents_snippet(images, tmp_path, monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", WandbStub(service))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bvae, "fit", partial(fit, **FIT))
    exec(snippet("fit-tracker"), {"bvae": bvae, "images": images})
    (start,) = service.starts
    assert (start["project"], start["tags"], start["name"]) == ("faces", ["first"], "mine")


def test_an_id_that_can_be_none_is_not_sent(images, tmp_path, name, service, capsys):
    (tmp_path / f"{name}_id.txt").write_text("../other\n")
    tracker = TRACKERS[name]()
    tracker.on_start(None, tmp_path, {})
    tracker.on_log(2, {"loss": 1.0})
    assert f"{name}_id.txt holds no id of a run: remove it" in capsys.readouterr().err
    assert (service.starts, service.values) == ([], {})


# --- The command ------------------------------------------------------------------------------------------
def train(data, out, *options):
    return main(["--data-root", str(data), "--out", str(out), *COMMAND, *options])


def test_a_missing_package_is_one_line(data, tmp_path, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert train(data, tmp_path / "run", "--log", name) == 2
    assert capsys.readouterr().err == f"error: bvae needs {name}: pip install 'bvae[{name}]'\n"
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModuleNotFoundError, match=f"bvae needs {name}: pip install"):
        TRACKERS[name]()


def test_a_resumed_run_continues_in_its_run(data, tmp_path, name, service, monkeypatch):
    """Stopped in a validation, which the resumed run makes up for, at a step whose losses were sent."""
    out = tmp_path / "run"
    original = training_run.validate

    def validate(*options):
        signal.raise_signal(signal.SIGTERM)
        return original(*options)

    monkeypatch.setattr(training_run, "validate", validate)
    assert train(data, out, "--log", name) == 0
    assert service.ends == [{"wandb": "FINISHED", "mlflow": "KILLED"}[name]]
    monkeypatch.setattr(training_run, "validate", original)
    assert main(["--resume", str(out), "--log", name]) == 0
    assert [start["id"] for start in service.starts][1] == "run1"
    assert service.steps("train/loss") == [2, 4, 6, 8, 10]
    assert service.steps("valid/elbo") == [4, 8, 10]
    assert len(service.pictures) == 3
    assert main(["--resume", str(out), "--log", name]) == 0  # finished: nothing is sent twice
    assert service.steps("valid/elbo") == [4, 8, 10]


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.slow
def test_a_killed_run_sends_no_step_twice(data, tmp_path, name, service, monkeypatch):
    """Steps after the last checkpoint were sent already, and are trained again."""
    out = tmp_path / "run"
    original = training_step.TrainingStep.__call__

    def killed(self, images):
        original(self, images)
        if int(self.step) == 7:
            raise Killed

    monkeypatch.setattr(training_step.TrainingStep, "__call__", killed)
    with pytest.raises(Killed):
        train(data, out, "--log", name)
    assert service.steps("train/loss") == [2, 4, 6]
    monkeypatch.setattr(training_step.TrainingStep, "__call__", original)
    assert main(["--resume", str(out), "--log", name]) == 0
    assert service.steps("train/loss") == [2, 4, 6, 8, 10]
    assert service.steps("valid/elbo") == [4, 8, 10]
    assert [start["id"] for start in service.starts][1] == "run1"


@pytest.mark.slow
def test_a_run_that_was_not_sent_is_sent_from_its_checkpoint(data, tmp_path, name, service, monkeypatch):
    out = tmp_path / "run"
    assert train(data, out) == 0
    assert main(["--resume", str(out), "--max-steps", "14", "--log", name]) == 0
    assert service.steps("train/loss") == [12, 14]


# --- The packages themselves ------------------------------------------------------------------------------
def installed(name):
    return pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed")


@installed("wandb")
@pytest.mark.slow
def test_wandb_offline_before_and_after_a_resume(data, tmp_path, monkeypatch):
    """wandb's own records of both parts belong to one run, and hold each step once."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    assert train(data, out, "--log", "wandb", "--max-steps", "4") == 0
    assert main(["--resume", str(out), "--max-steps", "8", "--log", "wandb"]) == 0
    run_id = (out / "wandb_id.txt").read_text().strip()
    parts = sorted(out.glob(f"wandb/offline-run-*/run-{run_id}.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(parts) == 2
    rows = [row for part in parts for row in history(part)]
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    losses = {r["step"]: r["loss"] for r in lines if r["split"] == "train"}
    found = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert found == [(step, pytest.approx(loss)) for step, loss in losses.items()]
    assert [row["step"] for row in rows if "valid/mse" in row] == [4, 8]
    assert len(list(parts[1].parent.glob("files/media/images/*.png"))) == 3


def history(path):
    """The rows in wandb's record of a run: LevelDB's log format, after a header of 7 bytes."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, place, joined, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        joined += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = records.Record()
            record.ParseFromString(joined)
            items, joined = record.history.item, b""
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return rows


@installed("mlflow")
@pytest.mark.slow
def test_mlflow_in_a_local_store(images, tmp_path, monkeypatch):
    mlflow = importlib.import_module("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    out = tmp_path / "run"
    fitted = fit(images, out=out, callbacks=[MlflowTracker()], checkpoint_every=3, **FIT)
    client, run_id = mlflow.MlflowClient(), (out / "mlflow_id.txt").read_text().strip()
    losses = {r["step"]: r["loss"] for r in fitted.history if r["split"] == "train"}
    curve = client.get_metric_history(run_id, "train/loss")
    assert {point.step: point.value for point in curve} == pytest.approx(losses)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.params["training.batch_size"] == "8"
    assert len(client.list_artifacts(run_id)) == 3


@pytest.mark.parametrize(
    ("package", "function", "options"),
    [
        ("wandb", "init", "project name dir reinit id resume config allow_val_change"),
        ("mlflow", "start_run", "run_id run_name"),
        ("mlflow", "log_metrics", "metrics step synchronous"),
    ],
)
def test_the_stubs_take_what_the_packages_take(package, function, options):
    module = pytest.importorskip(package)
    inspect.signature(getattr(module, function)).bind(**dict.fromkeys(options.split()))
