import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import processors
from transformers import AutoTokenizer

from drllm.checkpoints import load_tokenizer
from drllm.errors import UserError
from drllm.questions.prompts import Prompt, thinking_switch
from drllm.questions.sets import load_questions
from tests.eval_toys import (
    HookCounter,
    evaluate,
    make_routed,
    make_tasks,
    metrics,
    responses,
    routed_lm,
    stock_lm,
)
from train_models import RoutedLlamaForCausalLM

GENERATION = ["drllm_arc_easy", "drllm_dart_1", "toy_stop"]
CHOICES = ["toy_choice", "toy_label"]
BLOCKS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("tasks"))


def _close(first, second) -> bool:
    """Equal texts, and log-likelihoods equal up to fp32 rounding."""
    if isinstance(first, float):
        return first == pytest.approx(second, abs=2e-4)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_close, first, second))
    return first == second


def _counts(results: dict) -> dict:
    return results["config"]["block_applications"]


@pytest.fixture(scope="module")
def alone(routed, folder):
    """Results one question at a time."""
    return evaluate(routed_lm(routed), folder, GENERATION + CHOICES)


@pytest.mark.parametrize("batch_size", [8, "auto"])
def test_results_do_not_depend_on_the_batch_size(alone, routed, folder, batch_size):
    together = evaluate(routed_lm(routed, batch_size, max_batch_size=4), folder, GENERATION + CHOICES)
    assert metrics(alone) == metrics(together)
    assert _counts(alone) == _counts(together)
    first, second = responses(alone), responses(together)
    assert first.keys() == second.keys()
    assert all(_close(first[task], second[task]) for task in first)
    shares = _counts(alone)["drllm_arc_easy"]["share"]
    assert all(share > 0 for share in shares.values()), "the toy routers must use every action"


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_static_routing_equals_lm_evals_own_model(base, routed, folder, batch_size):
    tasks = [*GENERATION, *CHOICES, "toy_rolling"]
    stock = evaluate(stock_lm(base, batch_size), folder, tasks)
    for ours in (
        evaluate(routed_lm(routed, batch_size, is_static_routing=True), folder, tasks),
        evaluate(routed_lm(base, batch_size), folder, tasks),
    ):
        found, expected = metrics(ours), metrics(stock)
        perplexity = found.pop("toy_rolling"), expected.pop("toy_rolling")
        assert found == expected
        assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-5)
        mine, theirs = responses(ours), responses(stock)
        assert all(_close(mine[task], theirs[task]) for task in theirs)
        counts = _counts(ours)
        assert all(task["blocks_per_pass"] == BLOCKS for task in counts.values())
        assert counts["toy_label"]["blocks_per_query"] == BLOCKS  # one prefill answers all four labels
        assert counts["drllm_arc_easy"]["share"] == {"skip": 0.0, "execute": 1.0, "repeat": 0.0}


def test_routing_changes_something(alone, base, folder):
    plain = responses(evaluate(routed_lm(base, 6), folder, CHOICES))
    assert all(not _close(answers, responses(alone)[task]) for task, answers in plain.items())


@pytest.mark.parametrize(
    ("tasks", "batch_size"), [(GENERATION, 1), (["toy_choice"], 1), (["toy_choice"], 4), (["toy_label"], 4)]
)
def test_counted_layers_are_those_that_ran(routed, folder, tasks, batch_size):
    lm = routed_lm(routed, batch_size)
    counter = HookCounter(lm.model)
    counts = _counts(evaluate(lm, folder, tasks))
    assert counter.rows == sum(task["blocks"] for task in counts.values()) > 0


def test_rows_that_have_ended_are_not_counted(base, folder):
    lm = routed_lm(base, batch_size=5)
    results = evaluate(lm, folder, ["toy_stop"])
    counts = _counts(results)["toy_stop"]
    texts = [text for [[text]] in responses(results)["toy_stop"]]
    passes = [query["passes"] for query in lm.layer_counts.queries()]
    assert len(set(passes)) > 1, "the toy rows must end at different lengths"
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text, needed in zip(texts, passes, strict=True):
        assert needed == min(9, len(tokenizer.tokenize(text)) + 1)  # the stop or end token is a pass, too
    assert counts["blocks"] == BLOCKS * sum(passes)


