"""The contract of every data set: order, flips, batches and shares, wherever the images are."""

import pytest
import torch
from pictures import write_folder
from torch.overrides import TorchFunctionMode

from bvae.errors import UsageError
from bvae.pipelines.decoder import build
from bvae.pipelines.memory_loaders import DeviceLoader, HostLoader
from bvae.pipelines.picture import Picture
from bvae.pipelines.streaming_loader import StreamingLoader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return sorted(str(path) for path in write_folder(tmp_path_factory.mktemp("files"), 23).iterdir())


@pytest.fixture(scope="module")
def decoder():
    return build("torchvision", Picture(None, 32, 3), CPU)


@pytest.fixture(scope="module")
def images(files, decoder):
    return torch.cat([batch for batch, _ in decoder.decode([files])])


def resident(images=None, n=23, batch_size=5, seed=1, train=True, flip=True, **options):
    if images is None:
        images = torch.randint(256, (n, 4, 4, 3), dtype=torch.uint8)
    return DeviceLoader(images, batch_size, seed, train=train, flip=flip, **options)


def test_training_epoch_is_a_shuffled_pass_without_the_partial_batch():
    data = resident()
    batches = list(data.epoch(0))
    assert len(batches) == len(data) == 4
    indices = torch.cat([index for _, index in batches])
    assert len(indices.unique()) == 20
    assert not torch.equal(indices, indices.sort().values)
    for images, index in batches:
        original = data.images[index]
        flipped = (images == original.flip(2)).flatten(1).all(1)
        kept = (images == original).flatten(1).all(1)
        assert (flipped | kept).all()


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return torch.cat([index for _, index in resident(seed=seed).epoch(epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_half_of_the_images_are_flipped_anew_each_epoch():
    data = resident(n=2000, batch_size=2000)

    def flipped(epoch):
        ((images, index),) = data.epoch(epoch)
        mirrored = torch.empty(2000, dtype=torch.bool)
        mirrored[index] = (images == data.images[index].flip(2)).flatten(1).all(1)
        return mirrored

    first, second = flipped(0), flipped(1)
    assert 900 < first.sum() < 1100
    assert 900 < (first ^ second).sum() < 1100


def test_evaluation_keeps_order_and_the_last_batch():
    data = resident(train=False, flip=False)
    batches = list(data.epoch(0))
    assert [len(images) for images, _ in batches] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.images)


@pytest.mark.parametrize("kind", ["resident", "hosted", "streamed"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_one_contract_wherever_the_images_are(kind, train, files, decoder, images):
    options = {"train": train, "flip": train}
    data = {
        "resident": lambda: DeviceLoader(images, 5, 1, **options),
        "hosted": lambda: HostLoader(images, 5, 1, CPU, **options),
        "streamed": lambda: StreamingLoader(files, decoder, 5, 1, CPU, **options),
    }[kind]()
    expected = list(resident(images, train=train, flip=train).epoch(3))
    for start in (0, 2):
        found = list(data.epoch(3, start))
        assert len(found) == len(data) - start
        for (a, i), (b, j) in zip(expected[start:], found, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(i, j)
    assert torch.equal(data.head(7), images[:7])
    assert torch.equal(data.head(99), images)


@pytest.mark.parametrize("kind", ["hosted", "streamed"])
def test_an_epoch_may_be_left_in_the_middle(kind, files, decoder, images):
    data = (
        HostLoader(images, 2, 1, CPU, train=True, flip=True)
        if kind == "hosted"
        else StreamingLoader(files, decoder, 2, 1, CPU, train=True, flip=True)
    )
    for _ in range(3):
        epoch = data.epoch(0)
        next(epoch)
        epoch.close()
    assert len(list(data.epoch(0))) == 11


def test_streaming_names_the_file_that_cannot_be_decoded(files, decoder, tmp_path):
    page = tmp_path / "page.jpg"
    page.write_text("<html>")
    data = StreamingLoader([*files[:5], str(page)], decoder, 2, 0, CPU, train=False, flip=False)
    with pytest.raises(UsageError, match="page.jpg cannot be decoded: a web page .* bvae.data check"):
        list(data.epoch(0))


def test_flipping_the_cached_image_is_decoding_the_flipped_one(tmp_path):
    """Bit for bit, as crop and resizing are symmetric where the margins are even."""
    from pictures import smooth
    from PIL import Image, ImageOps

    smooth().save(tmp_path / "a.png")
    ImageOps.mirror(Image.open(tmp_path / "a.png")).save(tmp_path / "b.png")
    decoder = build("torchvision", Picture(148, 64, 3), CPU)
    ((images, _),) = decoder.decode([[str(tmp_path / "a.png"), str(tmp_path / "b.png")]])
    assert torch.equal(images[0].flip(1), images[1])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_see_every_image_once(world_size):
    """In training up to the last batch of all ranks together, which is dropped as one rank drops its own."""
    images = torch.randint(256, (103, 2, 2, 3), dtype=torch.uint8)

    def indices(train, epoch):
        ranks = [
            resident(images, batch_size=8 // world_size, train=train, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        return [[index for _, index in rank.epoch(epoch)] for rank in ranks]

    for epoch in (0, 1):
        ranks = indices(True, epoch)
        assert [len(rank) for rank in ranks] == [12] * world_size
        seen = torch.cat([index for rank in ranks for index in rank])
        assert len(seen) == len(seen.unique()) == 96
        together = [torch.cat([rank[step] for rank in ranks]) for step in range(12)]
        alone = [index for _, index in resident(images, batch_size=8).epoch(epoch)]
        assert torch.equal(torch.cat(together), torch.cat(alone))
    everything = torch.cat([index for rank in indices(False, 0) for index in rank])
    assert torch.equal(everything.sort().values, torch.arange(103))


def test_ranks_start_in_the_middle_too():
    images = torch.randint(256, (40, 2, 2, 3), dtype=torch.uint8)
    data = resident(images, batch_size=4, rank=1, world_size=2)
    for (_, a), (_, b) in zip(list(data.epoch(0))[2:], data.epoch(0, start=2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["resident", "hosted"])
def test_on_a_gpu_the_batches_are_those_of_the_cpu(kind):
    images = torch.randint(256, (1003, 64, 64, 3), dtype=torch.uint8)
    device = torch.device("cuda")
    options = {"train": True, "flip": True}
    data = (
        DeviceLoader(images.to(device), 16, 5, **options)
        if kind == "resident"
        else HostLoader(images, 16, 5, device, **options)
    )
    for epoch in range(3):
        for (a, i), (b, j) in zip(
            resident(images, batch_size=16, seed=5).epoch(epoch), data.epoch(epoch), strict=True
        ):
            assert b.device.type == "cuda"
            assert torch.equal(a, b.cpu())
            assert torch.equal(i, j.cpu())
            b.zero_()  # its memory is free again: a copy into it must not be early


class NoCopies(TorchFunctionMode):
    """Fails where Python makes a tensor of its own numbers: on a GPU a copy that the host waits for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function is not torch.tensor, "a copy to the device makes the host wait"
        return function(*args, **(kwargs or {}))


def test_an_epoch_is_planned_on_the_device():
    data = resident(seed=2**62 + 5)
    with NoCopies():
        data.begin(3)
    with pytest.raises(AssertionError, match="makes the host wait"), NoCopies():
        torch.tensor([1, 2])
