"""Documents can be read: no sentence of a README, of docs/ or of results/ has more than 35 words."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_WORDS = 35


def documents() -> list[str]:
    """The README, docs/ and the pages of results/; what programs write there are tables with a README beside them."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = listed.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md")]
    return [
        path
        for path in sorted(paths)
        if (ROOT / path).is_file()
        and ("/" not in path or path.startswith("docs/") or re.match(r"results/.*(README|LOG)\.md", path))
    ]


def blocks(text: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each paragraph and list entry, without code, tables and headings."""
    lines = re.sub(r"^```.*?^```", lambda code: "\n" * code[0].count("\n"), text, flags=re.M | re.S).splitlines()
    found: list[tuple[int, str]] = []
    inside = False
    for number, line in enumerate([*lines, ""], start=1):
        is_entry = re.match(r"\s*([*-]|\d+\.)\s", line)
        is_table_or_code = re.match(r"\s*(\||#|!\[|\[!\[)|\s{4,}\S", line)
        if not line.strip() or (is_table_or_code and not (inside and line.startswith("  "))):
            inside = False
        elif is_entry or not inside:
            found.append((number, re.sub(r"^\s*([*-]|\d+\.)\s+", "", line)))
            inside = True
        elif not re.match(r"\s*\|", line):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    yield from found


def sentences(block: str) -> list[str]:
    """The sentences of a block; a piece of code, a link and an interval count as one word, or none."""
    block = re.sub(r"`[^`]*`", "CODE", block)
    block = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", block)
    block = re.sub(r"\[[-+0-9., %]*\]", "", block)  # an interval belongs to its number
    return re.split(r"(?<=[.!?])\*\*\s+|(?<=[.!?])[*)\"”]*\s+(?=[*(\"“]*[A-Z0-9])", block)


def words(sentence: str) -> int:
    return len(re.findall(r"[^\s]*[A-Za-z0-9][^\s]*", sentence))


def test_the_counter_counts():
    long = " ".join(["word"] * 36)
    skipped = f"# {long}\n\n| {long} |\n\n```\n{long}\n```\n\n    {long}\n\n"
    text = f"{skipped}* A `b c d` is 0.9 [+0.1, +1.8] here. Two\n  lines.\n"
    assert [[words(each) for each in sentences(block)] for _, block in blocks(text)] == [[5, 2]]
    assert [words(each) for _, block in blocks(f"{long}.\n") for each in sentences(block)] == [36]


@pytest.mark.parametrize("document", documents())
def test_no_sentence_is_long(document):
    too_long = [
        f"{document}:{number}: {words(sentence)} words: {sentence[:120]}"
        for number, block in blocks((ROOT / document).read_text())
        for sentence in sentences(block)
        if words(sentence) > MAX_WORDS
    ]
    assert too_long == []
