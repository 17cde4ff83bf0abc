"""Programs under their former names: one line with the new name, exit status 2."""

import importlib.util
import runpy

import pytest

from drllm.renamed import NEW_NAMES

DOCUMENTED = ["look", "sweep", "claim", "effects", "ablations", "tables", "figures", "backbones", "comparison"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_former_name_says_the_new_one(name, capsys):
    with pytest.raises(SystemExit) as exit_status:
        runpy.run_module(f"drllm.{name}", run_name="__main__")
    assert exit_status.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error == f"error: python -m drllm.{name} is now {NEW_NAMES[name]}\n"


@pytest.mark.parametrize("command", [new for new in NEW_NAMES.values() if new.startswith("python -m ")])
def test_the_new_name_exists(command):
    module = importlib.util.find_spec(command.removeprefix("python -m "))
    assert module is not None, f"{command} does not exist"
