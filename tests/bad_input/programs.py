"""The programs of the repository, called in this process with the arguments of a command line."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable

import data_generation
import train
from benchmarks import decode, exported_paths, gpu_table, latency, search, training, training_memory
from benchmarks import evaluation as evaluation_speed
from drllm import evaluate, export_path, gguf_checkpoint, router_checkpoint
from drllm.evaluation import eval_sh
from experiments import (
    ablations,
    fresh_questions,
    inspect_prompt,
    label_choice,
    menu,
    paper_backbones,
    paper_figures,
    paper_tables,
    prompt_forms,
    sweep,
)
from extensions import agreement
from extensions.baselines import compare
from extensions.groups import search as group_search
from miniature import make

PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "data_generation.py": data_generation.main,
    "train.py": train.main,
    "eval.sh": eval_sh.main,
    "drllm.evaluate": evaluate.main,
    "router_checkpoint": router_checkpoint.main,
    "gguf_checkpoint": gguf_checkpoint.main,
    "export_path": export_path.main,
    "ablations": ablations.main,
    "agreement": agreement.main,
    "compare": compare.main,
    "group_search": group_search.main,
    "fresh_questions": fresh_questions.main,
    "inspect_prompt": inspect_prompt.main,
    "label_choice": label_choice.main,
    "menu": menu.main,
    "paper_backbones": paper_backbones.main,
    "paper_figures": paper_figures.main,
    "paper_tables": paper_tables.main,
    "prompt_forms": prompt_forms.main,
    "sweep": sweep.main,
    "miniature/make.py": make.main,
    "benchmarks/evaluation.py": evaluation_speed.main,
    "benchmarks/decode.py": decode.main,
    "benchmarks/exported_paths.py": exported_paths.main,
    "benchmarks/gpu_table.py": gpu_table.main,
    "benchmarks/latency.py": latency.main,
    "benchmarks/search.py": search.main,
    "benchmarks/training.py": training.main,
    "benchmarks/training_memory.py": training_memory.main,
}


def refusal(program: str, arguments: list[str]) -> str:
    """The sentence with which a program ends with exit status 2; any exception but SystemExit is a defect."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = PROGRAMS[program](arguments)
        except SystemExit as end:  # of argparse
            status = end.code
    lines = [line for line in errors.getvalue().splitlines() if re.match(r"(\S+(\.py|\.sh)?.*: )?error: ", line)]
    assert status == 2, (status, errors.getvalue()[-2000:])
    assert len(lines) == 1, errors.getvalue()[-2000:]
    assert "Traceback" not in errors.getvalue()
    return lines[0]


# Name in the tables -> arguments that are right.
COMMON = {
    "search": "--model {base} --data_dir {questions} --dataset arc_easy --output_dir {out} --limit 2",
    "train": "--data {labels} --output_dir {out} --num_epochs 1",
    "eval": "{checkpoint} --data_dir {questions} --output_dir {out} --device cpu",
    "lm_eval": "--model_args pretrained={checkpoint} --tasks drllm_arc_easy --data_dir {questions} --device cpu",
    "ablation": "table6 --data {labels} --data_dir {questions} --work_dir {out} --output {out} --num_epochs 1",
    "compare": "--model {base} --data_dir {questions} --dataset arc_easy --work_dir {out} --output {out}/r.json "
    "--train_questions 2",
    "menu": "--model {base} --data_dir {questions} --dataset arc_easy --work_dir {out} --output {out}/r.json",
    "exported": "--model {base} --data_dir {questions} --work_dir {out} --output {out}/r.json",
    "group_search": "--model {base} --data_dir {questions} --dataset arc_easy --output_dir {out} --limit 2",
    "sweep": "{checkpoint} --data_dir {questions} --dataset arc_easy --output {out}/r.json",
    "backbone": "--model {base} --output_dir {out}",
}


class World:
    """Replaces {NAME} in a text by the folder of that name."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def __call__(self, text: str) -> str:
        return re.sub(r"{(\w+)}", lambda match: self.names.get(match[1], match[0]), text)


def command_line(arguments: str, world: World) -> list[str]:
    """The arguments of a case as a list."""
    text = re.sub(r"{(\w+)}", lambda match: COMMON.get(match[1], match[0]), arguments)
    return [world(part) for part in shlex.split(text)]
