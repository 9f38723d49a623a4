"""README.md and docs/: their snippets and commands, for the tests that run them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# docs/evidence.md is the record of an experiment, whose commands take hours.
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "evidence.md")]
TEXT = "\n".join(page.read_text() for page in PAGES)
SNIPPETS = re.findall(r"(?:<!-- test: ([\w.-]+) -->\n)?```(python|yaml|text)\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = list(
    dict.fromkeys(
        line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
    )
)


def snippet(name: str) -> str:
    """The only code block that follows <!-- test: name -->."""
    (code,) = (code for marker, _, code in SNIPPETS if marker == name)
    return code
