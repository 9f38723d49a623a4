"""Paths as users write them: `~` and `$VAR` are expanded, URLs refused, and errors name a path's option."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from bvae.errors import UsageError

Options = TypeVar("Options")
Result = TypeVar("Result")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # Path makes one slash of two
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_FLAGS = {"root": "--data-root", "run": "RUN", "runs": "RUN", "dir": "DIR"}  # others: the field's name


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` and `$VAR` expanded.

    Raises:
        UsageError: a variable or a home folder that does not exist, a URL, or a NUL character.

    >>> expand("~/runs") == Path("~/runs").expanduser()
    True
    """
    text = os.fspath(path)
    if "\0" in text:
        raise UsageError(f"{text!r}: a path cannot hold a NUL character")
    expanded = os.path.expanduser(os.path.expandvars(text))
    unset = _VARIABLE.search(expanded)
    scheme = _SCHEME.match(text)
    if not (unset or scheme or expanded.startswith("~")) or os.path.lexists(text):
        return Path(expanded)
    if scheme:
        url = re.sub(":/+", "://", text, count=1)
        raise UsageError(f"{url}: {scheme[1]}:// is not read here: give a path on this machine")
    if unset:
        raise UsageError(f"{text}: the variable {unset[0]} is not set")
    raise UsageError(f"{text}: {expanded.split(os.sep)[0]} is no user's home folder: give the whole path")


def expand_options(options: Options) -> Options:
    """The same options, a dataclass or argparse's namespace, with every path in them expanded.

    Raises:
        UsageError: a path that cannot be expanded; the message names its option.
    """

    def expand_value(name: str, value: Any) -> Any:
        if isinstance(value, Path):
            try:
                return expand(value)
            except UsageError as error:
                raise UsageError(f"{_flag(name)} {error}") from None
        if isinstance(value, tuple):
            return tuple(expand_value(name, item) for item in value)
        return expand_options(value) if dataclasses.is_dataclass(value) else value

    changed: Any = {name: expand_value(name, value) for name, value in vars(options).items()}
    return type(options)(**changed)


def call(work: Callable[[Options], Result], options: Options) -> Result:
    """`work(options)` with the options' paths expanded; an OSError names the option of its path."""
    options = expand_options(options)
    try:
        return work(options)
    except OSError as error:
        name_option(error, options)
        raise


def name_option(error: OSError, options: Any) -> None:
    """Add the option that a path came from to the message of an OSError."""
    if isinstance(error.filename, str) and error.strerror and (option := option_of(error.filename, options)):
        error.strerror = f"{error.strerror} ({option})"


def option_of(path: str | Path, options: Any) -> str | None:
    """The option, of a dataclass or a namespace, whose path is this one or a folder above it."""
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value) and (option := option_of(path, value)):
            return option
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, Path) and Path(path).absolute().is_relative_to(each.absolute()):
                return _flag(name)
    return None


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
