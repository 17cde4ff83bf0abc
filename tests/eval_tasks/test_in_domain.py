import json

import pytest
from lm_eval.tasks import TaskManager

from drllm.errors import UserError
from drllm.questions.prompts import Prompt, render_prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import load_questions
from drllm.rollouts.engine import Request, RolloutEngine
from tests import search_toys
from tests.eval_toys import EVAL_TASKS, evaluate, make_base, make_tasks, responses, routed_lm, stock_lm
from train_models.paths import default_path

ALL = {"drllm_arc_easy", "drllm_arc_challenge", *(f"drllm_dart_{level}" for level in range(1, 6))}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    def arc(number, labels):
        choices = {"text": [f"option {label}" for label in labels], "label": labels}
        return {"id": "x", "question": f"q{number}?", "choices": choices, "answerKey": labels[-1]}

    _write(
        tmp_path / "arc_easy_test.jsonl", [arc(n, list(labels)) for n, labels in enumerate(("ABC", "1234", "ABCDE"))]
    )
    _write(tmp_path / "arc_challenge_test.jsonl", [arc(9, list("ABCD"))])
    rows = [
        {"query": f"p{n}", "gt_ans": "\\frac{1}{2}", "query_metadata": {"level": 1 + n % 5}} for n in [*range(10), 3, 4]
    ]
    _write(tmp_path / "dart_math_test.jsonl", rows)
    return tmp_path


def _load(names, **metadata):
    return TaskManager(include_path=str(EVAL_TASKS), include_defaults=False, metadata=metadata).load(names)


def _requests(task, chat=False, **options):
    template = (lambda messages, add_generation_prompt: f"<{messages[0]['content']}>") if chat else None
    task.build_all_requests(rank=0, world_size=1, apply_chat_template=chat, chat_template=template, **options)
    return task.instances


def test_tasks_ask_the_questions_of_the_search(folder):
    tasks = _load(["drllm_arc", "drllm_dart"], data_dir=str(folder))["tasks"]
    assert tasks.keys() == ALL
    for name, task in tasks.items():
        set_name = name.removeprefix("drllm_").replace("dart_", "dart-")
        questions = load_questions(set_name, "test", folder)
        for chat in (False, True):
            requests = _requests(task, chat)
            assert len(requests) == len(questions)
            for request, question in zip(requests, questions, strict=True):
                prompt, generation = request.args
                assert prompt == (f"<{render_prompt(question)}>" if chat else render_prompt(question))
                assert generation["max_gen_toks"] == ResponseFormat().limit(question, chat)
                assert generation["until"] == []
                assert generation["do_sample"] is False


def test_the_response_format_of_labels_is_followed(folder):
    response_format = ResponseFormat({"dart-1": 20, "arc_easy": 4}, inject_boxed=True, strict_letters=True)
    tasks = _load(["drllm_arc", "drllm_dart"], data_dir=str(folder), response_format=response_format.as_dict())["tasks"]
    limits = {name: _requests(task)[0].args[1]["max_gen_toks"] for name, task in tasks.items()}
    assert limits == {name: 15 for name in ALL} | {
        "drllm_arc_easy": 4,
        "drllm_arc_challenge": 2,
        "drllm_dart_1": 20,
    }
    math, choice = tasks["drllm_dart_1"], tasks["drllm_arc_easy"]
    (question, *_) = load_questions("dart-1", "test", folder)
    assert _requests(math)[0].args[0] == render_prompt(question, response_format)
    assert _requests(math)[0].args[0].endswith("Answer: \\boxed{")
    assert math.process_results(math.test_docs()[0], ["0.5}"]) == {"acc": 1.0}
    assert math.process_results(math.test_docs()[0], ["0.6} \\boxed{0.5}"]) == {"acc": 0.0}
    three, numeric, _ = list(choice.test_docs())
    assert choice.process_results(three, [" C."]) == {"acc": 1.0}
    assert choice.process_results(three, ["The answer is C"]) == {"acc": 0.0}
    assert choice.process_results(numeric, ["4"]) == {"acc": 0.0}


def test_generation_arguments_of_the_command_line_win(folder):
    task = _load(["drllm_dart_1"], data_dir=str(folder))["tasks"]["drllm_dart_1"]
    wanted = {"max_gen_toks": 99, "repetition_penalty": 1.3}
    task.set_config("generation_kwargs", wanted, update=True)
    assert _requests(task)[0].args[1].items() > wanted.items()


def test_answers_are_those_of_the_search_whatever_the_generation_config_says(tmp_path, stock_model):
    base, data = make_base(tmp_path / "base", stock_model), make_tasks(tmp_path / "data", count=12)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"repetition_penalty": 1.5}))  # Qwen2.5's: 1.05
    model, tokenizer = search_toys.load(base)
    assert model.generation_config.repetition_penalty == 1.5
    prompts = [Prompt.of(question, tokenizer, chat=False) for question in load_questions("dart-1", "test", data)]
    rollouts = RolloutEngine(model, tokenizer, 12).respond(
        [Request(prompt, default_path(6), to_the_end=True) for prompt in prompts]
    )
    expected = [rollout.response for rollout in rollouts]
    for lm in (stock_lm(base, 12), routed_lm(base, 12)):
        found = responses(evaluate(lm, data, ["drllm_dart_1"]))["drllm_dart_1"]
        assert [text for [[text]] in found] == expected


def test_responses_are_graded_as_in_the_search(folder):
    tasks = _load(["drllm_arc_easy", "drllm_dart_1"], data_dir=str(folder))["tasks"]
    three, numeric, five = list(tasks["drllm_arc_easy"].test_docs())
    grade = tasks["drllm_arc_easy"].process_results
    assert grade(three, [" C."]) == {"acc": 1.0}
    assert grade(three, [" D"]) == {"acc": 0.0}
    assert grade(numeric, [" 4"]) == {"acc": 1.0}
    assert grade(five, ["The answer is E"]) == {"acc": 1.0}
    math = tasks["drllm_dart_1"]
    assert math.process_results(math.test_docs()[0], [" \\boxed{0.5}"]) == {"acc": 1.0}
    assert math.process_results(math.test_docs()[0], [" \\boxed{0.6}"]) == {"acc": 0.0}
    assert math.doc_to_target(math.test_docs()[0]) == "\\frac{1}{2}"


def test_requests_of_other_data_are_never_reused(folder, tmp_path_factory):
    """lm-eval's request cache knows a task by its name, not by its data folder."""
    other = tmp_path_factory.mktemp("other")
    rows = [json.loads(line) for line in (folder / "arc_easy_test.jsonl").read_text().splitlines()]
    _write(other / "arc_easy_test.jsonl", [{**row, "question": "other " + row["question"]} for row in rows])
    prompts = []
    for data in (folder, other):
        task = _load(["drllm_arc_easy"], data_dir=str(data))["tasks"]["drllm_arc_easy"]
        prompts.append([request.args[0] for request in _requests(task, cache_requests=True)])
    assert prompts[0] != prompts[1]


def test_missing_data_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no arc_easy_test\.jsonl"):
        _load(["drllm_arc_easy"], data_dir=str(tmp_path))
