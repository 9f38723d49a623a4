"""`bvae.fit`: what it takes, that it is the command's run, callbacks, and bad input."""

import json
import signal
import threading

import numpy as np
import pytest
import torch
from pictures import write_folder
from PIL import Image
from tiny import FIT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bvae import BetaLoss, BetaVAE, LossTerms, fit, register_architecture
from bvae.architectures import Network
from bvae.config import Config, read
from bvae.errors import UsageError
from bvae.kernels import launch
from bvae.pipelines.arrays import collect
from bvae.train import main

SIDE, N = 32, 40


@pytest.fixture(scope="module")
def images():
    """uint8 [N, SIDE, SIDE, 3]: a few colours, so that a few steps learn something."""
    colours = torch.randint(256, (N, 1, 1, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return colours.expand(N, SIDE, SIDE, 3).contiguous()


def losses(fitted):
    return [record["loss"] for record in fitted.history if record["split"] == "train"]


# ---- images ------------------------------------------------------------------------------------------------
def test_the_same_images_in_any_form_are_the_same_run(images):
    datasets = pytest.importorskip("datasets")
    pil = [Image.fromarray(image) for image in images.numpy()]
    forms = {
        "array": images.numpy(),
        "channels first": images.permute(0, 3, 1, 2),
        "float": images / 255,
        "Dataset of (image, label)": TensorDataset(images.permute(0, 3, 1, 2), torch.arange(N)),
        "list of PIL images": pil,
        "Hugging Face": datasets.Dataset.from_dict({"label": list(range(N)), "image": pil}),
    }
    expected = fit(images, **FIT)
    assert len(losses(expected)) == 3
    for name, form in forms.items():
        found = fit(form, **FIT)
        assert losses(found) == losses(expected), name
        assert found.validation == expected.validation, name


def test_a_folder_is_the_commands_run(tmp_path):
    write_folder(tmp_path / "images", 30)
    options = {**FIT, "image_size": SIDE, "cache_dir": str(tmp_path / "cache"), "decoder": "torchvision"}
    fitted = fit(tmp_path / "images", "small", out=tmp_path / "a", **options)
    argv = [
        "--data",
        "folder",
        "--data-root",
        tmp_path / "images",
        "--out",
        tmp_path / "b",
        "--config",
        "small",
    ]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    assert main(list(map(str, argv))) == 0
    for name in ("config.json", "model.safetensors", "traversals.gif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    records = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert losses(fitted) == [record["loss"] for record in records if record["split"] == "train"]
    assert read(tmp_path / "a" / "config.yaml")[0] == read(tmp_path / "b" / "config.yaml")[0]


def test_every_tenth_image_validates_unless_others_are_given(images):
    seen = []

    class Loss(BetaLoss):
        def forward(self, recon, target, kl):
            if not self.training:
                seen.append(target)
            return super().forward(recon, target, kl)

    fit(images, loss=Loss(kl_weight=1.0, activation="tanh"), **FIT)
    assert torch.equal(torch.cat(seen), images[::10].permute(0, 3, 1, 2))
    seen.clear()
    fit(images, valid=images[:3], loss=Loss(kl_weight=1.0, activation="tanh"), **FIT)
    assert torch.equal(torch.cat(seen), images[:3].permute(0, 3, 1, 2))


def test_sizes_and_channels():
    grey = torch.randint(256, (N, 28, 28), dtype=torch.uint8)
    fitted = fit(grey, image_size=32, **FIT)
    assert fitted.model.input_shape == (1, 32, 32)
    assert fitted.config.data.channels == 1
    assert fit(torch.rand(N, 40, 50, 3), **FIT).model.input_shape == (3, 64, 64)  # no squares
    assert fit(torch.rand(N, 3, 48, 48), **FIT).model.input_shape == (3, 48, 48)
    assert fit(torch.rand(N, 3, 48, 48), channels=1, image_size=32, **FIT).model.input_shape == (1, 32, 32)


def test_resizing_is_that_of_files(tmp_path):
    from bvae.pipelines.picture import Picture
    from bvae.pipelines.torch_decode import decode_bytes

    (path,) = write_folder(tmp_path, 1, size=(60, 50)).iterdir()
    expected = decode_bytes(path.read_bytes(), Picture(None, 32, 3))
    with Image.open(path) as image:
        assert (collect([image], 32)[0].int() - expected.int()).abs().max() <= 2  # two JPEG decoders


# ---- the run -----------------------------------------------------------------------------------------------
def test_nothing_is_written_without_out(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(images, **FIT)
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_is_the_commands(images, tmp_path):
    fitted = fit(images, out=tmp_path / "run", **FIT)
    again = BetaVAE.from_pretrained(tmp_path / "run")
    assert torch.equal(again.head.weight, fitted.model.head.weight)
    assert not fitted.model.training
    assert {"traversals.gif", "metrics.jsonl", "config.yaml"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    with pytest.raises(UsageError, match="exists, and fit starts a new run: name another folder"):
        fit(images, out=tmp_path / "run", **FIT)


def test_switches_and_generators_are_put_back(images):
    def state():
        return (
            launch.ENABLED,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            signal.getsignal(signal.SIGINT),
            torch.get_rng_state().tolist(),
        )

    before = state()
    first = fit(images, fused=False, deterministic=True, **FIT)
    assert state() == before
    assert losses(fit(images, fused=False, deterministic=True, **FIT)) == losses(first)
    with pytest.raises(UsageError):
        fit(images, fused=False, batch_size=1, **{k: v for k, v in FIT.items() if k != "batch_size"})
    assert state() == before


def test_outside_the_main_thread(images):
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(images, **FIT)))
    thread.start()
    thread.join()
    assert losses(results[0]) == losses(fit(images, **FIT))


def test_a_configuration_and_a_preset(images):
    config = fit(images, **FIT).config
    again = fit(images, config, device="cpu")
    assert again.config == config
    assert fit(images, "celeba_b", **FIT).config.objective.gamma == 10
    assert fit(images, Config(), image_size=32, **FIT).config.objective.max_capacity == 25


def test_ctrl_c_returns_what_there_is(images, tmp_path):
    class Interrupt:
        def on_log(self, step, values):
            if step == 4:
                signal.raise_signal(signal.SIGINT)

    fitted = fit(images, out=tmp_path / "run", callbacks=[Interrupt()], **FIT)
    assert fitted.validation is None
    assert [path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    loaded = BetaVAE.from_pretrained(tmp_path / "run")  # stopped: from its checkpoint
    assert torch.equal(loaded.head.weight, fitted.model.head.weight)


# ---- own networks and losses -------------------------------------------------------------------------------
def linear(channels, size, latent_dim, widths):
    pixels = channels * size * size
    decoder = nn.Unflatten(1, (channels, size, size))
    head, back = nn.Linear(pixels, 2 * latent_dim), nn.Linear(latent_dim, pixels)
    return Network(nn.Flatten(), head, back, (pixels,), decoder)


def test_a_registered_network(images, tmp_path):
    register_architecture("test-linear", linear)
    register_architecture("test-linear", linear)  # its module was imported again
    with pytest.raises(UsageError, match="already registered"):
        register_architecture("burgess", linear)
    fitted = fit(images, arch="test-linear", out=tmp_path / "run", **FIT)
    assert len(list(fitted.model.parameters())) == 4
    again = BetaVAE.from_pretrained(tmp_path / "run")
    assert torch.equal(again.head.weight, fitted.model.head.weight)


def test_a_models_own_sizes_are_used(images):
    model = BetaVAE(1, 2, (4,), 32, "sigmoid")
    before = model.head.weight.detach().clone()
    fitted = fit(images, model=model, batch_size=8, max_steps=3, device="cpu")
    assert fitted.model is model
    assert not torch.equal(model.head.weight, before)
    assert fitted.config.objective.likelihood == "bernoulli"
    assert (fitted.config.data.channels, fitted.config.model.latent_dim) == (1, 2)


def test_a_loss_of_ones_own(images):
    class L1(nn.Module):
        def forward(self, raw, target, kl):
            recon = (torch.tanh(raw) - (target / 127.5 - 1)).abs().mean()
            return LossTerms(recon + 1e-3 * kl.mean(), recon, kl.mean(), torch.zeros(()))

    fitted = fit(images, loss=L1(), lr=1e-2, **{**FIT, "max_steps": 60, "log_every": 1})
    found = losses(fitted)
    assert found[-1] < 0.8 * found[0]
    record = fitted.history[0]
    assert record["loss"] == pytest.approx(record["recon"] + 1e-3 * record["kld"])
    assert "beta_norm" not in record
    assert 0 < fitted.validation.mse < 4


class Pair(nn.Module):
    """A loss that returns something else than LossTerms."""

    def forward(self, raw, target, kl):
        return raw.mean(), kl.mean()


# ---- callbacks ---------------------------------------------------------------------------------------------
class Recorder:
    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def on_log(self, step, values):
        self.calls.append(("log", step, values["loss"]))
        return step == self.stop_at

    def on_validation(self, step, validation):
        self.calls.append(("validation", step, validation.mse))

    def on_checkpoint(self, step, folder):
        self.calls.append(("checkpoint", step, folder))

    def on_end(self, validation):
        self.calls.append(("end", validation))


def test_callbacks_see_the_run(images):
    recorder = Recorder()
    fitted = fit(images, callbacks=[recorder], **FIT)
    found = [call[:2] for call in recorder.calls]
    assert found == [
        *(("log", 2), ("log", 4), ("log", 6)),
        *(("checkpoint", 6), ("validation", 6), ("end", fitted.validation)),
    ]
    assert [call[2] for call in recorder.calls[:3]] == losses(fitted)


def test_a_callback_stops_the_run_and_its_results_are_there(images, tmp_path):
    recorder = Recorder(stop_at=4)
    fitted = fit(images, callbacks=[recorder], out=tmp_path / "run", **FIT)
    found = [call[:2] for call in recorder.calls[-3:]]
    assert found == [("checkpoint", 4), ("validation", 4), ("end", fitted.validation)]
    assert fitted.validation.mse > 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000004.pt").is_file()
    assert (tmp_path / "run" / "traversals.gif").is_file()


def test_a_callback_of_a_validation_stops_the_run(images):
    class Enough:
        def on_validation(self, step, validation):
            return True

    fitted = fit(images, callbacks=[Enough()], checkpoint_every=3, **FIT)
    assert [record["step"] for record in fitted.history if record["split"] == "valid"] == [3]
    assert fitted.validation.mse == fitted.history[-1]["mse"]


def test_a_callbacks_exception_passes_and_the_steps_are_kept(images, tmp_path):
    class Broken:
        def on_log(self, step, values):
            raise KeyError("of the user's")

    with pytest.raises(KeyError, match="of the user's"):
        fit(images, callbacks=[Broken()], out=tmp_path / "run", **FIT)
    assert [path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    BetaVAE.from_pretrained(tmp_path / "run")
    fit(images, **FIT)  # nothing is left locked


def test_epochs_replace_the_steps_of_a_preset(images):
    options = {name: value for name, value in FIT.items() if name != "max_steps"}
    fitted = fit(images, "small", epochs=2, **options)
    assert fitted.config.training.max_steps is None
    assert fitted.history[-1]["step"] == 2 * 4  # 36 images in batches of 8


def test_a_loss_of_ours_learns_m_over_n_from_the_model(images):
    loss = BetaLoss(2.0, activation="tanh")
    fit(images, loss=loss, **FIT)
    assert loss.kl_weight == 3 / SIDE**2


def test_the_parameters_of_a_loss_are_trained(images):
    class Weighted(BetaLoss):
        def __init__(self):
            super().__init__(kl_weight=0.01, activation="tanh")
            self.log_variance = nn.Parameter(torch.zeros(()))

        def forward(self, recon, target, kl):
            terms = super().forward(recon, target, kl)
            loss = terms.loss * torch.exp(-self.log_variance) + self.log_variance
            return terms._replace(loss=loss)

    loss = Weighted()
    fit(images, loss=loss, lr=1e-2, **FIT)
    assert loss.log_variance != 0


# ---- bad input ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            torch.rand(9, 3, 32, 32) * 255,
            r"of floating point must lie in \[0, 1\].*divide them by 255",
        ),
        (torch.rand(9, 3, 32, 32) * 2 - 1, r"\(images \+ 1\) / 2"),
        (torch.full((9, 3, 32, 32), torch.nan), "not finite"),
        (torch.zeros(9, 3, 32, 32, dtype=torch.int64), "must be uint8, or floating point in .*got int64"),
        (torch.zeros(9, 4, 32, 32), r"C 1 \(grey\) or 3 \(RGB\).*got \[9, 4, 32, 32\]"),
        (torch.zeros(0, 3, 32, 32), "images holds no images"),
        ([], "images holds no images"),
        (
            [np.zeros((32, 32, 3), np.uint8), np.zeros((40, 40, 3), np.uint8)],
            "differ in size .*give image_size",
        ),
        ([{"label": 3}], r"images\[0\] has no column of images, only label"),
        ([3], r"images\[0\] must be an image \(PIL, array or tensor\), got int"),
        (torch.zeros(2, 3, 32, 32), "at least 3 are needed"),
        (torch.zeros(32, 32, 3), r"or \[N, H, W\], got \[32, 32, 3\]"),  # one image
        (DataLoader(torch.zeros(9, 3, 32, 32)), "must be a Dataset, not a DataLoader: give its .dataset"),
        ("no/such/folder", "no folder at no/such/folder"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_images_that_cannot_be_used(given, message):
    with pytest.raises(UsageError, match=message):
        fit(given, **FIT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"laten_dim": 4}, "unknown key 'laten_dim', did you mean 'latent_dim'?"),
        ({"latent_dim": "many"}, "model.latent_dim must be int, got 'many'"),
        ({"loss_type": "C"}, "Undefined loss type"),
        ({"lr": -1}, "training.lr must be positive"),
        ({"data_root": "x"}, "data_root: the images are given already"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"arch": "mine"}, "arch must be one of .*got 'mine'.*--import"),
        ({"model": nn.Linear(2, 2)}, "model must be a BetaVAE, got Linear.*register_architecture"),
        ({"image_size": 20}, "data.image_size must be 32 to 256"),
        ({"loss": BetaLoss(kl_weight=1.0)}, "loss must have likelihood='gaussian' and activation='tanh'"),
        ({"loss": print}, "loss must be a torch module that returns LossTerms"),
        ({"loss": Pair()}, r"the loss must return LossTerms\(loss, recon, kld, capacity\)"),
        ({"callbacks": [print]}, "must be an object with some of on_start, on_log, on_validation"),
        ({"callbacks": Recorder()}, r"callbacks must be a list of objects, got Recorder: give \[callback\]"),
        ({"callbacks": [Recorder]}, "must be an object with some of"),
        ({"out": "."}, "out: . exists, and fit starts a new run"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else next(iter(value)),
)
def test_options_that_cannot_be_used(images, options, message):
    with pytest.raises(UsageError, match=message):
        fit(images, **{**FIT, **options})


def test_fit_inside_fit(images):
    class Inner:
        def on_log(self, step, values):
            fit(images, **FIT)

    with pytest.raises(UsageError, match="fit is already running in this process"):
        fit(images, callbacks=[Inner()], **FIT)
