"""Command lines without tyro, and the nearest name for one that is not known. The standard library only."""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn


def nearest(word: str, known: Iterable[str]) -> str:
    """What to add to the message about an unknown word.

    >>> nearest("--imge-size", ["--image-size", "--crop"])
    ': did you mean --image-size?'
    >>> nearest("--quux", ["--image-size", "--crop"])
    ''
    """
    close = difflib.get_close_matches(word, known, 1)
    return f": did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors name the nearest option or choice. The description keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's, but nothing may be left over; the parser of a subcommand knows its options."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = re.findall(r"--[\w-]+", self.format_help())
            self.error(f"unknown {unknown[0]}{nearest(unknown[0], known)}")
        return options, []

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, and exit with status 2."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += nearest(choice[1], re.findall(r"[\w.-]+", choice[2]))
        super().error(message)
