"""Arguments that many programs share are declared once, and no program has too many."""

import argparse
import ast

import pytest

from drllm.arguments import SHARED, HelpFormatter, add_shared
from tests.bad_input.programs import PROGRAMS
from tests.test_architecture import sources, tree_of

DECLARES_ITSELF = {
    "drllm.evaluation.lm_eval_command": "lm-eval's own arguments",
    "drllm.evaluation.eval_sh": "lm-eval's batch size, which may be auto",
    "experiments.paper_tables": "a folder of tables, not a JSON file",
    "experiments.paper_figures": "a folder of figures, not a JSON file",
    "experiments.ablations": "a folder of results, not a JSON file",
    "miniature.make": "pre-training, whose batch size changes the weights",
}
MOST_ARGUMENTS = 20
THE_PAPERS = ("data_generation.py", "train.py")  # whose arguments are the paper's and the authors'


def declared(module: str) -> set[str]:
    """The names of `SHARED` that a module declares by a call of its own."""
    calls = [node for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
    texts = {
        call.args[0].value
        for call in calls
        if ast.unparse(call.func).split(".")[-1] in ("add", "add_argument") and call.args
        if isinstance(call.args[0], ast.Constant)
    }
    return {name for name in SHARED if f"--{name}" in texts}


@pytest.mark.parametrize("module", sorted(sources()))
def test_shared_arguments_are_declared_in_one_place(module):
    assert module in DECLARES_ITSELF or declared(module) == set()


def test_exceptions_are_needed():
    assert {module for module in DECLARES_ITSELF if not declared(module)} <= {"drllm.evaluation.lm_eval_command"}


class Built(Exception):
    """Carries the parser that a program built."""


def parsers(program, monkeypatch) -> list[argparse.ArgumentParser]:
    """The parser of a program and those of its subcommands; nothing is run."""

    def stop(parser, *_arguments, **_options):
        raise Built(parser)

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    with pytest.raises(Built) as built:
        program([])
    parser = built.value.args[0]
    choices = [action.choices.values() for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(each for values in choices for each in values)]


@pytest.mark.parametrize("program", sorted(PROGRAMS.keys() - set(THE_PAPERS)))
def test_no_program_has_too_many_arguments(program, monkeypatch):
    for parser in parsers(PROGRAMS[program], monkeypatch):
        actions = [
            action
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        ]
        assert len(actions) <= MOST_ARGUMENTS


def test_defaults_are_named_once():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    add_shared(parser, "seed", 3)
    add_shared(parser, "model", says="the miniature")
    add_shared(parser, "unlike", "")
    parser.add_argument("--limit", type=int, default=5, help="questions per set")
    text = " ".join(parser.format_help().split())
    assert text.count("(default: 3)") == text.count("(default: the miniature)") == text.count("(default: 5)") == 1
    assert "test questions (default" not in text
    assert parser.parse_args([]).model is None
