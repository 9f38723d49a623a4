"""Open the training and validation images of a configuration."""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvae.config import CHANNELS, SHAPES, DataConfig
from bvae.errors import UsageError
from bvae.paths import expand
from bvae.pipelines import (
    cache,
    cars3d,
    celeba,
    decoder,
    dsprites,
    faces,
    folder,
    mpi3d,
    rooms,
    shapes3d,
    smallnorb,
    sprites,
)
from bvae.pipelines.cache_folder import default_folder
from bvae.pipelines.inventory import Inventory, masks
from bvae.pipelines.labelled import Labelled
from bvae.pipelines.loader import Loader
from bvae.pipelines.memory_loaders import choose_loader
from bvae.pipelines.packed_loader import PackedLoader, unpack
from bvae.pipelines.picture import Picture
from bvae.pipelines.streaming_loader import StreamingLoader, inspect_files
from bvae.pipelines.webdataset import ImageFile

DRAWN = 12_000  # faces in the default data set
DRAWN_ROOT = Path("data/faces")
LABELS = ("training images", "validation images")
VALIDATED = 10_000  # images with known factors used for validation; training uses all
SHOWN = 10  # bad files named on the screen


class Reader(NamedTuple):
    """Reads a user's own data set with known factors."""

    read: Callable[[Path], Labelled]
    what: str  # it reads


READERS = {
    "shapes3d": Reader(shapes3d.read, "the file 3dshapes.h5"),
    "mpi3d": Reader(mpi3d.read, "the file mpi3d_*.npz"),
    "cars3d": Reader(cars3d.read, "the folder of car_*_mesh.mat"),
    "smallnorb": Reader(smallnorb.read, "the folder of smallnorb-*.mat"),
}


class Data(NamedTuple):
    """The images of a run."""

    train: Loader
    valid: Loader
    bad: list[cache.Bad]  # files that are left out
    files: list[str]  # of the training images, in the order of their indices; empty if they are drawn
    pixels: str = ""  # a checksum of all images; empty if they are decoded again in each epoch
    decoder: str = ""  # which then decodes them, with its version


class Source(NamedTuple):
    """A data set on disk."""

    root: Path
    inventory: Inventory
    picture: Picture

    @property
    def train(self) -> Sequence[ImageFile]:
        return self.inventory.splits["train"]

    @property
    def valid(self) -> Sequence[ImageFile]:
        return self.inventory.splits["valid"]


def open_data(
    config: DataConfig,
    batch_size: int,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
) -> Data:
    """The training and the validation images, ready to be read in batches by one of `world_size` ranks.

    Args:
        batch_size: images per rank and step; fewer if the data hold fewer, a multiple of `accumulate`.

    Raises:
        UsageError: no such data, damaged images, or too few of them.
        OSError: the cache cannot be written.
    """
    ranks = {"rank": rank, "world_size": world_size}
    if config.name in CHANNELS:
        return _open_with_factors(config, batch_size, seed, device, accumulate, **ranks)
    source = find_files(config)
    print(*source.inventory.lines(source.root), sep="\n", flush=True)
    parts = batch_size, world_size, accumulate
    fitting_batch(source.root, len(source.train), len(source.valid), *parts)
    opened: Iterable[cache.Cached | _Streamed] = (
        _stream(config, source, device) if config.stream else ingest(config, source, device, **ranks)
    )
    train, valid = opened
    bad = [*train.bad, *valid.bad]
    total = len(source.train) + len(source.valid)
    if bad and (config.on_bad == "stop" or len(bad) == total):
        raise UsageError(bad_files_message(bad, total))
    if bad:
        print(f"{len(bad)} of {total} images cannot be used: training without them")
    batch_size = fitting_batch(source.root, _count(train), _count(valid), *parts)

    def loader(label: str, split: cache.Cached | _Streamed, train: bool) -> Loader:
        use = {"train": train, "flip": train and config.flip, **ranks}
        opened_loader: Loader
        if isinstance(split, cache.Cached):
            opened_loader, line = choose_loader(split.images, batch_size, seed, device, **use)
        else:
            opened_loader = StreamingLoader(split.files, split.reader, batch_size, seed, device, **use)
            line = f"{len(split.files)}, decoded with {split.reader.version} each time they are used"
        print(f"{label}: {line}", flush=True)
        return opened_loader

    loaders = loader(LABELS[0], train, True), loader(LABELS[1], valid, False)
    # A cache of another run may name them from another folder.
    bad_paths = {os.path.abspath(file) for file, _ in bad}
    names = [f for f in map(str, source.train) if os.path.abspath(f) not in bad_paths]
    if isinstance(train, _Streamed):
        return Data(*loaders, bad, names, decoder=train.reader.version)
    folders = [split.folder for split in (train, valid) if isinstance(split, cache.Cached)]
    return Data(*loaders, bad, names, _checksum(folders))


