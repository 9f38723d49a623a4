"""What a data set on disk holds: the images of each split, and what is passed over.

`bvae.data check`, `bvae.data ingest` and training read the same inventory, so that they count the same.
"""

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bvae.pipelines.passed_over import plural, shorten
from bvae.pipelines.webdataset import ImageFile, read

LOOKED_AT = 100  # groups of files whose first header is read
GREY = ("1", "L", "LA", "P", "I;16", "I")  # Pillow's modes of grey and palette images


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


def look(file: ImageFile) -> Look | None:
    """The header of an image file; None if it cannot be read."""
    from PIL import Image  # takes a moment

    with contextlib.suppress(Exception), Image.open(io.BytesIO(read(file))) as image:
        return Look(image.mode, image.size)
    return None


def masks(files: Sequence[ImageFile]) -> list[str]:
    """A note if grey or palette images lie beside colour images of another size: they may be masks.

    The first file of each folder and suffix stands for the others.
    """
    groups: dict[tuple[str, str], list[ImageFile]] = {}
    for file in files:
        name = str(file)
        groups.setdefault((name.rpartition(os.sep)[0], name[-4:].lower()), []).append(file)
    if len(groups) == 1:
        return []
    looks = {key: found for key in [*groups][:LOOKED_AT] if (found := look(groups[key][0]))}
    colour = max((key for key in looks if not looks[key].grey), key=lambda k: len(groups[k]), default=None)
    if colour is None:
        return []
    odd = [key for key in looks if looks[key].grey and looks[key].size != looks[colour].size]
    if not odd:
        return []
    count = sum(len(groups[key]) for key in odd)
    return [
        f"{plural(count, 'image')} may be masks ({looks[odd[0]]}, beside {looks[colour]}), "
        f"and would be used as images: {shorten(dict.fromkeys(folder for folder, _ in odd))}"
    ]
