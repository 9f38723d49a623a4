"""Decoded images on disk: written once and atomically, and verified each time they are opened.

<cache folder>/<key>/images.bin     uint8 [count, size, size, channels], row by row
<cache folder>/<key>/manifest.json  their shape, their checksums, and the files that could not be decoded
<cache folder>/<key>/files.txt      the files they come from: folder; name, bytes, time of change
<cache folder>/<key>.lock           held by the process that builds the cache, in <key>.unfinished

The key is a hash of files.txt, the picture and the decoder: a changed source, size or crop gives another key.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bvae import disk
from bvae.errors import FULL, MissingError, UsageError
from bvae.opening import ARCHIVE, TABLE, NotRead, open_regular, read_bytes
from bvae.owner import LOCK, lock, wait
from bvae.pipelines.decoder import BATCH, Decoder, cores
from bvae.pipelines.picture import Picture
from bvae.pipelines.webdataset import ImageFile

FORMAT = 2  # of the files and the rule for pixels; part of the key
KEY_BYTES = 10
UNFINISHED = ".unfinished"
_NAMES = re.compile(  # of what this package writes into the folder; .sprites-* were unfinished before
    rf"([0-9a-f]{{{2 * KEY_BYTES}}}|sprites-\d+\.bin)(\.unfinished|(\.[0-9a-f]+)?\.tmp|\.lock)?|\.sprites-\w+"
)
CHUNK = 1 << 25  # bytes under one checksum
MARGIN = 1.02  # of free disk space over the images' bytes

Bad = tuple[str, str]  # a file, and what is wrong with it


class Damaged(Exception):
    """A cache whose bytes differ from what was written."""


@dataclass(frozen=True)
class Request:
    """The identity of a cache: the files, the picture and the decoder."""

    root: Path
    files: Sequence[ImageFile]
    picture: Picture
    decoder: str

    @cached_property
    def listing(self) -> str:
        """The folder that all files are in, and a line for each file."""
        names = [str(file) for file in self.files]
        common = os.path.commonpath({os.path.dirname(name) for name in names}) if names else ""
        state: dict[str, str] = {}  # one entry per shard, not per member
        lines = [f"{os.path.abspath(common)}\n"]
        for file, name in zip(self.files, names, strict=True):
            path = file if isinstance(file, str) else file.shard
            if path not in state:
                try:
                    status = os.stat(path)
                    state[path] = f"{status.st_size}\t{status.st_mtime_ns}"
                except OSError:
                    state[path] = "missing"
            lines.append(f"{name[len(common) :].lstrip(os.sep)}\t{state[path]}\n")
        return "".join(lines)

    @cached_property
    def key(self) -> str:
        identity = {"format": FORMAT, "decoder": self.decoder, **asdict(self.picture)}
        text = json.dumps(identity, sort_keys=True) + "\n" + self.listing
        return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=KEY_BYTES).hexdigest()

    def share(self, rank: int, world_size: int) -> "Request":
        """The part of the files that one of `world_size` processes decodes."""
        n = len(self.files)
        return replace(self, files=self.files[rank * n // world_size : (rank + 1) * n // world_size])


class Cached(NamedTuple):
    """A cache that was verified."""

    images: Tensor  # uint8 [N, size, size, channels], mapped from disk, without the bad files
    bad: list[Bad]
    folder: Path


def open_or_build(
    request: Request,
    folder: Path,
    decoder: Callable[[], Decoder],
    label: str,
    rank: int = 0,
    world_size: int = 1,
) -> Cached:
    """Open the requested cache; build it if it is missing or damaged.

    If several processes want the same cache, one builds it and the others wait. With world_size > 1 each
    process first decodes its share, and one of them joins the shares.

    Args:
        decoder: makes the decoder; called only if needed, because DALI alone takes a second to load.
        label: the images' name in printed lines.

    Raises:
        OSError: the cache cannot be written; nothing of it remains.
    """
    entry = folder / request.key
    with contextlib.suppress(FileNotFoundError, Damaged):
        cached = _read_requested(entry, request)
        print(f"{label}: {len(cached.images)} from the cache {entry}{other_owner(entry)}", flush=True)
        return cached
    folder.mkdir(parents=True, exist_ok=True)
    own = request.share(rank, world_size)
    if world_size > 1:
        open_or_build(own, folder, decoder, f"{label}, share {rank + 1} of {world_size}")
    with wait(lock_of(entry), label):
        try:
            cached = _read_requested(entry, request)  # built while this process waited
            if world_size > 1:
                shutil.rmtree(
                    folder / own.key, ignore_errors=True
                )  # the process that joined the shares may have missed it
            return cached
        except FileNotFoundError:
            pass
        except Damaged as damage:
            print(f"{entry} is damaged ({damage}): decoding again", flush=True)
            _delete(entry)
        if world_size == 1:
            reader, n = decoder(), len(request.files)
            print(f"{label}: decoding {n} with {reader.version}, once, into {entry}", flush=True)
            return _write(entry, request, _decode(request, reader, label))
        parts = [request.share(r, world_size) for r in range(world_size)]
        shares = [open_or_build(part, folder, decoder, f"{label}, share") for part in parts]
        built = _write(entry, request, _join(shares))
        for share in shares:
            remove(share.folder)
        return built


def read(entry: Path) -> Cached:
    """Open a cache and verify every byte of its images.

    Raises:
        FileNotFoundError: there is none.
        Damaged: its bytes differ from what was written; the message says how.
    """
    manifest = read_manifest(entry)
    images = _map(entry, manifest)
    if _checksums(images) != manifest["checksums"]:
        raise Damaged("the checksum of images.bin is not the one that was written")
    return Cached(images, [(file, text) for file, text in manifest["bad"]], entry)


def _read_requested(entry: Path, request: Request) -> Cached:
    """`read`, and compare the number and the shape of the images with what was requested."""
    cached, picture = read(entry), request.picture
    shape = (len(request.files) - len(cached.bad), picture.size, picture.size, picture.channels)
    if cached.images.shape != shape:
        raise Damaged(f"its images are {list(cached.images.shape)} instead of {list(shape)}")
    return cached


def other_owner(entry: Path) -> str:
    """A note if another user wrote an entry, all of whose bytes agree with its checksums; else ""."""
    owner = entry.stat().st_uid
    if owner == 0 or owner == os.getuid():  # 0: the administrator, or Windows
        return ""
    return f", which user {owner} wrote: all its bytes agree with their checksums"


def read_manifest(entry: Path) -> dict[str, Any]:
    """A cache's manifest. Raises what `read` raises, for the manifest alone."""
    if not entry.is_dir():
        raise MissingError(f"no cache at {entry}")
    try:
        manifest = json.loads(read_bytes(entry / "manifest.json", TABLE))
        if not _is_manifest(manifest) or manifest.pop("checksum") != _digest(manifest):
            raise ValueError
    except FileNotFoundError:
        raise Damaged("manifest.json is missing") from None
    except (ValueError, RecursionError):
        raise Damaged("manifest.json is not what was written") from None
    return manifest


