"""Damaged files: exit status 2 and the sentence of every program that reads them."""

from pathlib import Path

import pytest

from tests.bad_input.damage import damaged_copy
from tests.bad_input.programs import command_line, refusal

# Who reads the file -> (program, arguments).
READERS = {
    "train.py": ("train.py", "{train}"),
    "train.py-base": ("train.py", "{train} --model_id {base}"),
    "data_generation.py": ("data_generation.py", "{search}"),
    "search-questions": ("data_generation.py", "{search}"),
    "ablations": ("ablations", "{ablation}"),
    "sweep": ("sweep", "{sweep} --labels {labels}"),
    "sweep-checkpoint": ("sweep", "{sweep}"),
    "sweep-questions": ("sweep", "{sweep}"),
    "compare": ("compare", "{compare} --checkpoint x={checkpoint}"),
    "compare-base": ("compare", "{compare}"),
    "compare-questions": ("compare", "{compare} --reward likelihood"),
    "group_search": ("group_search", "{group_search}"),
    "inspect_prompt": ("inspect_prompt", "{checkpoint} x"),
    "eval.sh": ("eval.sh", "{eval} --labels {labels}"),
    "eval.sh-checkpoint": ("eval.sh", "{eval}"),
    "drllm.evaluate": ("drllm.evaluate", "{lm_eval}"),
    "drllm.evaluate-base": ("drllm.evaluate", "--model_args pretrained={base} --tasks drllm_arc_easy --device cpu"),
    "extract": ("router_checkpoint", "extract {checkpoint} --output_dir {out}"),
    "join": ("router_checkpoint", "join {routers} --output_dir {out}"),
    "make-evaluate": ("miniature/make.py", "evaluate --model {base}"),
    "backbones": ("paper_backbones", "{backbone}"),
    "paper_tables": ("paper_tables", "{results} --output {out}"),
    "paper_figures": ("paper_figures", "{results} --output {out}"),
    "benchmarks/training.py": ("benchmarks/training.py", "--data {labels}"),
}
# Each line: reader | folder/file | damage (see damage.py) | how the sentence begins.
CASES = [line.split(" | ") for line in Path(__file__).with_name("files.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("reader", "file", "how", "sentence"), CASES, ids=[f"{reader} {file} {how[:40]}" for reader, file, how, _ in CASES]
)
def test_a_damaged_file(reader, file, how, sentence, world, tmp_path):
    folder, _, name = file.partition("/")
    world.names[folder] = str(damaged_copy(Path(world.names[folder]), tmp_path / folder, name, how))
    program, arguments = READERS[reader]
    assert world(sentence) in refusal(program, command_line(arguments, world))
