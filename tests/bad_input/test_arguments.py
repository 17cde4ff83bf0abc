"""Wrong arguments of every program: exit status 2 and the sentence, and nothing is written."""

from pathlib import Path

import pytest

from tests.bad_input.programs import PROGRAMS, command_line, refusal

# Each line: program | arguments | how the sentence begins.
CASES = [line.split(" | ") for line in Path(__file__).with_name("arguments.txt").read_text().splitlines()]


def test_all_programs_have_cases():
    assert {program for program, *_ in CASES} == PROGRAMS.keys()


@pytest.mark.parametrize(("program", "arguments", "sentence"), CASES, ids=[" ".join(case[:2]) for case in CASES])
def test_a_wrong_argument(program, arguments, sentence, world):
    assert world(sentence) in refusal(program, command_line(arguments, world))
