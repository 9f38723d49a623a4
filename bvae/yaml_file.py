"""Read a YAML file: UTF-8 or UTF-16 text, a mapping in which no key is given twice."""

import codecs
from pathlib import Path
from typing import Any

import yaml

from bvae.errors import UsageError
from bvae.opening import CONFIG, read_bytes


def read_mapping(path: Path) -> dict[Any, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UsageError: text in another encoding, no YAML, no mapping, or a key given twice, with its line.
        NotRead: the file is too long or not regular; the message names it, as no other does.
        OSError: the file cannot be read.
    """
    return parse_mapping(_decode(read_bytes(path, CONFIG)))


def parse_mapping(text: str) -> dict[Any, Any]:
    """The mapping that YAML text holds. Raises UsageError, as `read_mapping`."""
    try:
        loaded = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UsageError(f"{place}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UsageError(" ".join(str(error).split())) from None
    except RecursionError:
        raise UsageError("nested too deeply for a configuration") from None
    except UsageError:
        raise
    except (ValueError, OverflowError) as error:  # a date that is none, or a number of thousands of digits
        raise UsageError(str(error)) from None
    if not isinstance(loaded, dict):
        raise UsageError("not a YAML mapping of sections")
    return loaded


def _decode(data: bytes) -> str:
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"line {line} is not UTF-8: save the file as UTF-8 text") from None
    if "\0" in text:
        raise UsageError("it holds NUL characters: save the file as UTF-8 text")
    return text


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which alone would let the last of two equal keys win."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    raise UsageError(
                        f"line {line}: '{key.value}' is given twice, first in line {lines[name]}"
                    )
                lines[name] = line
        return node