def _is_manifest(manifest: Any) -> bool:
    """Whether a manifest has every field that is read, with the right type."""
    kinds = {
        str: ("root", "decoder", "checksum"),
        int: ("count", "size", "channels"),
        list: ("bad", "checksums"),
    }
    return (
        isinstance(manifest, dict)
        and all(type(manifest.get(name)) is kind for kind, names in kinds.items() for name in names)
        and "crop" in manifest
        and manifest["count"] >= 0
        and min(manifest["size"], manifest["channels"]) > 0
        and all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in manifest["bad"])
    )


def entries(folder: Path) -> list[Path]:
    """What this package wrote into a cache folder, sorted: caches, and what killed processes left."""
    return sorted(path for path in folder.iterdir() if _NAMES.fullmatch(path.name)) if folder.is_dir() else []


def size(entry: Path) -> int:
    """The bytes of an entry."""
    files = entry.iterdir() if entry.is_dir() else [entry]
    return sum(file.lstat().st_size for file in files)


def remove(entry: Path) -> None:
    """Delete an entry, finished or not. A process that has it open can still read it.

    Raises:
        UsageError: another process is building it.
        OSError: it cannot be deleted.
    """

    def refuse(owner: str) -> None:
        raise UsageError(f"{entry} is in use by {owner}")

    known = _NAMES.fullmatch(entry.name)
    name = known[1] if known and known[1] else entry.name
    with lock(lock_of(entry.with_name(name)), refuse):  # removes the lock's file too
        _delete(entry)


