"""What `python -m bvae.data` does: check, decode, list and remove data sets, and draw faces."""

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch

from bvae import files
from bvae.config import Config, DataConfig
from bvae.datasets import bad_files_message, find_files, fitting_batch, ingest, inventory
from bvae.device import choose_device
from bvae.errors import UsageError
from bvae.pipelines import cache, celeba, decoder, faces, rooms, sprites
from bvae.pipelines.picture import Picture
from bvae.pipelines.webdataset import ImageFile
from bvae.plots import grid

ROOMS_SHOWN = 8  # per factor
CHECK_PICTURE = Picture(crop=None, size=32, channels=3)  # small: a check decodes, but uses no pixel


def check(options: argparse.Namespace) -> int:
    """Decode every file of a data set, and print the layout, the counts and the damaged files."""
    found = inventory("celeba" if celeba.is_at(options.dir) else "folder", options.dir)
    print(*found.lines(options.dir), sep="\n", flush=True)
    files = [file for split in found.splits.values() for file in split]
    if found.layout == celeba.LAYOUT:
        _print_crop(files)
    reader = decoder.build(decoder.choose(options.decoder), CHECK_PICTURE, torch.device("cpu"))
    bad = [entry for _, entries in cache.decode_all(files, reader, "images") for entry in entries]
    for file, text in bad:
        print(f"{file}: {text}")
    print(f"{len(files) - len(bad)} of {len(files)} images can be used")
    return _status(len(bad), len(files))


def _print_crop(files: Sequence[ImageFile]) -> None:
    """Print what training will do about images that are not of CelebA's size."""
    try:
        notes = celeba.fitting_crop(files)[1]
    except UsageError as error:
        notes = [str(error)]
    for note in notes:
        print(f"  {note}", flush=True)


def ingest_now(options: argparse.Namespace) -> int:
    """Decode a data set into the cache."""
    config = DataConfig(
        name=options.data or ("celeba" if celeba.is_at(options.dir) else "folder"),
        root=options.dir,
        crop=options.crop,
        image_size=options.image_size,
        channels=options.channels,
        decoder=options.decoder,
        cache_dir=options.cache_dir,
    )
    Config(data=config).check()
    source = find_files(config)
    print(*source.inventory.lines(source.root), sep="\n", flush=True)
    fitting_batch(source.root, len(source.train), len(source.valid), 2, 1, 1)  # as training requires
    bad = [file for entry in ingest(config, source, choose_device(options.device)) for file in entry.bad]
    total = len(source.train) + len(source.valid)
    if bad:
        print(f"error: {bad_files_message(bad, total)}", file=sys.stderr)
    return _status(len(bad), total)


def _status(bad: int, total: int) -> int:
    """The exit status: 2 if not one image can be used."""
    return 2 if bad == total else 1 if bad else 0


def ls(options: argparse.Namespace) -> int:
    """Print a line for each cache, and for what killed runs have left."""
    total = 0
    for entry in cache.entries(options.cache_dir):
        size = cache.size(entry)
        total += size
        modified = datetime.fromtimestamp(entry.lstat().st_mtime).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.name}  {modified}  {size / 1e6:8.1f} MB  {_content(entry)}")
    print(f"{total / 1e6:.1f} MB in {options.cache_dir}")
    return 0


def _content(entry: Path) -> str:
    """What an entry of the cache folder holds."""
    if entry.name == sprites.FILE:
        return "all sprites, one bit per pixel"
    if entry.suffix == cache.LOCK:
        return "a lock: in use, or left by a killed run"
    if not entry.is_dir():
        return "unfinished, or of another version"
    try:
        manifest = cache.read_manifest(entry)
    except (cache.Damaged, UsageError) as damage:
        return f"unfinished or damaged: {damage}"
    shape = " x ".join(str(manifest[name]) for name in ("count", "size", "size", "channels"))
    return f"{shape}, crop {manifest['crop']}, {manifest['decoder']}, {manifest['root']}"


def rm(options: argparse.Namespace) -> int:
    """Remove caches by their keys, or all."""
    if bool(options.key) == options.all:
        raise UsageError("name the caches to remove, as `ls` shows them, or give --all")
    entries = {entry.name: entry for entry in cache.entries(options.cache_dir)}
    for key in options.key:
        if key not in entries:
            raise UsageError(f"no cache {key} in {options.cache_dir}; `python -m bvae.data ls` lists them")
    left = 0
    for key in entries if options.all else options.key:
        try:
            cache.remove(entries[key])
            print(f"removed {entries[key]}")
        except (UsageError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            left += 1
    return 1 if left else 0


def draw_faces(options: argparse.Namespace) -> int:
    """Draw the default data set."""
    if options.n < 1:
        raise UsageError(f"--n must be positive, got {options.n}")
    target = faces.write(options.out, n=options.n, seed=options.seed)
    print(f"{options.n} faces in {target}; train on them: python -m bvae.train --data-root {options.out}")
    return 0


def draw_rooms(options: argparse.Namespace) -> int:
    """Draw a row for each factor of the rooms: other rooms, in which only this factor differs."""
    if options.out.suffix.lower() != ".png":
        raise UsageError(f"OUT must end in .png, got {options.out}")
    painter, generator = rooms.Rooms(), torch.Generator().manual_seed(options.seed)
    rows = []
    for factor, size in enumerate(rooms.SIZES):
        room = rooms.unravel(torch.randint(rooms.COUNT, (1,), generator=generator))
        indices = room.repeat(ROOMS_SHOWN, 1)
        indices[:, factor] = torch.linspace(0, size - 1, ROOMS_SHOWN).round()
        rows.append(painter.paint(rooms.ravel(indices)))
    files.make_folder(options.out.parent)
    files.write_image(options.out, grid(rows, [name.replace("_", " ") for name in rooms.FACTORS]))
    print(f"{options.out}; train on all {rooms.COUNT} rooms: python -m bvae.train --data rooms")
    return 0


TASKS = {
    **{"check": check, "ingest": ingest_now, "ls": ls, "rm": rm},
    **{"faces": draw_faces, "rooms": draw_rooms},
}