def test_each_end_token_of_the_model_ends_a_row(base, folder):
    """Instruct models have several; only one of them is the tokenizer's, which lm-eval knows."""
    lm = routed_lm(base, batch_size=5)
    texts = [text for [[text]] in responses(evaluate(lm, folder, ["toy_stop"]))["toy_stop"]]
    before = {query["doc_id"]: query["passes"] for query in lm.layer_counts.queries()}
    longest = max(before, key=before.get)
    assert before[longest] > 1
    first_token = lm.tokenizer.encode(texts[longest], add_special_tokens=False)[0]
    lm.model.generation_config.eos_token_id = [2, first_token]
    evaluate(lm, folder, ["toy_stop"])
    after = {query["doc_id"]: query["passes"] for query in lm.layer_counts.queries()}
    assert after[longest] == 1


def test_options_follow_the_path_that_the_prompt_alone_gives(routed, folder):
    lm = routed_lm(routed, batch_size=4)
    results = evaluate(lm, folder, ["toy_choice"])
    model = RoutedLlamaForCausalLM.from_pretrained(routed, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(routed)
    seen = set()
    for sample, query in zip(results["samples"]["toy_choice"], lm.layer_counts.queries(), strict=True):
        tokens = tokenizer(sample["doc"]["question"], return_tensors="pt").input_ids
        with torch.no_grad():
            (path,) = model(tokens).paths.tolist()
        assert query["paths"] == ["".join(map(str, path))]
        seen |= set(query["paths"])
    assert len(seen) > 1


def test_prompt_is_computed_once_for_all_options(routed, folder):
    lm = routed_lm(routed)
    tokens = []
    lm.model.model.register_forward_pre_hook(
        lambda module, arguments, options: tokens.append(options["input_ids"].shape), with_kwargs=True
    )
    results = evaluate(lm, folder, ["toy_choice"])
    documents = results["samples"]["toy_choice"]
    prefills = [shape for shape in tokens if shape[0] == 1]
    options = [shape for shape in tokens if shape[0] > 1]
    assert len(prefills) + len(options) == len(tokens)
    assert len(prefills) >= len(documents) >= len(options)
    assert len(tokens) <= 2 * len(documents)


def test_a_fixed_path_is_followed_and_counted(base, routed, folder):
    for checkpoint in (base, routed):
        results = evaluate(routed_lm(checkpoint, 4, path=11021), folder, ["drllm_arc_easy", "toy_choice"])
        for counts in _counts(results).values():
            assert counts["blocks_per_pass"] == 5
            assert counts["share_per_block"]["skip"] == [1, 0, 0, 1, 0, 0]
        assert results["config"]["routing"]["path"] == "011021"


def test_answers_are_cached_with_their_counts(base, routed, folder, tmp_path):
    cache, tasks = str(tmp_path / "answers.db"), ["drllm_arc_easy", "toy_choice", "toy_rolling"]
    first = evaluate(routed_lm(routed, 4, response_cache=cache), folder, tasks)
    again = routed_lm(routed, 1, response_cache=cache)
    counter = HookCounter(again.model)
    second = evaluate(again, folder, tasks)
    assert counter.calls == 0
    assert metrics(first) == metrics(second)
    assert _counts(first) == _counts(second)
    assert responses(first) == responses(second)

    def is_computed(checkpoint: Path, **arguments) -> bool:
        lm = routed_lm(checkpoint, 4, response_cache=cache, **arguments)
        counter = HookCounter(lm.model)
        results = evaluate(lm, folder, ["toy_choice"])
        assert _counts(results)["toy_choice"]["queries"] == 5
        return counter.calls > 0

    # other weights or settings never see these answers, not even under the same name
    assert not is_computed(routed)
    assert is_computed(base)
    assert is_computed(routed, is_static_routing=True)
    assert is_computed(routed, num_windows=2)
    renamed = tmp_path / "renamed"
    shutil.copytree(routed, renamed)
    assert is_computed(renamed)
    assert not is_computed(renamed)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"routing_control": 0.1}))
    assert is_computed(renamed)
    make_routed(base, renamed, seed=1)
    assert is_computed(renamed)
    make_routed(base, renamed, seed=2)
    assert is_computed(renamed)


@pytest.mark.parametrize(
    ("sampling", "is_sampled"),
    [
        ("do_sample: true, temperature: 3.0", True),
        ("temperature: 3.0", True),
        ("do_sample: false", False),
        ("temperature: 0.0", False),
    ],
)
def test_only_greedy_repeats_of_a_request_share_an_answer(routed, folder, tmp_path, sampling, is_sampled):
    yaml = (folder / "toy_stop.yaml").read_text().replace("toy_stop", "toy_repeats")
    (tmp_path / "toy_repeats.yaml").write_text(yaml.replace("do_sample: false", sampling) + "repeats: 6\n")
    results = evaluate(routed_lm(routed, 4), tmp_path, ["toy_repeats"])
    different = [len(set(repeats)) for [repeats] in responses(results)["toy_repeats"]]
    assert len(different) == 5
    assert max(different) > 2 if is_sampled else different == [1] * 5