def _delete(path: Path) -> None:
    """Delete a folder or a file; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def decode_all(
    files: Sequence[ImageFile], decoder: Decoder, label: str
) -> Iterator[tuple[Tensor, list[tuple[ImageFile, str]]]]:
    """Decode in batches, in order: yield the good files' images and the bad files. Shows a progress bar."""
    batches = [files[i : i + BATCH] for i in range(0, len(files), BATCH)]
    with tqdm(total=len(files), desc=label, unit=" images", disable=None) as bar:
        for batch, (images, bad) in zip(batches, decoder.decode(batches), strict=True):
            if bad:
                images = images[[i for i in range(len(batch)) if i not in bad]]
            yield images, [(batch[i], text) for i, text in sorted(bad.items())]
            bar.update(len(batch))


def _decode(request: Request, decoder: Decoder, label: str) -> Iterator[tuple[Tensor, list[Bad]]]:
    for images, bad in decode_all(request.files, decoder, label):
        yield images.cpu(), [(os.path.abspath(str(file)), text) for file, text in bad]


def _join(shares: Sequence[Cached]) -> Iterator[tuple[Tensor, list[Bad]]]:
    for share in shares:
        for images in share.images.split(4 * BATCH):
            yield images, []
        yield share.images[:0], share.bad


def _write(entry: Path, request: Request, parts: Iterator[tuple[Tensor, list[Bad]]]) -> Cached:
    """Write a cache under a temporary name, and rename it when it is complete and on the disk."""
    picture = request.picture
    needed = len(request.files) * picture.size**2 * picture.channels
    unfinished = entry.with_name(f"{entry.name}{UNFINISHED}")
    _delete(unfinished)  # this process holds the lock, so the process that wrote it has ended
    if needed * MARGIN > shutil.disk_usage(entry.parent).free:
        raise _full(errno.ENOSPC, needed, entry.parent)
    bad: list[Bad] = []
    count = 0
    try:
        unfinished.mkdir()
        with open(unfinished / "images.bin", "wb") as file:
            for images, bad_in_part in parts:
                file.write(images.contiguous().numpy().data)
                count += len(images)
                bad += bad_in_part
            _sync(file)
        with open(unfinished / "files.txt", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(request.listing)
            _sync(file)
        manifest = {
            "root": str(request.root),
            **asdict(picture),
            "decoder": request.decoder,
            "count": count,
            "files": len(request.files),
            "bad": bad,
        }
        images = _map(unfinished, manifest)
        manifest["checksums"] = _checksums(images)
        with open(unfinished / "manifest.json", "w", encoding="utf-8") as file:
            json.dump({**manifest, "checksum": _digest(manifest)}, file, indent=1)
            _sync(file)
        os.replace(unfinished, entry)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise _full(error.errno, needed, entry.parent) from None
        raise
    return Cached(images, bad, entry)


def _full(number: int, needed: int, folder: Path) -> OSError:
    """The error for a full disk."""
    return OSError(
        number,
        f"{os.strerror(number)}: the decoded images take {needed:,} bytes, and {disk.free(folder)}: "
        "make room, choose another disk with --cache-dir, or train from the files with --stream",
        str(folder),
    )


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _map(entry: Path, manifest: dict[str, Any]) -> Tensor:
    """The images, read from disk as they are used."""
    path = entry / "images.bin"
    shape = (manifest["count"], manifest["size"], manifest["size"], manifest["channels"])
    expected = math.prod(shape)
    try:
        with open_regular(path, ARCHIVE) as file:
            if (size := os.fstat(file.fileno()).st_size) != expected:
                raise Damaged(f"images.bin holds {size} bytes instead of {expected}")
            if not expected:
                return torch.empty(shape, dtype=torch.uint8)
            # Mode c (copy on write): torch warns about read-only memory, although nothing here writes.
            return torch.from_numpy(np.memmap(file, np.uint8, "c", shape=shape))
    except FileNotFoundError:
        raise Damaged("images.bin is missing") from None
    except NotRead as error:
        raise Damaged(f"images.bin is {error.strerror}") from None


def _checksums(images: Tensor) -> list[int]:
    flat = images.reshape(-1).numpy()
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(lambda at: zlib.crc32(flat[at : at + CHUNK].data), range(0, len(flat), CHUNK)))


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def lock_of(entry: Path) -> Path:
    """The file that is locked while an entry is built."""
    return entry.with_name(entry.name + LOCK)
