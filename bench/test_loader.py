"""Images per second: decoded by a DataLoader, by torchvision's threads, by DALI, and from the cache.

All do the same work on the same drawn faces, 178 x 218 JPEGs of 7 kB that the system has in memory: decode,
crop to 148 pixels, resize to 64, uint8 batches of 144; the cache shuffles and mirrors. All may use every
core. If other programs use the cores too, wall time includes waiting for them, so the CPU time per image, of
the process and its workers, is reported too.
"""

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from bench.contenders import Network, ours
from bench.race import Bar, clock
from bench.reference_loop import Files
from bvae.config import TrainingConfig
from bvae.pipelines import decoder, faces
from bvae.pipelines.decoder import cores
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.pipelines.picture import Picture
from bvae.pipelines.torch_decode import TorchDecoder

BATCH, N_BATCHES = 144, 14
PICTURE = Picture(148, 64, 3)
CPU = torch.device("cpu")
GPU = torch.cuda.is_available()
ROUNDS = 5
needs_dali = pytest.mark.skipif(decoder.choose("auto") != "dali", reason="DALI is not installed")

Epoch = Callable[[], Iterator[Tensor]]  # the batches of all files, in their order, uint8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = faces.write(tmp_path_factory.mktemp("faces"), n=BATCH * N_BATCHES, progress=False)
    return sorted(str(path) for path in Path(root, "img_align_celeba").iterdir())


def _batches(files: Sequence[str]) -> list[Sequence[str]]:
    return [files[i : i + BATCH] for i in range(0, len(files), BATCH)]


def _data_loader(files: Sequence[str]) -> Epoch:
    """The usual code: PIL and torchvision's transforms in worker processes, started once."""
    transform = v2.Compose([v2.CenterCrop(148), v2.Resize(64), v2.PILToTensor()])
    workers = cores()
    loader = DataLoader(Files(files, transform), BATCH, num_workers=workers, persistent_workers=True)
    return lambda: (images.permute(0, 2, 3, 1) for images in loader)


def _decoded(by: decoder.Decoder, files: Sequence[str]) -> Epoch:
    return lambda: (images for images, _ in by.decode(_batches(files)))


def _cache(images: Tensor) -> Epoch:
    """Endless epochs over a set larger than a processor's cache, N_BATCHES per call."""
    resident = DeviceLoader(images, BATCH, 0, train=True, flip=True)
    endless = (batch for epoch in itertools.count() for batch, _ in resident.epoch(epoch))
    return lambda: itertools.islice(endless, N_BATCHES)


def _consume(epoch: Epoch) -> None:
    assert sum(len(images) for images in epoch()) == BATCH * N_BATCHES


def _gate(epochs: dict[str, Epoch], device: torch.device) -> dict[str, float]:
    """Compare every decoder's images with the first one's; DALI's buffers grow during its first epochs."""
    first_calls = {}
    (name, reference), *others = epochs.items()
    first_calls[name] = clock(lambda: _consume(reference), device)
    expected = next(reference()).cpu().float()
    for name, epoch in others:
        first_calls[name] = clock(lambda e=epoch: _consume(e), device)
        _consume(epoch)
        difference = (next(epoch()).cpu().float() - expected).abs().mean().item()
        assert difference < 1.0, f"{name}'s pictures are {difference:.2f} of 255 off"
    return first_calls


def _cpu_seconds() -> float:
    """CPU time of this process and of the DataLoaders' running workers; on Linux only, as DALI."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user and kernel mode
    return total


class CpuTime:
    """A contender's call, and the CPU time of its calls so far."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch, self.spent = epoch, list[float]()

    def __call__(self) -> None:
        before = _cpu_seconds()
        _consume(self.epoch)
        self.spent.append(_cpu_seconds() - before)

    @property
    def us_per_image(self) -> float:
        """CPU time per image. A worker's clock has a resolution of 0.01 s: enough over several epochs."""
        return 1e6 * statistics.fmean(self.spent[-ROUNDS:]) / (BATCH * N_BATCHES)


def _race_with_cpu_time(race: Callable[..., Any], epochs: dict[str, Epoch], **options: Any) -> None:
    calls = {name: CpuTime(epoch) for name, epoch in epochs.items()}
    result = race("loader", prepare=lambda: calls, rounds=ROUNDS, images=BATCH * N_BATCHES, **options)
    if not GPU:  # on a GPU the race calls once more, to count launches
        result.facts["cpu_us_per_image"] = {name: call.us_per_image for name, call in calls.items()}


