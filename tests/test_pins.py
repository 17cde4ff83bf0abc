"""One release of a tool is named in one place, or in two that agree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_pre_commit_runs_the_pinned_ruff():
    (pinned,) = re.findall(r"^ruff==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.M)
    assert re.findall(r"rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text()) == [pinned]


def test_nothing_is_pinned_twice():
    for path in ROOT.glob("requirements*.txt"):
        names = re.findall(r"^([\w.-]+)==", path.read_text(), re.M)
        assert sorted(set(names)) == sorted(names), path.name
