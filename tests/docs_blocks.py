"""The fenced blocks of README and deploy/docs, and how each is tested.

A comment on the line before a fence says how, in the page's source:

    <!-- test: run -->             the blocks of a page are run in turn, in one folder, by bash
    <!-- test: policy -->          Python that is executed, the blocks of a page as one program
    <!-- test: run file -->        YAML that must be a whole run file
    <!-- test: run file keys -->   YAML of keys that a run file may have
    <!-- test: compare file -->    YAML that must be a whole comparison
    <!-- not run: REASON -->       commands that need what a test has not; their files must exist

Without a comment: each command of a `bash` block must be taken by the parser of the program that it
names; a `python` block must compile, its imports must be there, and so must what it uses of
`session`, `batch` and `trainer_client`; `yaml` must be YAML; `mermaid` and drawings are not looked
at. Whatever has none of these ways is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "deploy/docs").glob("*.md"))]
DEFAULT_WAYS = {
    "bash": "parsed",
    "python": "compiled",
    "yaml": "yaml",
    "ini": "text",
    "mermaid": "drawing",
    "": "drawing",
}
WAYS = {
    "bash": ("run", "not run"),
    "python": ("policy",),
    "yaml": ("run file", "run file keys", "compare file"),
}
_COMMENT = re.compile(r"<!-- (?:test: (?P<way>[a-z ]+)|not run: (?P<reason>.+)) -->$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    way: str
    reason: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, for a person."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Return the lines of a shell block, joined where they go on, without comments."""
        joined = re.sub(r"\\\n\s*", " ", self.text)
        lines = (re.sub(r"(^|\s)#\s.*$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """Return a page's blocks.

    Raises:
        ValueError: a block has no known way to be tested, or is not closed.
    """
    lines = (page.read_text() if text is None else text).splitlines()
    blocks = []
    start: int | None = None
    for index, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = index
            continue
        before = lines[start - 1] if start else ""
        way, reason = _way(lines[start].removeprefix("```"), before, f"{page.name}:{start + 1}")
        blocks.append(
            Block(
                page=page,
                line=start + 1,
                language=lines[start].removeprefix("```"),
                way=way,
                reason=reason,
                text="\n".join(lines[start + 1 : index]) + "\n",
            )
        )
        start = None
    if start is not None:
        raise ValueError(f"{page.name}:{start + 1}: the block is not closed")
    return blocks


def _way(language: str, before: str, place: str) -> tuple[str, str]:
    found = _COMMENT.match(before)
    if found is None:
        if before.startswith("<!--") or language not in DEFAULT_WAYS:
            raise ValueError(f"{place}: no known way to test ```{language} after {before!r}")
        return DEFAULT_WAYS[language], ""
    way = found["way"] or "not run"
    if way not in WAYS.get(language, ()):
        raise ValueError(f"{place}: {way!r} is no way to test ```{language}")
    return way, found["reason"] or ""


def all_blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [block for page in PAGES for block in blocks_of(page)]
