"""How fast images come: decoded by a DataLoader of torchvision's, by DALI, and from the cache.

    python -m pytest bench/test_loader.py -s                what 2 CPU cores tell
    python -m pytest bench/test_loader.py -s -m gpu         what a GPU tells

Every contender does the same work on the same drawn faces, 178 x 218 JPEGs of 7 kB: decode, cut out 148
pixels, resize to 64, uint8 batches of 144, from files that the system has in memory. They take turns, and
the fastest turn of each counts: all may use both cores, and what else runs there only ever adds to a time.
The CPU time per image, of the process and its workers, is told beside it, and depends far less on others.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from bvae.losses import BetaLoss
from bvae.model import BetaVAE
from bvae.pipelines import faces
from bvae.pipelines.picture import Picture
from bvae.pipelines.resident import Resident
from bvae.pipelines.torch_decode import TorchDecoder
from bvae.step import TrainingStep

N = 2016
BATCH = 144
WARM_UP, TURNS = 2, 7  # DALI's buffers grow during its first epochs
PICTURE = Picture(148, 64, 3)
CPU = torch.device("cpu")


class Files(Dataset):
    """What people write: PIL and torchvision's transforms."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.transform = v2.Compose([v2.CenterCrop(148), v2.Resize(64), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as image:
            return self.transform(image.convert("RGB"))


class FilesWithoutPil(Files):
    """What few write: torchvision's own decoder, and its transforms on tensors."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.transform = v2.Compose([v2.CenterCrop(148), v2.Resize(64)])

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(decode_image(self.files[i], ImageReadMode.RGB))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = faces.write(tmp_path_factory.mktemp("faces"), n=N, progress=False)
    return sorted(str(path) for path in Path(root, "img_align_celeba").iterdir())


def batches(files: Sequence[str]) -> list[Sequence[str]]:
    return [files[i : i + BATCH] for i in range(0, len(files), BATCH)]


def rate(epoch: Callable[[], int]) -> float:
    """Images a second."""
    start = time.perf_counter()
    images = epoch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


class Turn(NamedTuple):
    """What one epoch took, in seconds an image."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """Of this process and the DataLoaders' workers, which run on; Linux alone, as DALI."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user and kernel mode
    return total


def take(epoch: Callable[[], int]) -> Turn:
    cpu, wall = cpu_seconds(), time.perf_counter()
    images = epoch()
    wall = time.perf_counter() - wall
    return Turn(wall / images, (cpu_seconds() - cpu) / images)


def test_ratios_on_a_cpu(files: list[str]) -> None:
    dali = pytest.importorskip("bvae.pipelines.dali")
    loader, without_pil = (
        DataLoader(dataset(files), BATCH, num_workers=2, persistent_workers=True)
        for dataset in (Files, FilesWithoutPil)
    )
    torchvision, dali_cpu = TorchDecoder(PICTURE), dali.DaliDecoder(PICTURE, CPU)
    cached = torch.cat([images for images, _ in torchvision.decode(batches(files))]).repeat(20, 1, 1, 1)
    resident = Resident(cached, BATCH, 0, train=True, flip=True)

    def on_one_thread() -> int:
        """Where other programs hold a core, a thread on it makes the others wait after each operation."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return sum(len(images) for images, _ in resident.epoch(0))
        finally:
            torch.set_num_threads(threads)

    contenders: dict[str, Callable[[], int]] = {
        "DataLoader, 2 workers": lambda: sum(len(images) for images in loader),
        "the same without PIL": lambda: sum(len(images) for images in without_pil),
        "torchvision, threads": lambda: sum(len(images) for images, _ in torchvision.decode(batches(files))),
        "DALI on the CPU": lambda: sum(len(images) for images, _ in dali_cpu.decode(batches(files))),
        "cached, shuffled, flipped": lambda: sum(len(images) for images, _ in resident.epoch(0)),
        "the same on one thread": on_one_thread,
    }
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for number in range(WARM_UP + TURNS):
        for name, epoch in contenders.items():
            turn = take(epoch)
            if number >= WARM_UP:
                turns[name].append(turn)
    base = turns["DataLoader, 2 workers"]
    ratios = {}
    print(f"\n{'':26}{'images/s':>10}{'ratio':>9}{'CPU us/image':>15}{'ratio':>9}")
    for name, took in turns.items():
        wall, base_wall = (min(turn.wall for turn in each) for each in (took, base))
        # A worker's clock ticks in hundredths of a second: over all turns that is exact enough.
        cpu, base_cpu = (statistics.fmean(turn.cpu for turn in each) for each in (took, base))
        ratios[name] = base_wall / wall
        print(f"{name:26}{1 / wall:10.0f}{ratios[name]:7.1f} x{1e6 * cpu:15.1f}{base_cpu / cpu:7.1f} x")
    assert ratios["DALI on the CPU"] >= 1.5
    assert max(ratios["cached, shuffled, flipped"], ratios["the same on one thread"]) >= 50


@pytest.mark.gpu
def test_decoding_on_a_gpu(files: list[str]) -> None:
    """Which share the fixed-function decoder should have, and whether to decode whole images."""
    dali = pytest.importorskip("bvae.pipelines.dali")
    many = files * 10
    print()
    for roi in (True, False):
        for share in (0.0, 0.5, 0.65, 0.8, 0.9, 1.0):
            decoder = dali.DaliDecoder(PICTURE, torch.device("cuda"), roi=roi, hw_load=share)

            def epoch(decode: Callable = decoder.decode) -> int:
                return sum(len(images) for images, _ in decode(batches(many)))

            rates = [rate(epoch) for _ in range(3)]
            print(f"{'ROI' if roi else 'whole':6} hw_decoder_load {share:4}  {max(rates):10.0f} images/s")


@pytest.mark.gpu
def test_the_data_cost_the_step_nothing() -> None:
    """The step with images from the device takes at most 1% longer than the step on one constant batch."""
    device = torch.device("cuda")
    model = BetaVAE().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    loss = BetaLoss(1.0, kl_weight=1.0).to(device)
    step = TrainingStep(model, loss, optimizer, seed=0, dtype=torch.bfloat16, compile=True, history=50)
    images = torch.randint(256, (50 * BATCH, 64, 64, 3), dtype=torch.uint8, device=device)
    resident = Resident(images, BATCH, 0, train=True, flip=True)

    def with_data() -> int:
        for batch, _ in resident.epoch(0):
            step(batch)
        return len(images)

    def constant() -> int:
        for _ in range(len(resident)):
            step(images[:BATCH])
        return len(images)

    with_data(), constant()  # compiles
    ratios = [rate(constant) / rate(with_data) for _ in range(10)]
    print(f"\na step with data takes {statistics.median(ratios):.3f} of a step without")
    assert statistics.median(ratios) <= 1.01
