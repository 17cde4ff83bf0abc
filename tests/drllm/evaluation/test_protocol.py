import json

import pytest

from drllm.errors import UserError
from drllm.evaluation.protocol import (
    Protocol,
    canonical_gen_kwargs,
    default_tasks,
    describe_parts,
    response_format_of,
    reward_of,
    reward_warning,
    uses_chat_template,
)
from drllm.questions.response_format import ResponseFormat

TASKS = "drllm_arc,gsm8k,drllm_dart,mmlu,drllm_ll_arc_easy"


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's folder; calling it writes what its labels were made with."""

    class Folder(type(tmp_path)):
        def __call__(self, manifest):
            (self / "labels_manifest.json").write_text(json.dumps(manifest))
            return self

    return Folder(tmp_path)


def _settings(parts):
    """(task, chat template, generation settings) of every task."""
    return {task: (part.chat_template, part.gen_kwargs) for part in parts for task in part.tasks.split(",")}


def test_out_of_domain_tasks_run_with_lm_evals_defaults(checkpoint):
    parts = Protocol().parts(TASKS, checkpoint({"chat_template": True}))
    assert [part.tasks for part in parts] == ["drllm_arc,drllm_dart", "gsm8k,mmlu,drllm_ll_arc_easy"]
    assert [part.chat_template for part in parts] == [True, False]
    assert [part.gen_kwargs for part in parts] == [None, None]
    assert len(Protocol().parts(TASKS, checkpoint({"chat_template": False}))) == 1


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (Protocol(chat_template="on"), {"mmlu": (True, None), "drllm_ll_arc_easy": (True, None)}),
        (Protocol(chat_template="off"), {"mmlu": (False, None), "drllm_arc": (False, None)}),
        (Protocol(chat_template_tasks=("gsm8k",)), {"gsm8k": (True, None), "mmlu": (False, None)}),
        (
            Protocol(gen_kwargs="max_new_tokens=2048"),
            {
                "gsm8k": (False, "max_gen_toks=2048"),
                "drllm_arc": (True, None),
                "drllm_dart": (True, None),
                "drllm_ll_arc_easy": (False, None),
            },
        ),
        (
            Protocol(dart_max_new_tokens=20),
            {"drllm_dart": (True, "max_gen_toks=20"), "drllm_arc": (True, None), "gsm8k": (False, None)},
        ),
    ],
)
def test_settings_by_task(checkpoint, protocol, expected):
    settings = _settings(protocol.parts(TASKS, checkpoint({"chat_template": True})))
    assert list(sorted(settings)) == sorted(TASKS.split(","))
    assert expected.items() <= settings.items()


def test_settings_are_described(checkpoint):
    protocol = Protocol(gen_kwargs="max_new_tokens=2048")
    parts = [part.record for part in protocol.parts("drllm_arc,gsm8k,mmlu", checkpoint({"chat_template": True}))]
    assert describe_parts(parts) == [
        "drllm_arc: with chat template, the tasks' generation settings.",
        "gsm8k, mmlu: without chat template, generation settings max_gen_toks=2048.",
    ]


FORMAT = {"max_new_tokens": {"arc_easy": 2, "dart-1": 20}, "inject_boxed": True, "strict_letters": True}


def test_in_domain_tasks_have_the_response_format_of_the_labels(checkpoint):
    checkpoint({"chat_template": False, "arguments": FORMAT | {"budget": 2.0}})
    parts = [part.record for part in Protocol().parts(TASKS, checkpoint)]
    assert [part["tasks"] for part in parts] == ["drllm_arc,drllm_dart", "gsm8k,mmlu,drllm_ll_arc_easy"]
    # ARC's limit is the default without a chat template, so it is not named.
    assert parts[0]["response_format"] == FORMAT | {"max_new_tokens": {"dart-1": 20}}
    assert "response_format" not in parts[1]
    assert describe_parts(parts[:1]) == [
        "drllm_arc, drllm_dart: without chat template, response format of the labels (dart-1 at most 20 new tokens, "
        r"math prompts end with \boxed{, only a leading A, B, C or D is an answer)."
    ]
    with pytest.raises(UserError, match="--chat_template on: the labels have boxed responses"):
        Protocol(chat_template="on").parts(TASKS, checkpoint)


def test_limits_of_labels_that_are_the_default_change_nothing(checkpoint):
    recorded = {"max_new_tokens": {"arc_easy": 10, "dart-5": 15}, "inject_boxed": False, "strict_letters": False}
    without = [part.record for part in Protocol().parts(TASKS, checkpoint({"chat_template": True}))]
    checkpoint({"chat_template": True, "arguments": recorded})
    assert [part.record for part in Protocol().parts(TASKS, checkpoint)] == without
    assert response_format_of(checkpoint) == ResponseFormat()


def test_labels_of_two_response_formats_are_refused(checkpoint):
    checkpoint([{"arguments": {}}, {"arguments": {"inject_boxed": True}}])
    with pytest.raises(UserError, match=r"several response formats \(the default and math prompts end with"):
        Protocol().parts(TASKS, checkpoint)


