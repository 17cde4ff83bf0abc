"""No program runs the Python of a checkpoint, or unpickles a file of one, unless the user passes trust_remote_code."""

import json
import pickle
import shutil
import sqlite3

import pytest
from transformers import AutoModelForCausalLM

from drllm.checkpoints import join_routers
from tests.bad_input.hostile import Mark, hostile_checkpoint
from tests.bad_input.programs import PROGRAMS, World, command_line

# Programs that read no model from a folder: paper_backbones prints or starts commands of the others, paper_figures and
# paper_tables read results, fresh_questions lists questions, gguf_checkpoint reads a GGUF file, make.py its own
# weights, training_memory.py makes its own, decode.py has random ones, gpu_table.py draws a table, exported_paths.py
# gives the model to export_path, which has a case.
WITHOUT_MODELS = {
    "fresh_questions",
    "paper_backbones",
    "paper_figures",
    "paper_tables",
    "gguf_checkpoint",
    "miniature/make.py",
}
WITHOUT_MODELS |= {"benchmarks/decode.py", "benchmarks/training_memory.py", "label_choice"}
WITHOUT_MODELS |= {"benchmarks/exported_paths.py", "benchmarks/gpu_table.py"}
# (program, arguments): `base` and `checkpoint` are hostile.
CASES = [
    ("data_generation.py", "{search} --num_simulations 2"),
    ("data_generation.py", "{search} --num_simulations 2 --reward likelihood"),
    ("train.py", "{train} --model_id {base}"),
    ("eval.sh", "{eval} --tasks drllm_arc_easy --limit 1"),
    ("eval.sh", "{eval} --tasks drllm_arc_easy --limit 1 --base {base}"),
    ("drllm.evaluate", "{lm_eval} --limit 1"),
    ("drllm.evaluate", "{lm_eval} --limit 1 --model hf"),
    (
        "drllm.evaluate",
        "--model_args pretrained={base} --tasks drllm_arc_easy --data_dir {questions} --device cpu --limit 1",
    ),
    ("router_checkpoint", "extract {checkpoint} --output_dir {out}"),
    ("router_checkpoint", "join {routers} --base {base} --output_dir {out}"),
    ("ablations", "{ablation} --limit 1 --seeds 0"),
    ("compare", "{compare} --checkpoint paper={checkpoint} --test_questions 2 --methods shortgpt,mindskip"),
    ("group_search", "{group_search} --num_simulations 1"),
    ("agreement", "--data {labels} --checkpoint {checkpoint} --output_dir {out}"),
    (
        "prompt_forms",
        "--data {labels} --data_dir {questions} --test_questions 2 --train_questions 2 --work_dir {out} "
        "--output {out}/r.json",
    ),
    ("export_path", '{base} --path "skip 0" --output_dir {out}'),
    (
        "menu",
        "{menu} --checkpoint x={checkpoint} --reward generation --test_questions 2 --train_questions 2 --rounds 1 "
        "--sizes 1",
    ),
    ("inspect_prompt", "{checkpoint} hello --max_new_tokens 1"),
    ("sweep", "{sweep} --limit 1 --knobs -0.5"),
    ("benchmarks/evaluation.py", "--model {checkpoint} --data_dir {questions} --questions 2 --output {out}/r.json"),
    ("benchmarks/latency.py", "--model {base} --prompt_tokens 4 --new_tokens 2 --rounds 1 --skip 0 --batch_sizes 1"),
    (
        "benchmarks/search.py",
        "speed --model {base} --data_dir {questions} --dataset arc_easy --questions 2 --pairs 1 --output_dir {out}",
    ),
    ("benchmarks/training.py", "--data {labels} --model {base} --pairs 1"),
]


@pytest.fixture
def hostile(valid, tmp_path):
    """(valid input with hostile checkpoints, the mark)."""
    mark = tmp_path / "mark"
    base = hostile_checkpoint(valid["base"], tmp_path / "base", mark)
    checkpoint = hostile_checkpoint(valid["checkpoint"], tmp_path / "checkpoint", mark)
    labels = tmp_path / "labels"
    shutil.copytree(valid["labels"], labels)
    manifest = json.loads((labels / "manifest.json").read_text())
    (labels / "manifest.json").write_text(json.dumps(manifest | {"model": str(base)}))
    names = {name: str(path) for name, path in valid.items()}
    names |= {"base": str(base), "checkpoint": str(checkpoint), "labels": str(labels), "out": str(tmp_path / "out")}
    return World(names), mark


def test_every_program_that_reads_a_model_has_a_case():
    assert {program for program, _ in CASES} == PROGRAMS.keys() - WITHOUT_MODELS


@pytest.mark.slow
@pytest.mark.parametrize(("program", "arguments"), CASES)
def test_no_program_runs_the_code_of_a_checkpoint(program, arguments, hostile, capfd):
    world, mark = hostile
    try:
        status = PROGRAMS[program](command_line(arguments, world))
    except SystemExit as end:
        status = end.code
    errors = capfd.readouterr().err
    assert not mark.exists()
    # So it has loaded the checkpoint: predictable_effects then finds scores of another base.
    assert status in (0, None) or "holds scores of" in errors, errors


def test_the_mark_works(hostile):
    world, mark = hostile
    AutoModelForCausalLM.from_pretrained(world("{checkpoint}"), trust_remote_code=True)
    assert mark.exists()


def test_joining_in_python_runs_nothing(hostile):
    world, mark = hostile
    join_routers(world("{routers}"), base=world("{base}"))
    assert not mark.exists()


@pytest.mark.slow
def test_a_planted_cache_of_answers_is_not_unpickled(valid, tmp_path, capfd):
    world, mark, cache = World({name: str(path) for name, path in valid.items()}), tmp_path / "mark", tmp_path / "c.db"
    arguments = command_line(f"{{lm_eval}} --limit 1 --use_cache {cache}", world)
    assert PROGRAMS["drllm.evaluate"](arguments) in (0, None)
    with sqlite3.connect(cache) as database:
        assert database.execute("UPDATE answers SET entry = ?", (pickle.dumps(Mark(mark)),)).rowcount > 0
    assert PROGRAMS["drllm.evaluate"](arguments) == 2
    assert "is not a response cache" in capfd.readouterr().err
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_resumed_training_unpickles_nothing(name, valid, tmp_path, capfd):
    mark = tmp_path / "mark"
    arguments = [
        "--data",
        str(valid["labels"]),
        "--output_dir",
        str(tmp_path),
        "--run_name",
        "run",
        "--num_epochs",
        "2",
    ]
    assert PROGRAMS["train.py"](arguments) in (0, None)
    folder = tmp_path / "run"
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    pickles = list(folder.glob(f"trainer/checkpoint-*/{name}"))
    assert pickles
    for path in pickles:
        path.write_bytes(pickle.dumps(Mark(mark)))
    PROGRAMS["train.py"](arguments)
    assert "Traceback" not in capfd.readouterr().err
    assert not mark.exists()
    pickle.loads(pickle.dumps(Mark(mark)))
    assert mark.exists(), "the code would have left its mark"
