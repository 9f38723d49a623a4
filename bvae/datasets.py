"""From a configuration to the two data sets of a run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bvae.config import SHAPES, DataConfig
from bvae.pipelines import cache, celeba, decoder, dsprites, faces, folder, sprites
from bvae.pipelines.loader import Loader
from bvae.pipelines.memory_loaders import place
from bvae.pipelines.packed_loader import PackedLoader
from bvae.pipelines.picture import Picture
from bvae.pipelines.streaming_loader import StreamingLoader, glance
from bvae.pipelines.webdataset import ImageFile

DRAWN = 12_000  # faces in the data set that ships
DRAWN_ROOT = Path("data/faces")
CELEBA_CROP = 148  # PyTorch-VAE's
LABELS = ("training images", "validation images")
VALIDATED = 10_000  # of the 2D shapes, all of which are trained on
SHOWN = 10  # bad files named on the screen


class Data(NamedTuple):
    """What a run reads."""

    train: Loader
    valid: Loader
    bad: list[cache.Bad]  # files that it does without
    files: list[str]  # of the training images, in the order of their indices; none where they are drawn


class Source(NamedTuple):
    """A data set on disk."""

    root: Path
    train: Sequence[ImageFile]
    valid: Sequence[ImageFile]
    picture: Picture


def open_data(
    config: DataConfig, batch_size: int, seed: int, device: torch.device, rank: int = 0, world_size: int = 1
) -> Data:
    """The training and the validation images, ready to be read in batches by one of `world_size` processes.

    Raises:
        FileNotFoundError, ValueError: no such data, damaged images, or fewer images than a batch.
        OSError: the cache cannot be written.
    """
    if config.name in SHAPES:
        return _open_shapes(config, batch_size, seed, device, rank, world_size)
    source = find(config)
    _check_enough(source.root, len(source.train), len(source.valid), batch_size, world_size)
    sharding = {"rank": rank, "world_size": world_size}
    uses = (
        {"train": True, "flip": config.flip, **sharding},
        {"train": False, "flip": False, **sharding},
    )
    opened: Iterator[_Streamed | cache.Cached] = (
        _stream(config, source, device) if config.stream else ingest(config, source, device, rank, world_size)
    )
    bad: list[cache.Bad] = []
    sets: list[Loader] = []
    data: Loader
    for label, use, found in zip(LABELS, uses, opened, strict=True):
        bad += found.bad
        if isinstance(found, cache.Cached):
            data, line = place(found.images, batch_size, seed, device, **use)
        else:
            data = StreamingLoader(found.files, found.reader, batch_size, seed, device, **use)
            line = f"{len(found.files)}, decoded with {found.reader.version} whenever they are used"
        sets.append(data)
        print(f"{label}: {line}", flush=True)
    if bad:
        total = len(source.train) + len(source.valid)
        if config.on_bad == "stop" or len(bad) == total:
            raise ValueError(complaint(bad, total))
        print(f"{len(bad)} of {total} images cannot be used: training without them")
        _check_enough(source.root, sets[0].count, sets[1].count, batch_size, world_size)
    without = {file for file, _ in bad}
    return Data(sets[0], sets[1], bad, [name for name in map(str, source.train) if name not in without])


def _open_shapes(
    config: DataConfig, batch_size: int, seed: int, device: torch.device, rank: int, world_size: int
) -> Data:
    """All shapes to train on, as disentanglement_lib does, and a fixed draw of them to look at."""
    packed = shapes(config, device)
    drawn = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))[:VALIDATED]
    _check_enough(config.root or config.name, len(packed), len(drawn), batch_size, world_size)
    sharding = {"rank": rank, "world_size": world_size}
    train = PackedLoader(packed, sprites.SIDE, batch_size, seed, train=True, **sharding)
    held = packed[drawn.to(device)]
    valid = PackedLoader(held, sprites.SIDE, batch_size, seed, train=False, **sharding)
    print(
        f"{LABELS[0]}: {train.count}, {packed.nbytes / 1e6:.0f} MB of one bit a pixel; "
        f"{LABELS[1]}: {valid.count} of them",
        flush=True,
    )
    return Data(train, valid, [], [])


def shapes(config: DataConfig, device: torch.device) -> Tensor:
    """The images of sprites or dsprites, one bit a pixel: uint8 [N, 512] on the device.

    Raises:
        FileNotFoundError, ValueError: no such data.
        OSError: what is drawn cannot be kept.
    """
    if config.name == "sprites":
        return sprites.whole(config.cache_dir or cache.default_folder(), device)
    if config.root is None:
        raise ValueError("--data dsprites needs --data-root, the dsprites_*.npz file")
    return dsprites.read(config.root).packed.to(device)


def _check_enough(root: Path | str, train: int, valid: int, batch_size: int, world_size: int) -> None:
    if train < batch_size * world_size:
        each = f" for each of {world_size} processes" if world_size > 1 else ""
        raise ValueError(f"{root} holds {train} training images, fewer than a batch of {batch_size}{each}")
    if not valid:
        raise ValueError(f"{root} holds no validation images that can be used")


def find(config: DataConfig) -> Source:
    """The image files of a configuration.

    The faces are drawn first if they are not there yet. Where a partial CelebA has no validation images,
    every tenth training image stands in for them.

    Raises:
        FileNotFoundError, ValueError: no such data.
    """
    root = config.root
    if root is None and config.name != "faces":
        raise ValueError(f"--data {config.name} needs --data-root, the folder that holds the images")
    if root is None:
        root = DRAWN_ROOT
        if not (root / "celeba").exists():  # the last thing that drawing makes
            print(f"drawing {DRAWN} faces into {root}, once", flush=True)
            faces.write(root, n=DRAWN, seed=0)
    splits = (folder if config.name == "folder" else celeba).splits(root)
    train: Sequence[ImageFile] = splits["train"]
    valid: Sequence[ImageFile] = splits["valid"]
    if not valid:
        print(f"{root} holds no validation images: every tenth training image is held out")
        train, valid = [f for i, f in enumerate(train) if i % 10], train[::10]
    crop = config.crop or (None if config.name == "folder" else CELEBA_CROP)
    return Source(root, train, valid, Picture(crop, config.image_size, config.channels))


def ingest(
    config: DataConfig, source: Source, device: torch.device, rank: int = 0, world_size: int = 1
) -> Iterator[cache.Cached]:
    """The caches of the training and the validation images; decoded now if they are not there."""
    name = decoder.choose(config.decoder)
    where = config.cache_dir or cache.default_folder()
    for files, label in zip((source.train, source.valid), LABELS, strict=True):
        request = cache.Request(source.root, files, source.picture, name)
        yield cache.obtain(
            request, where, lambda: _reader(config, source.picture, device), label, rank, world_size
        )


class _Streamed(NamedTuple):
    files: list[ImageFile]
    reader: decoder.Decoder
    bad: list[cache.Bad]


def _stream(config: DataConfig, source: Source, device: torch.device) -> Iterator[_Streamed]:
    reader = _reader(config, source.picture, device)
    for files, label in zip((source.train, source.valid), LABELS, strict=True):
        bad = glance(files, f"{label}, a look at each")
        good = [file for i, file in enumerate(files) if i not in bad]
        yield _Streamed(good, reader, [(str(files[i]), text) for i, text in bad.items()])


def complaint(bad: Sequence[cache.Bad], total: int) -> str:
    """What is wrong with which files, and what to do."""
    shown = "\n  ".join(f"{file}: {text}" for file, text in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    return (
        f"{len(bad)} of {total} images cannot be used:\n  {shown}{more}\n"
        "Mend or remove them, or train without them: --on-bad skip"
    )


def _reader(config: DataConfig, picture: Picture, device: torch.device) -> decoder.Decoder:
    name = decoder.choose(config.decoder)
    if name == "torchvision" and config.decoder == "auto":
        print("DALI is not installed, so torchvision decodes (pip install nvidia-dali-cuda130)", flush=True)
    return decoder.build(name, picture, device)
