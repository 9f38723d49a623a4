"""What TensorBoard and metrics.jsonl show besides losses: pictures and memory."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import FIT

from bvae import BetaVAE, fit
from bvae.plots import progress_pictures, traverse
from bvae.training.monitor import peak_memory


@pytest.fixture(scope="module")
def images():
    """uint8 [40, 32, 32, 3]"""
    return torch.randint(256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def events(out):
    found = EventAccumulator(str(out), size_guidance={"images": 0})
    found.Reload()
    return found


def test_every_validation_shows_the_same_images_and_what_latents_do(images, tmp_path):
    fitted = fit(images, out=tmp_path / "run", checkpoint_every=3, **FIT)
    found = events(tmp_path / "run")
    assert set(found.Tags()["images"]) == {"valid/reconstructions", "valid/traversals"}
    first, last = found.Images("valid/reconstructions")
    assert (first.step, last.step) == (3, 6)
    before, after = (np.asarray(Image.open(io.BytesIO(each.encoded_image_string))) for each in (first, last))
    inputs = after[:32, -(4 * 32 + 3 * 2) :]  # four images are held out; 2 pixels between two
    assert np.array_equal(inputs[:, :32], images[0].numpy())
    assert np.array_equal(before[:32], after[:32])
    assert not np.array_equal(before[34:], after[34:])
    with torch.no_grad():
        again = fitted.model.reconstruct(fitted.model.scale(images[:1].permute(0, 3, 1, 2)))
    expected = ((again[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.abs(after[34:66, -134:-102] - expected).max() <= 1
    assert [each.step for each in found.Images("valid/traversals")] == [3, 6]


def test_the_latents_of_the_highest_kl_are_shown_and_the_model_keeps_its_mode():
    model = BetaVAE(1, 4, (4,), 32).train()
    x = torch.rand(3, 1, 32, 32)
    shown = np.asarray(progress_pictures(model, x, [0.1, 3.0, 0.0, 2.0], rows=2, steps=2)["traversals"])
    assert model.training
    model.eval()
    mu = model.encode(x)[0]
    walks = traverse(model, mu[mu.norm(dim=1).argmin()][None], [1, 3], torch.tensor([-3.0, 3.0]))
    for row, (low, high) in enumerate(walks[:, :, 0]):
        strip = shown[34 * row : 34 * row + 32]
        assert np.array_equal(strip[:, -66:-34], low)
        assert np.array_equal(strip[:, -32:], high)


def test_pictures_change_no_bit_of_the_run(images, tmp_path):
    options = {**FIT, "checkpoint_every": 2}
    shown, none = fit(images, out=tmp_path / "run", **options), fit(images, **options)
    assert shown.history == none.history
    assert torch.equal(shown.model.head.weight, none.model.head.weight)


def test_memory_and_throughput_are_in_the_log_and_reach_callbacks(images, tmp_path):
    seen = []

    class Watch:
        def on_log(self, step, values):
            seen.append(values)

    fit(images, out=tmp_path / "run", callbacks=[Watch()], **FIT)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    for record, values in zip(records, seen, strict=True):
        assert {name: record[name] for name in values} == values
        assert values["images_per_s"] > 0
        assert 0.05 < values["peak_memory_gib"] < 64
    curve = [each.value for each in events(tmp_path / "run").Scalars("train/peak_memory_gib")]
    assert curve == pytest.approx([values["peak_memory_gib"] for values in seen])


def test_peak_memory_of_a_process_is_the_systems():
    status = Path("/proc/self/status").read_text()
    high_water_mark = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024
    assert peak_memory(torch.device("cpu")) == pytest.approx(high_water_mark, rel=0.01)


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_is_that_of_its_tensors():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats()
    held = torch.empty(3 << 20, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= held.numel()