def _checksum(caches: Iterable[Path]) -> str:
    """One checksum of the pixels, from those in the caches' manifests."""
    manifests = [cache.read_manifest(folder) for folder in caches]
    text = json.dumps([[each[k] for k in ("count", "size", "channels", "checksums")] for each in manifests])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _count(split: "cache.Cached | _Streamed") -> int:
    return len(split.images) if isinstance(split, cache.Cached) else len(split.files)


def open_images(
    train: Tensor,
    valid: Tensor,
    config: DataConfig,
    batch_size: int,
    seed: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    accumulate: int = 1,
) -> Data:
    """As `open_data`, for images in memory: uint8 [N, H, W, C]."""
    batch_size = fitting_batch("images", len(train), len(valid), batch_size, world_size, accumulate)
    ranks = {"rank": rank, "world_size": world_size}
    train_loader, _ = choose_loader(train, batch_size, seed, device, train=True, flip=config.flip, **ranks)
    valid_loader, _ = choose_loader(valid, batch_size, seed, device, train=False, flip=False, **ranks)
    return Data(train_loader, valid_loader, [], [])


def fitting_batch(
    source: Path | str, train: int, valid: int, batch_size: int, world_size: int, accumulate: int
) -> int:
    """The images per rank and step: `batch_size`, or fewer if there are fewer training images.

    Args:
        train, valid: images in each split.
        accumulate: equal parts of a rank's batch, of 2 images or more each.

    Raises:
        UsageError: too few images.
    """
    parts = world_size * accumulate
    if train < 2 * parts:
        per_part = f" for each of {parts} parts of a batch" if parts > 1 else ""
        raise UsageError(f"{source} holds {train} training images: at least 2 are needed{per_part}")
    if not valid:
        raise UsageError(f"{source} holds no validation images that can be used")
    return min(batch_size, train // parts * accumulate)


def _open_with_factors(
    config: DataConfig, batch_size: int, seed: int, device: torch.device, accumulate: int, **ranks: Any
) -> Data:
    """Images with known factors: all for training, as in disentanglement_lib, some of them for validation."""
    loader: Callable[..., Loader]
    if config.name == "rooms":
        painter = rooms.Rooms(device)
        kept, stored = torch.arange(rooms.COUNT, device=device), painter.weights
        how, loader = "of weights of three colours", partial(rooms.RoomsLoader, rooms=painter)
    elif config.name in READERS:
        kept = stored = labelled(config.name, config.root).images

        def loader(images: Tensor, batch_size: int, seed: int, **options: Any) -> Loader:
            return choose_loader(images, batch_size, seed, device, flip=False, **options)[0]

        how = "of pixels"
    else:
        kept = stored = shapes(config, device)
        how, loader = "of one bit per pixel", partial(PackedLoader, side=sprites.SIDE)
    drawn = _validation_shapes(len(kept))
    batch_size = fitting_batch(
        config.root or config.name, len(kept), len(drawn), batch_size, ranks["world_size"], accumulate
    )
    train = loader(kept, batch_size=batch_size, seed=seed, train=True, **ranks)
    valid = loader(kept[drawn.to(kept.device)], batch_size=batch_size, seed=seed, train=False, **ranks)
    print(
        f"{LABELS[0]}: {train.count}, {stored.nbytes / 1e6:.0f} MB {how}; {LABELS[1]}: {valid.count} of them",
        flush=True,
    )
    return Data(train, valid, [], [], f"{zlib.crc32(stored.cpu().numpy().data):08x}")


def _validation_shapes(count: int) -> Tensor:
    """The indices of the validation images, the same in every run."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:VALIDATED]


def held_out(config: DataConfig, n: int) -> Tensor:
    """The first n validation images of a run, or fewer: uint8 [n, S, S, C] on the CPU. Decodes no others.

    Raises:
        UsageError: no such data, or not one of these images can be used.
    """
    cpu = torch.device("cpu")
    if config.name in SHAPES:
        packed = shapes(config, cpu)
        return unpack(packed[_validation_shapes(len(packed))[:n]], sprites.SIDE)
    if config.name == "rooms":
        return rooms.Rooms().paint(_validation_shapes(rooms.COUNT)[:n])
    if config.name in READERS:
        images = labelled(config.name, config.root).images
        return images[_validation_shapes(len(images))[:n]]
    source = find_files(config)
    reader = decoder.build("torchvision", source.picture, cpu)
    (decoded,) = reader.decode([source.valid[:n]])
    good = torch.tensor([i not in decoded.bad for i in range(len(decoded.images))])
    if not good.any():
        raise UsageError(f"{source.root} holds no validation images that can be used")
    return decoded.images[good]


def shapes(config: DataConfig, device: torch.device) -> Tensor:
    """The images of sprites or dsprites, one bit per pixel: uint8 [N, 512] on the device.

    Raises:
        FileNotFoundError, ValueError: no such data.
        OSError: the drawn images cannot be written to the cache folder.
    """
    if config.name == "sprites":
        return sprites.all_sprites(config.cache_dir or default_folder(), device)
    if config.root is None:
        raise UsageError("--data dsprites needs --data-root, the dsprites_*.npz file")
    return dsprites.read(config.root).packed.to(device)


def labelled(name: str, root: Path | None) -> Labelled:
    """A user's own data set with known factors, read into memory.

    Raises:
        FileNotFoundError, ValueError: no such data.
    """
    if root is None:
        raise UsageError(f"--data {name} needs --data-root, {READERS[name].what}")
    return READERS[name].read(root)


def find_files(config: DataConfig) -> Source:
    """The image files of a configuration.

    The faces are drawn first if they do not exist yet.

    Raises:
        FileNotFoundError, ValueError: no such data.
    """
    if config.name == "memory":
        raise UsageError("this run's images were passed to bvae.fit in Python: train it with bvae.fit")
    root = config.root and expand(config.root)
    if root is None and config.name != "faces":
        raise UsageError(f"--data {config.name} needs --data-root, the folder that holds the images")
    if root is None:
        root = DRAWN_ROOT
        if not (root / "celeba").exists():  # drawing makes it last
            print(f"drawing {DRAWN} faces into {root}, once", flush=True)
            faces.write_missing(root, DRAWN)
    found = inventory(config.name, root)
    crop = config.crop
    if crop is None and config.name != "folder":
        crop, notes = celeba.fitting_crop(found.splits["train"] or found.splits["test"])
        found = found._replace(notes=[*found.notes, *notes])
    return Source(root, found, Picture(crop, config.image_size, config.channels))


def inventory(name: str, root: Path) -> Inventory:
    """What a data set holds: the same for `bvae.data check`, `bvae.data ingest` and training.

    If there are no validation images, as in some partial copies of CelebA, every tenth training image is used
    for validation instead.

    Raises:
        FileNotFoundError, ValueError: no such data, or not one image that can be used.
    """
    if name == "folder":
        found = folder.inventory(root)
        files = [file for split in found.splits.values() for file in split]
        found = found._replace(notes=[*found.notes, *masks(files)])
    else:
        found = celeba.inventory(root)
    train = found.splits["train"]
    if found.splits["valid"] or not train:
        return found
    splits = {**found.splits, "train": [f for i, f in enumerate(train) if i % 10], "valid": train[::10]}
    note = "no validation images: every tenth training image is held out for validation"
    return found._replace(splits=splits, notes=[note, *found.notes])


def ingest(
    config: DataConfig, source: Source, device: torch.device, rank: int = 0, world_size: int = 1
) -> Iterator[cache.Cached]:
    """The caches of the training and the validation images; decoded now if they do not exist."""
    name = decoder.choose(config.decoder)
    cache_dir = expand(config.cache_dir or default_folder())
    for files, label in zip((source.train, source.valid), LABELS, strict=True):
        request = cache.Request(source.root, files, source.picture, name)
        yield cache.open_or_build(
            request, cache_dir, lambda: _reader(config, source.picture, device), label, rank, world_size
        )


class _Streamed(NamedTuple):
    files: list[ImageFile]
    reader: decoder.Decoder
    bad: list[cache.Bad]


def _stream(config: DataConfig, source: Source, device: torch.device) -> Iterator[_Streamed]:
    reader = _reader(config, source.picture, device)
    for files, label in zip((source.train, source.valid), LABELS, strict=True):
        bad = inspect_files(files, f"{label}, inspecting")
        good = [file for i, file in enumerate(files) if i not in bad]
        yield _Streamed(good, reader, [(str(files[i]), text) for i, text in bad.items()])


def bad_files_message(bad: Sequence[cache.Bad], total: int) -> str:
    """The bad files, what is wrong with each, and what to do."""
    shown = "\n  ".join(f"{file}: {text}" for file, text in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {total} images cannot be used:\n  {shown}{more}\n"
        "Repair or remove them, or train without them: --on-bad skip"
    )


def _reader(config: DataConfig, picture: Picture, device: torch.device) -> decoder.Decoder:
    name = decoder.choose(config.decoder)
    if name == "torchvision" and config.decoder == "auto":
        print("DALI is not installed, so torchvision decodes (pip install nvidia-dali-cuda130)", flush=True)
    return decoder.build(name, picture, device)