def test_lm_evals_own_cache_is_refused(routed, folder, tmp_path):
    with pytest.raises(UserError, match=r"drllm\.evaluate --use_cache"):
        evaluate(routed_lm(routed), folder, ["toy_label"], use_cache=str(tmp_path / "cache"))


def test_lm_evals_cache_of_requests_holds_no_answers(base, routed, folder, tmp_path, monkeypatch):
    """--cache_requests keeps prompts: what one model left there does not change the results of another."""
    monkeypatch.setattr("lm_eval.caching.cache.PATH", str(tmp_path))
    tasks = ["toy_choice", "toy_stop"]
    for checkpoint in (routed, base):
        cached = evaluate(routed_lm(checkpoint, 4), folder, tasks, cache_requests=True)
        assert list(tmp_path.iterdir())
        fresh = evaluate(routed_lm(checkpoint, 4), folder, tasks)
        assert responses(cached) == responses(fresh)
        assert _counts(cached) == _counts(fresh)


@pytest.fixture
def one_of_two(monkeypatch):
    """Makes a model believe that it runs in two processes; the list of what it then exchanges as tensors."""

    def pretend(lm, more_elsewhere: int = 3) -> list[torch.Tensor]:
        exchanged = []

        def all_gather(tensor):
            exchanged.append(tensor)
            own = tensor.reshape(-1)[0]
            return torch.stack([own, own + more_elsewhere])

        monkeypatch.setattr(lm, "_world_size", 2)
        monkeypatch.setattr(lm, "all_gather", all_gather)
        monkeypatch.setattr(lm, "gather_object", lambda part: [part])
        return exchanged

    return pretend


def test_rolling_finds_its_batch_size_once_and_computes_no_more_with_several_processes(routed, folder, one_of_two):
    texts = [json.loads(line)["question"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0, metadata=("toy_rolling", number, 1))
        for number, text in enumerate(texts)
    ]
    found = []
    for batch_size, processes in ((2, 1), ("auto", 1), ("auto", 2)):
        lm = routed_lm(routed, batch_size, max_batch_size=2)
        lm._max_length = 4  # several windows a document
        counter = HookCounter(lm.model)
        exchanged = one_of_two(lm) if processes == 2 else []
        with mock.patch.object(lm, "_detect_batch_size", wraps=lm._detect_batch_size) as detect:
            answers = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        assert detect.call_count == (batch_size == "auto")
        assert len(exchanged) == processes - 1, "the batch size, and no numbers of windows"
        assert (lm.batch_size, lm.world_size) == (batch_size, processes), "as they were for the next task"
        found.append((answers, lm.layer_counts.summary()))
        if batch_size == 2:
            assert counter.rows == found[0][1]["toy_rolling"]["blocks"]
            assert found[0][1]["toy_rolling"]["forward_passes"] > len(texts)
    for answers, counts in found[1:]:
        assert _close(answers, found[0][0])
        assert counts == found[0][1]


def test_a_process_with_nothing_left_to_score_agrees_on_the_batch_size(routed, one_of_two):
    requests = [Instance("loglikelihood", {}, ("w1 w2", " A"), 0, metadata=("toy_label", 0, 1))]
    for own in (requests, []):
        lm = routed_lm(routed, "auto", max_batch_size=2)
        exchanged = one_of_two(lm)
        assert len(lm.loglikelihood(own, disable_tqdm=True)) == len(own)
        assert len(exchanged) == 1


@pytest.mark.parametrize("begin", ["", "<s> "], ids=["no BOS in the template", "BOS in the template"])
def test_chat_prompts_and_their_tokens_are_those_of_the_search_on_any_day(routed, folder, begin):
    tokenizer = load_tokenizer(routed)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # as Llama-3.2's, which writes today's date into each prompt
    date = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    switch = "{% if enable_thinking is defined and enable_thinking is false %} <think></think>{% endif %}"
    tokenizer.chat_template = date + begin + "{{ date_string }} {{ messages[0]['content'] }} w1" + switch
    assert thinking_switch(tokenizer, chat=True) == {"enable_thinking": False}
    lm = routed_lm(routed, tokenizer=tokenizer, enable_thinking=False)  # as eval.sh has it
    results = evaluate(lm, folder, ["drllm_arc_easy"], apply_chat_template=True, limit=2)
    samples = sorted(results["samples"]["drllm_arc_easy"], key=lambda sample: sample["doc_id"])
    for sample, question in zip(samples, load_questions("arc_easy", "test", folder), strict=False):
        searched = Prompt.of(question, tokenizer, chat=True)
        text = sample["arguments"][0][0]
        assert text == searched.text
        assert text.startswith(f"{begin}26 Jul 2024 Question:")
        assert text.endswith(" <think></think>")
        assert lm.tok_batch_encode([text])[0][0].tolist() == list(searched.input_ids)
    given = routed_lm(routed, tokenizer=tokenizer, chat_template_args={"date_string": "1 Jan 2000"})
    assert given.apply_chat_template([{"role": "user", "content": "w2"}]) == f"{begin}1 Jan 2000 w2 w1"


