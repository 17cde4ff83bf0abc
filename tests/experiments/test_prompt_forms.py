"""Forms of the prompt: what each form asks, what is counted, and that a stopped run resumes."""

import json

import pytest

import data_generation
from drllm.checkpoints import load_tokenizer
from drllm.labels import read_labels
from drllm.miniature import MINIATURE_DATA, MINIATURE_MODEL
from drllm.questions.prompts import Prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import Question
from drllm.rollouts.scores import ScoreStore
from experiments import prompt_forms

BOXED = ResponseFormat(inject_boxed=True)
CHOICE = Question("arc_easy", "c", "Which is red?", ("sky", "rose"), ("A", "B"), "B")
MATH = Question("dart-1", "m", "1 + 1?", (), (), "2")


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    command = f"--data_dir {MINIATURE_DATA} --dataset arc_easy,dart-1 --limit 12 --samples 12 --num_simulations 4"
    assert data_generation.main([*command.split(), "--output_dir", str(folder)]) == 0
    return folder


def test_an_example_is_a_prompt_with_its_answer():
    tokenizer = load_tokenizer(str(MINIATURE_MODEL))
    example = prompt_forms.solved(CHOICE, ResponseFormat())
    assert example.endswith("Answer: B\n\n")
    assert prompt_forms.solved(MATH, ResponseFormat()).endswith("Answer: \\boxed{2}\n\n")
    assert prompt_forms.solved(MATH, BOXED).endswith("Answer: \\boxed{2}\n\n"), "the box is opened once"
    prompt = Prompt.of(MATH, tokenizer, False, BOXED)
    shown = prompt_forms.with_example(prompt, example, tokenizer)
    assert shown.text == example + prompt.text
    assert tokenizer.decode(shown.input_ids, skip_special_tokens=True).endswith("\\boxed{")
    assert shown.max_new_tokens == prompt.max_new_tokens
    assert shown.response_format == BOXED


def test_every_form_is_measured_and_paired_and_a_stopped_run_resumes(labels, tmp_path, monkeypatch, capsys):
    command = ["--data", str(labels), "--test_questions", "30", "--train_questions", "12", "--candidates", "2"]
    command += ["--static_paths", "skip 3; skip 0-1", "--work_dir", str(tmp_path / "work")]
    command += ["--output", str(tmp_path / "forms.json")]
    add, calls = ScoreStore.add, []

    def stop(store, rows):
        add(store, rows)
        calls.append(store.folder.name)
        if len(calls) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(ScoreStore, "add", stop)
    assert prompt_forms.main(command) == 130
    assert prompt_forms.main(command) == 0
    lines = [
        (path.parent.name, *json.loads(line)[:2])
        for path in (tmp_path / "work").rglob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(lines) == len(set(lines)), "asked twice"
    result = json.loads((tmp_path / "forms.json").read_text())
    rows = {(row["form"], row["group"]): row for row in result["rows"]}
    forms = {form for form, _ in rows}
    assert forms == {"as the labels", "as the labels, skip 3", "as the labels, skip 0-1", "one example"}
    assert len(rows) == 8
    base = rows["as the labels", "arc"]
    assert base["accuracy"] > 0.8, "the miniature answers ARC"
    assert base["difference"] == {"points": 0, "low": 0, "high": 0}
    assert sum(base["labels"].values()) == round(base["answered"] * base["questions"])
    broken, whole = (rows[form, "dart"] for form in ("as the labels, skip 0-1", "as the labels"))
    assert broken["difference"]["points"] == pytest.approx(100 * (broken["accuracy"] - whole["accuracy"]))
    assert broken["difference"]["points"] < -20
    for group, choice in result["examples"].items():
        assert len(choice["training_accuracy"]) == 2
        assert max(choice["training_accuracy"].values()) == choice["training_accuracy"][choice["example"]]
        assert choice["example"] not in {row.question_id for row in read_labels(labels).labels}, group
    assert "responses with an answer" in capsys.readouterr().out


def test_bad_input_is_one_sentence(labels, tmp_path, capsys):
    output = ["--output", str(tmp_path / "forms.json")]
    assert prompt_forms.main(["--data", str(labels), "--static_paths", "skip 99", *output]) == 2
    assert "--static_paths: the model has only 10 blocks" in capsys.readouterr().err
    assert prompt_forms.main(["--data", str(tmp_path / "none"), *output]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err


def test_answers_to_prompts_of_another_form_are_not_reused(labels, tmp_path, capsys):
    command = ["--test_questions", "2", "--train_questions", "2", "--candidates", "1"]
    command += ["--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "forms.json")]
    assert prompt_forms.main(["--data", str(labels), *command]) == 0
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((labels / "manifest.json").read_text())
    manifest["arguments"]["inject_boxed"] = True
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert prompt_forms.main(["--data", str(other), *command]) == 2
    assert "holds scores of" in capsys.readouterr().err
