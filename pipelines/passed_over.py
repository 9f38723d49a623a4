"""Which files are images by their names, and a count of those that are passed over."""

import os
from collections import Counter
from collections.abc import Iterable

SUFFIXES = (  # of the files that are read
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png"),
    *(".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
)
ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
SHOWN = 6  # kinds or names in a line


class PassedOver:
    """Counts what is found beside the images."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()  # by kind
        self.folders: dict[str, list[str]] = {}  # by the reason

    def add(self, name: str) -> None:
        """A file that is not read, counted by its suffix."""
        self.files["hidden" if name.startswith(".") else suffix(name) or "without a suffix"] += 1

    def add_folder(self, path: str, reason: str) -> None:
        """A folder that is not read."""
        self.folders.setdefault(reason, []).append(path)

    def notes(self) -> list[str]:
        """Short lines."""
        notes = []
        if self.files:
            counts = sorted(self.files.items(), key=lambda item: (-item[1], item[0]))
            kinds = [f"{n} {kind}" for kind, n in counts]
            notes.append(f"{plural(self.files.total(), 'file')} passed over: {shorten(kinds)}")
        if archives := [kind for kind in ARCHIVES if kind in self.files]:
            notes.append(f"{', '.join(archives)} files are not read: unpack them")
        for reason, paths in self.folders.items():
            notes.append(f"{plural(len(paths), 'folder')} passed over, {reason}: {shorten(sorted(paths))}")
        return notes


def suffix(name: str) -> str:
    """The suffix in lower case, with its dot; "" if there is none. That of x.tar.gz is .tar.gz."""
    name = name.lower()
    return next((end for end in ARCHIVES if name.endswith(end)), os.path.splitext(name)[1])


def plural(count: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def shorten(items: Iterable[str]) -> str:
    """The first items, and how many more there are."""
    shown = list(items)
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more