def test_chat_template_follows_the_labels(checkpoint):
    assert not uses_chat_template("auto", checkpoint)
    for manifest in ({"chat_template": True}, [{"chat_template": True}, {"chat_template": True}]):
        assert uses_chat_template("auto", checkpoint(manifest))
    assert not uses_chat_template("off", checkpoint)


def test_default_tasks_are_those_of_the_reward(checkpoint):
    assert (reward_of(checkpoint).name, default_tasks(checkpoint)) == ("generation", "drllm_arc,drllm_dart")
    arguments = {"dataset": ["arc_easy", "openbookqa"]}
    checkpoint([{"reward": "likelihood", "arguments": arguments}] * 2)
    assert default_tasks(checkpoint) == "drllm_ll_arc_easy,drllm_ll_openbookqa"
    checkpoint({"reward": "likelihood_norm", "arguments": {}})
    with pytest.raises(UserError, match=r"'arguments\.dataset' names no sets; pass --tasks"):
        default_tasks(checkpoint)


@pytest.mark.parametrize(
    ("reward", "tasks", "is_warned"),
    [
        ("generation", "drllm_arc,mmlu", False),
        ("generation", "mmlu,drllm_ll_piqa", True),
        ("likelihood", "drllm_ll_piqa,gsm8k", False),
        ("likelihood_norm", "drllm_arc_easy", True),
    ],
)
def test_another_reward_triggers_a_warning(checkpoint, reward, tasks, is_warned):
    checkpoint({"reward": reward, "arguments": {"dataset": ["piqa"]}})
    warning = reward_warning(checkpoint, tasks)
    assert (warning is not None) == is_warned
    if is_warned:
        assert f"was trained with --reward {reward}" in warning


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("3", "expected an object or a list of objects"),
        ("[3]", "expected an object or a list of objects"),
        ('{"chat_template": "yes"}', "'chat_template' is \"yes\", expected true or false"),
        ('{"reward": "luck"}', "'reward' is \"luck\", expected one of generation, likelihood"),
        ('{"arguments": {"max_new_tokens": 3}}', "'max_new_tokens' does not give a positive integer"),
        ('{"arguments": {"max_new_tokens": {"arc_easy": 0}}}', "'max_new_tokens' does not give a positive integer"),
        ('{"arguments": {"max_new_tokens": {"arc": 3}}}', "'max_new_tokens' does not give a positive integer"),
        ('{"arguments": {"inject_boxed": "no"}}', "'inject_boxed' is not true or false"),
        ('{"reward": []}', r"'reward' is \[\], expected one of generation, likelihood"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_manifest_is_one_sentence(checkpoint, content, message):
    (checkpoint / "labels_manifest.json").write_text(content)
    with pytest.raises(UserError, match=rf"labels_manifest\.json.*{message}"):
        Protocol().parts(TASKS, checkpoint)


def test_labels_of_two_rewards_are_refused(checkpoint):
    with pytest.raises(UserError, match="several rewards"):
        reward_of(checkpoint([{}, {"reward": "likelihood"}]))


@pytest.mark.parametrize(
    ("protocol", "tasks", "message"),
    [
        (Protocol(), "", "--tasks is empty"),
        (Protocol(), ",", "--tasks is empty"),
        (Protocol(chat_template_tasks=("piqa",)), "mmlu", "--chat_template piqa: neither auto, on or off, nor among"),
        (Protocol(gen_kwargs="max_new_tokens=-1"), "mmlu", "must be a positive integer"),
    ],
)
def test_bad_settings_are_one_sentence(checkpoint, protocol, tasks, message):
    with pytest.raises(UserError, match=message):
        protocol.parts(tasks, checkpoint)


def test_the_limit_has_one_name():
    assert canonical_gen_kwargs(["max_new_tokens=5,do_sample=False"]) == ["max_gen_toks=5,do_sample=False"]
    assert canonical_gen_kwargs(['{"max_tokens": 5}']) == ['{"max_gen_toks": 5}']
    assert canonical_gen_kwargs([]) == []


def test_in_domain_answers_are_given_without_thinking_as_the_labels_were(checkpoint):
    def switches(protocol, manifest):
        parts = protocol.parts("drllm_arc,gsm8k", checkpoint(manifest))
        return [(part.tasks, part.record.get("enable_thinking")) for part in parts]

    direct = {"chat_template": True, "arguments": {"enable_thinking": False}}
    everywhere = Protocol(chat_template="on")
    assert switches(everywhere, direct) == [("drllm_arc", False), ("gsm8k", None)]
    assert switches(Protocol(), {"chat_template": True}) == [("drllm_arc", None), ("gsm8k", None)]
    assert switches(everywhere, {"chat_template": False}) == [("drllm_arc", False), ("gsm8k", None)]
    assert switches(Protocol(), {"chat_template": False}) == [("drllm_arc,gsm8k", None)]
    (text,) = describe_parts([part.record for part in Protocol().parts("drllm_arc", checkpoint(direct))])
    assert text.startswith("drllm_arc: with chat template (enable_thinking=False)")