def test_routing_log_has_a_line_a_query(routed, folder, tmp_path):
    log = tmp_path / "logs" / "routing.jsonl"
    results = evaluate(routed_lm(routed, routing_log=str(log)), folder, ["drllm_arc_easy", "toy_choice"])
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 10
    blocks = sum(row["blocks"] for row in rows if row["task"] == "toy_choice")
    assert blocks == _counts(results)["toy_choice"]["blocks"]
    assert all(len(path) == BLOCKS for row in rows for path in row["paths"])


def test_bad_arguments_are_refused(base, routed, folder, tmp_path):
    with pytest.raises(UserError, match="without routers: omit routing_control"):
        routed_lm(base, routing_control=0.0)
    with pytest.raises(UserError, match="one digit 0"):
        routed_lm(base, path=1111111)
    with pytest.raises(UserError, match="one digit 0"):
        routed_lm(base, path="000000")
    with pytest.raises(UserError, match="the folder does not exist"):
        routed_lm(tmp_path / "nowhere")
    with pytest.raises(UserError, match="routing_control is 3"):
        routed_lm(routed, routing_control=3)
    with pytest.raises(UserError, match="num_beams"):
        evaluate(routed_lm(routed), folder, ["toy_stop"], gen_kwargs="num_beams=2")


@pytest.mark.parametrize("weight", ["model.layers.3.mlp.down_proj.weight", "model.routers.2.layers.0.weight"])
def test_weights_that_are_not_finite_are_named(routed, tmp_path, weight):
    model = RoutedLlamaForCausalLM.from_pretrained(routed)
    with torch.no_grad():
        model.get_parameter(weight).view(-1)[1] = float("nan")
    model.save_pretrained(tmp_path)
    load_tokenizer(routed).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"the weight {weight} holds NaN"):
        routed_lm(tmp_path, 4)


@pytest.mark.parametrize("task", ["toy_choice", "toy_stop", "toy_rolling"])
def test_logits_that_are_not_finite_end_the_evaluation(routed, folder, task):
    lm = routed_lm(routed, 4)
    lm.model.lm_head.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(UserError, match=r"logits of a batch of [0-9]+ prompts are NaN or infinite"):
        evaluate(lm, folder, [task])


@pytest.mark.parametrize(
    ("name", "value"), [("model_type", 3), ("model_type", "drllm_gpt2"), ("hidden_size", "x"), ("num_windows", "x")]
)
def test_a_damaged_configuration_is_one_sentence(routed, tmp_path, name, value):
    shutil.copytree(routed, tmp_path / "copy")
    config = json.loads((routed / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(UserError, match=str(name if value != "drllm_gpt2" else "gpt2")):
        routed_lm(tmp_path / "copy")


def test_other_windows_than_in_training_are_said_aloud(routed, tmp_path, caplog):
    model = RoutedLlamaForCausalLM.from_pretrained(routed)
    model.config.trained_num_windows = 8
    model.save_pretrained(tmp_path)
    load_tokenizer(routed).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert routed_lm(tmp_path, num_windows=3).config.num_windows == 3
    assert "trained with num_windows=8" in caplog.text


def _launch(arguments: list[str], processes: int = 1) -> None:
    module = ["-m", "drllm.evaluate", *arguments]
    if processes > 1:
        module = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), *module]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *module], capture_output=True, text=True, cwd=Path(__file__).parents[3], env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _saved(folder: Path) -> dict:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_command_line_with_one_and_two_processes(routed, folder, tmp_path):
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        tasks = f"drllm_arc,{folder}/toy_choice.yaml"
        _launch(
            f"--model_args pretrained={routed},dtype=float32 --tasks {tasks} --data_dir {folder} "
            f"--device cpu --output_path {output} --batch_size 4".split(),
            processes,
        )
        found.append(_saved(output))
    one, two = found
    assert metrics(one) == metrics(two)
    assert _counts(one) == _counts(two)
    assert _counts(one)["drllm_arc_easy"]["queries"] == 5
