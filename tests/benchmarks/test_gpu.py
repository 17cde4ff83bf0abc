"""benchmarks/gpu.sh runs every stage, keeps what a stage that was cut off has written, and draws its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_table
from benchmarks.pairs import Pairs
from benchmarks.search_sides import Speller, random_prompts
from drllm.provenance import write_result

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "DEVICE": "cpu",
    "DTYPE": "float32",
    "SHAPE": "small",
    "SEARCH_ARGUMENTS": "--questions 2 --num_simulations 1 --published_questions 1 --pairs 1",
    "DECODE_ARGUMENTS": "--batch_sizes 1 --modes stock,eager,graphs --new_tokens 4 --rounds 1 --prompts 3",
    "TRAINING_ARGUMENTS": "--questions 8 --epochs 1",
    "EVALUATION_ARGUMENTS": "--questions 2 --batch_sizes 1 --new_tokens 2 --pairs 1",
}


def run(folder: Path, *stages: str, **changes: str) -> subprocess.CompletedProcess:
    environment = os.environ | SMALL | {"PYTHON": sys.executable} | changes
    command = [ROOT / "benchmarks" / "gpu.sh", folder, *stages]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_prompts_are_as_long_as_real_ones_and_answers_are_graded_as_such():
    prompts = random_prompts(("arc_easy", "dart-5"), 1000, 600, seed=0)
    by_set = {name: [len(p.input_ids) for p in prompts if p.question.set == name] for name in ("arc_easy", "dart-5")}
    assert {name: len(lengths) for name, lengths in by_set.items()} == {"arc_easy": 300, "dart-5": 300}
    assert sum(by_set["arc_easy"]) / 300 == pytest.approx(97, abs=3)
    assert max(by_set["dart-5"]) == 1297
    assert by_set["dart-5"][:50] == by_set["dart-5"][250:], "250 lengths, then again"
    assert len({p.question.id for p in prompts}) == len({p.input_ids for p in prompts}) == 600
    spelled = [Speller().decode([number]) for number in range(800)]
    assert sum("sqrt" in text for text in spelled) == 100
    assert prompts[1].response_format.grade(prompts[1].question, rf"\boxed{{{prompts[1].question.answer}}}")


def test_an_unknown_stage_is_refused_before_anything_runs(tmp_path):
    done = run(tmp_path, "decode", "magic")
    assert done.returncode == 2
    assert "error: unknown stage magic; choose from correctness, search" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_table_says_what_was_measured_and_what_was_not(tmp_path, capsys):
    pairs = Pairs((1.0,) * 5, (0.01,) * 5).record()
    speed = {
        "rows": 1000,
        "block_operations_per_s": 3e14,
        "matrix_operations_per_s": 7e14,
        "share_of_matrix_rate": 3 / 7,
    }
    speed |= {"engine_over_published": pairs, "engine_over_plain": pairs, "grading": None}
    common = {"command": "x", "seed": 0, "seconds": 1.0}
    write_result(tmp_path / "search_speed_x.json", {"figures": {"threads_1": speed}}, **common)
    figures = [{"name": "one-token options, batch 64", "ours_seconds": 0.01, "reference_seconds": 0.2, "ratio": 20.0}]
    write_result(tmp_path / "evaluation.json", {"figures": figures}, **common)
    (tmp_path / "README.md").write_text(f"Before.\n\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\n\nAfter.\n")
    assert not gpu_table.main([str(tmp_path)])
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("Before.")
    assert page.endswith("After.\n")
    assert "old" not in page
    assert "| search, simulations/s over the published way | 100.0 | 1.0 | 100.00 |  |  | at least 100 |" in page
    assert "| 300.0 |  |  | 700 | 42.9% | at least 30% |" in page
    assert "| 10.0 | 200.0 | 20.00 |  |  | at least 10 |" in page
    assert "| decode | not measured |" in page
    assert "no GPU: these are no figures of speed" in page
    assert capsys.readouterr().out.startswith("| figure | ours |")


@pytest.mark.slow
def test_every_stage_runs_alone_and_writes_its_result(tmp_path):
    for stage in ("search", "decode", "training", "evaluation"):
        done = run(tmp_path, stage)
        assert done.returncode == 0, f"{stage}: {done.stdout}{done.stderr}"
    assert not list(tmp_path.glob("scratch*")), "scratch is removed"
    page = (tmp_path / "README.md").read_text()
    for figure in ("search, simulations/s", "decoding, batch 1, graphs", "training on 8 labels", "evaluation, "):
        assert f"| {figure}" in page
    tests = run(tmp_path, "correctness")
    assert tests.returncode == 1, "there is no card"
    assert "needs a CUDA GPU, and torch sees none" in (tmp_path / "correctness.log").read_text()


@pytest.mark.slow
def test_a_stage_that_is_cut_off_keeps_the_rounds_that_it_has_measured(tmp_path):
    many = SMALL["SEARCH_ARGUMENTS"].replace("--pairs 1", "--pairs 1000")
    done = run(tmp_path, "search", SECONDS_IN_ALL="60", SEARCH_ARGUMENTS=many)
    assert done.returncode == 1
    assert "search ended with status 124 (124: its time was up)" in done.stdout
    figures = json.loads((tmp_path / "search_speed_small.json").read_text())["figures"]["threads_1"]
    assert 1 <= len(figures["engine_over_published"]["ratios"]) < 1000
    assert "| search, simulations/s over the published way |" in done.stdout
