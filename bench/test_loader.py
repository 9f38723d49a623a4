"""How fast images come: decoded by a DataLoader of torchvision's, by DALI, and from the cache.

    python -m pytest bench/test_loader.py -s                what 2 CPU cores tell
    python -m pytest bench/test_loader.py -s -m gpu         what a GPU tells

Every contender does the same work on the same drawn faces, 178 x 218 JPEGs of 7 kB: decode, cut out 148
pixels, resize to 64, uint8 batches of 144. They take turns, and the ratios are medians over the turns. All
may use both cores; on cores that others use too, they measure how long they wait for each other.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
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
WARM_UP, TURNS = 3, 7  # DALI's buffers grow during its first epochs
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


def test_ratios_on_a_cpu(files: list[str]) -> None:
    dali = pytest.importorskip("bvae.pipelines.dali")
    loader = DataLoader(Files(files), BATCH, num_workers=2, persistent_workers=True)
    torchvision, dali_cpu = TorchDecoder(PICTURE), dali.DaliDecoder(PICTURE, CPU)
    cached = torch.cat([images for images, _ in torchvision.decode(batches(files))]).repeat(20, 1, 1, 1)
    resident = Resident(cached, BATCH, 0, train=True, flip=True)
    contenders: dict[str, Callable[[], int]] = {
        "DataLoader, 2 workers": lambda: sum(len(images) for images in loader),
        "torchvision, threads": lambda: sum(len(images) for images, _ in torchvision.decode(batches(files))),
        "DALI on the CPU": lambda: sum(len(images) for images, _ in dali_cpu.decode(batches(files))),
        "cached, shuffled, flipped": lambda: sum(len(images) for images, _ in resident.epoch(0)),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + TURNS):
        for name, epoch in contenders.items():
            measured = rate(epoch)
            if turn >= WARM_UP:
                rates[name].append(measured)
    base = rates["DataLoader, 2 workers"]
    ratios = {}
    print()
    for name, measured in rates.items():
        ratios[name] = statistics.median(a / b for a, b in zip(measured, base, strict=True))
        print(f"{name:26}{statistics.median(measured):10.0f} images/s  {ratios[name]:6.1f} x")
    assert ratios["DALI on the CPU"] >= 1.5
    assert ratios["cached, shuffled, flipped"] >= 50


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
