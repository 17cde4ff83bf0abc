"""Docstring entries and help texts say what a thing is: they begin with a noun or a verb, not with "of"."""

import argparse
import ast
import re
from collections.abc import Iterator

import pytest

from tests.bad_input.programs import PROGRAMS
from tests.drllm.test_arguments import parsers
from tests.test_architecture import is_program, sources, tree_of

PREPOSITIONS = ("of", "for", "in", "on", "at", "by", "from", "to", "with", "without", "along")
WITHOUT_PARSER = {"drllm.questions.math_server"}  # a helper process
SECTION = re.compile(r"\s*(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note|Notes):\s*$")
ENTRY = re.compile(r"\s*[*\w`]+(?:, [*\w`]+)*(?: \([^)]*\))?: (\w+)")


def begins_wrong(text: str) -> bool:
    return text.split(maxsplit=1)[0].lower() in PREPOSITIONS if text.strip() else False


def docstring_offenders(text: str) -> Iterator[str]:
    """A first line with "of", and entries; those of Raises say on which condition an error comes."""
    if text.split(maxsplit=1)[0].lower() == "of":
        yield text.strip().splitlines()[0]
    section = ""
    for line in text.splitlines():
        if named := SECTION.match(line):
            section = named[1]
        elif section in ("Args", "Attributes") and (entry := ENTRY.match(line)) and begins_wrong(entry[1]):
            yield line.strip()


def offenders(tree: ast.Module) -> Iterator[str]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield from docstring_offenders(text)


def test_offenders_are_found():
    source = '''
def read(path, seed):
    """Of a file.

    Args:
        path: of the file; a folder
            whose parts: of no interest
        seed: Seed of numpy.

    Raises:
        ValueError: for a path without a file.
    """
'''
    assert list(offenders(ast.parse(source))) == ["Of a file.", "path: of the file; a folder"]


@pytest.mark.parametrize("module", sorted(sources()))
def test_entries_begin_with_a_noun_or_a_verb(module):
    assert list(offenders(tree_of(module))) == []


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - {"drllm.evaluate"}))  # whose texts are lm-eval's
def test_help_texts_begin_with_a_noun_or_a_verb(program, monkeypatch):
    actions = [
        action
        for parser in parsers(PROGRAMS[program], monkeypatch)
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    ]
    texts = {action.dest: " ".join((action.help or "").split()) for action in actions}
    assert [name for name, text in texts.items() if not text] == [], "without a help text"
    assert [text for text in texts.values() if begins_wrong(text) or text.startswith("default:")] == []
    clauses = {name: re.split(r"; | \(", text) for name, text in texts.items()}
    assert {name: said for name, said in clauses.items() if len(set(said)) < len(said)} == {}, "said twice"


def test_every_program_is_in_the_table():
    named = {function.__module__ for function in PROGRAMS.values()}
    assert {module for module in sources() if is_program(module)} - named == WITHOUT_PARSER
