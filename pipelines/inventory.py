"""What a data set on disk holds: the images of each split, and what is passed over.

`bvae.data check`, `bvae.data ingest` and training read the same inventory, so that they count the same.
"""

import contextlib
import io
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from bvae.opening import IMAGE, open_regular
from bvae.pipelines.passed_over import plural, shorten
from bvae.pipelines.picture import identify
from bvae.pipelines.webdataset import ImageFile, read

LOOKED_AT = 128  # files at most whose headers are read
SAMPLE = 64  # of a folder and suffix
START = 512  # bytes that tell the format
GREY = ("1", "L", "LA", "P", "I;16", "I")  # Pillow's modes of grey and palette images


Key = tuple[str, str]  # a folder, and a suffix of the files in it
Groups = Mapping[Key, Sequence[ImageFile]]


class Inventory(NamedTuple):
    """The images of a data set, and a line for each thing that the user should know about them."""

    layout: str
    splits: Mapping[str, Sequence[ImageFile]]
    notes: list[str]

    def lines(self, root: str | os.PathLike[str]) -> list[str]:
        """The layout and the counts, then the notes."""
        counts = ", ".join(f"{len(files)} {split}" for split, files in self.splits.items())
        return [f"{os.fspath(root)}: {self.layout}; {counts}", *(f"  {note}" for note in self.notes)]


class Look(NamedTuple):
    """What a file's header says."""

    mode: str  # Pillow's
    size: tuple[int, int]  # width and height

    @property
    def grey(self) -> bool:
        """Whether it is a grey or a palette image."""
        return self.mode in GREY

    def __str__(self) -> str:
        return f"{'grey or palette' if self.grey else 'colour'}, {self.size[0]} x {self.size[1]}"


Looks = Mapping[Key, Sequence[Look]]


def look(file: ImageFile) -> Look | None:
    """The header of an image file, of which no more is read; None if it cannot be read."""
    from PIL import Image  # takes a moment

    with contextlib.suppress(Exception), _open(file) as opened:
        kind = identify(opened.read(START))
        opened.seek(0)
        with Image.open(opened, formats=[kind]) as image:  # other kinds may run programs
            return Look(image.mode, image.size)
    return None


def _open(file: ImageFile) -> BinaryIO:
    return open_regular(file, IMAGE) if isinstance(file, str) else io.BytesIO(read(file))


def masks(files: Sequence[ImageFile]) -> list[str]:
    """A note if grey or palette images lie beside colour images of another size: they may be masks.

    Of each folder and suffix, a few files drawn at random stand for the others. In one folder, all masks must
    have one size and all photos another, because a folder may hold grey photos of any size.
    """
    groups: dict[Key, list[ImageFile]] = {}
    for file in files:
        name = str(file)
        groups.setdefault((name.rpartition(os.sep)[0], name[-4:].lower()), []).append(file)
    drawn = min(SAMPLE, max(1, LOOKED_AT // max(1, len(groups))))
    looks: dict[Key, list[Look]] = {}
    for key in [*groups][:LOOKED_AT]:
        group = groups[key]
        some = random.Random(0).sample(group, min(drawn, len(group)))  # masks may be every second file
        if found := [each for file in some if (each := look(file))]:
            looks[key] = found
    return [*_mixed(looks), *_beside(groups, looks)]


def _mixed(looks: Looks) -> Iterator[str]:
    """A note for each folder that holds photos and masks."""
    for (folder, _), found in looks.items():
        grey, colour = ([look for look in found if look.grey is wanted] for wanted in (True, False))
        if min(len(grey), len(colour)) < 2 or len({look.size for look in grey}) > 1:
            continue
        if len({look.size for look in colour}) == 1 and grey[0].size != colour[0].size:
            yield (
                f"{len(grey)} of {len(found)} images that were looked at in {folder} may be masks "
                f"({grey[0]}, beside {colour[0]}), and would be used as images"
            )


def _beside(groups: Groups, looks: Looks) -> list[str]:
    """A note if there are masks in other folders, or with another suffix, than photos."""
    first = {key: found[0] for key, found in looks.items()}
    colour = max((key for key in first if not first[key].grey), key=lambda k: len(groups[k]), default=None)
    if colour is None:
        return []
    odd = [
        key
        for key, found in looks.items()
        if all(look.grey for look in found) and found[0].size != first[colour].size
    ]
    if not odd:
        return []
    count = sum(len(groups[key]) for key in odd)
    return [
        f"{plural(count, 'image')} may be masks ({first[odd[0]]}, beside {first[colour]}), "
        f"and would be used as images: {shorten(dict.fromkeys(folder for folder, _ in odd))}"
    ]