@needs_dali
@pytest.mark.skipif(GPU, reason="a CPU's figure has no place in a GPU's record")
def test_decoding_on_a_cpu(files: list[str], race: Callable[..., Any]) -> None:
    epochs = {
        "DataLoader": _data_loader(files),
        "torchvision, threads": _decoded(TorchDecoder(PICTURE), files),
        "ours": _decoded(decoder.build("dali", PICTURE, CPU), files),
    }
    _race_with_cpu_time(
        race,
        epochs,
        name="JPEGs on a CPU",
        gate=lambda: _gate(epochs, CPU),
        bars=[Bar("DALI on the CPU, over the DataLoader", "DataLoader", "ours", 1.5)],
        headline="Images from JPEGs, decoded on the CPU",
    )


def test_cache(files: list[str], device: torch.device, race: Callable[..., Any]) -> None:
    """From the second epoch on: nothing is decoded, and the decoded images are on the device."""
    images = torch.cat([images for images, _ in TorchDecoder(PICTURE).decode(_batches(files))])
    epochs = {"DataLoader": _data_loader(files), "ours": _cache(images.repeat(20, 1, 1, 1).to(device))}

    def gate() -> dict[str, float]:
        """Check that an image of a batch is one of the set, or its mirror image."""
        picture = next(epochs["ours"]())[0].cpu()
        matches = (images == picture).flatten(1).all(1) | (images == picture.flip(1)).flatten(1).all(1)
        assert matches.any(), "the cache returns an image that is not one of the decoded ones"
        return {name: clock(lambda e=epoch: _consume(e), device) for name, epoch in epochs.items()}

    _race_with_cpu_time(
        race,
        epochs,
        name="from the cache",
        gate=gate,
        bars=[Bar("a cached epoch, over the DataLoader", "DataLoader", "ours", 50.0)],
        headline="Images from the cache, shuffled and mirrored",
    )


@needs_dali
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_decoding_on_a_gpu(files: list[str], device: torch.device, race: Callable[..., Any]) -> None:
    """The best share for the fixed-function decoder, and whether to decode whole images."""
    from bvae.pipelines.dali import DaliDecoder

    epochs = {"DataLoader": _data_loader(files)}
    for roi, share in itertools.product((True, False), (0.0, 0.5, 0.8, 1.0)):
        decodes = DaliDecoder(PICTURE, device, roi=roi, hw_load=share)
        epochs[f"ours, {'ROI' if roi else 'whole'}, {share}"] = _decoded(decodes, files)
    epochs["ours"] = _decoded(DaliDecoder(PICTURE, device), files)
    race(
        "loader",
        "JPEGs on a GPU",
        gate=lambda: _gate(epochs, device),
        prepare=lambda: {name: lambda e=epoch: _consume(e) for name, epoch in epochs.items()},
        rounds=ROUNDS,
        images=BATCH * N_BATCHES,
        headline="Loading images, decoded by DALI on the GPU",
    )


@pytest.mark.skipif(not GPU, reason="on a CPU a step takes too long for its data to matter")
def test_data_beside_the_step(device: torch.device, race: Callable[..., Any], tmp_path: Path) -> None:
    """The step that gathers its images inside its graph, as in training, against one constant batch."""
    images = torch.randint(256, (50 * BATCH, 64, 64, 3), dtype=torch.uint8, device=device)
    training = TrainingConfig(amp=True)
    data = DeviceLoader(images, BATCH, 0, train=True, flip=True)
    constant = ours(Network(), images[:BATCH], tmp_path, training).step
    gathering = ours(Network(), data, tmp_path, training).step
    numbers = itertools.count(1)

    def with_data() -> None:
        gathering()
        epoch, position = divmod(next(numbers), len(data))
        if position == 0:
            data.begin(epoch)

    race(
        "loader",
        "a step's data from the device",
        gate=lambda: {"constant batch": clock(constant, device), "ours": clock(with_data, device)},
        prepare=lambda: {"constant batch": constant, "ours": with_data},
        bars=[Bar("a step with its data, of the rate on one constant batch", "constant batch", "ours", 0.99)],
        images=BATCH,
    )
