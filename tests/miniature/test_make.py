"""The embedded default: its questions are kept apart and come out again from the seed; its model answers."""

import json
import os
import re
import signal
import statistics

import pytest

from drllm.questions.grading import grade
from drllm.questions.prompts import render_prompt
from drllm.questions.sets import load_questions
from miniature import make

DATA = make.HERE / "data"
FILES = ("arc_easy", "arc_challenge", "dart_math")
TRAIN, TEST = 800, 400


def rows(stem: str, part: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{stem}_{part}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn() -> dict[tuple[str, str], list[make.Question]]:
    """The questions of the files, made anew from the seed."""
    numbers = {"train": TRAIN, "test": TEST}
    return {(s, part): make.questions(s, part, n, seed=0) for s in make.SETS for part, n in numbers.items()}


@pytest.mark.parametrize("part", ["train", "test"])
def test_files_have_the_schemas_of_the_hub(part):
    for stem in ("arc_easy", "arc_challenge"):
        for r in rows(stem, part):
            assert set(r) == {"id", "question", "choices", "answerKey"}
            assert r["choices"]["label"] == ["A", "B", "C", "D"]
            assert len(set(r["choices"]["text"])) == 4
            assert r["answerKey"] in r["choices"]["label"]
    for r in rows("dart_math", part):
        assert set(r) == {"query", "gt_ans", "query_metadata"}
        assert 0 <= int(r["gt_ans"]) <= make.LARGEST_NUMBER
        assert r["query_metadata"]["level"] in range(1, 6)
        assert {"subject", "id"} < set(r["query_metadata"])


@pytest.mark.parametrize("part", ["train", "test"])
def test_ids_are_unique(part):
    for stem in ("arc_easy", "arc_challenge"):
        ids = [r["id"] for r in rows(stem, part)]
        assert len(set(ids)) == len(ids)
    ids = [r["query_metadata"]["id"] for r in rows("dart_math", part)]
    assert len(set(ids)) == len(ids)


def test_files_come_out_again_from_the_seed(tmp_path):
    make.write_questions(tmp_path, TRAIN, TEST, seed=0)
    for stem in FILES:
        for part in ("train", "test"):
            name = f"{stem}_{part}.jsonl"
            assert (tmp_path / name).read_text() == (DATA / name).read_text(), name


def test_no_content_is_in_two_parts(drawn):
    """Search, test and what the base model saw are disjoint by content, over all sets together."""
    keys = {part: {q.key for (_, p), asked in drawn.items() if p == part for q in asked} for part in ("train", "test")}
    keys["pretrain"] = {q.key for batch, _ in make.batches(seed=0, start=0, steps=10, size=2_000) for q in batch}
    assert len(keys["pretrain"]) > 10_000
    for a, b in (("train", "test"), ("train", "pretrain"), ("test", "pretrain")):
        assert not keys[a] & keys[b]
    for part, contents in keys.items():
        assert {make.part_of(key) for key in contents} == {part}


def normalised(question: make.Question) -> tuple:
    """A question's content read off its text alone: numbers, lexicon words and options, sorted; wording dropped."""
    words = "".join(c if c.isalnum() else " " for c in question.text).split()
    lexicon = {w for group in make.CATEGORIES.values() for w in group}
    content = sorted(w for w in words if w.isdigit() or w in lexicon)
    return question.kind, tuple(content), tuple(sorted(question.choices))


def test_the_files_of_the_comparison_with_controls_share_no_content():
    """`make claim` searches, trains and validates on 1,900 questions a set, and tests on 1,900 others."""
    keys = {
        part: {q.key for name in make.SETS for q in make.questions(name, part, 1900, seed=0)}
        for part in ("train", "test")
    }
    assert len(keys["test"]) > 10_000
    assert not keys["train"] & keys["test"]
    assert {make.part_of(key) for key in keys["test"]} == {"test"}


def test_keys_tell_contents_apart_no_finer_than_the_text(drawn):
    """No key can split one content over two parts: contents compared by text, whatever order the words are in."""
    # Kinds in which the order of the numbers is part of the content; for these the text itself is compared.
    ordered = {"double, add", "remainder", "multiply, add", "add, multiply", "add, subtract", "larger, add",
               "count", "larger sum", "difference of products", "story sum", "story difference", "larger",
               "closest"}  # fmt: skip
    parts: dict[str, set] = {}
    for (_, part), asked in drawn.items():
        contents = ((q.text, tuple(sorted(q.choices))) if q.kind in ordered else normalised(q) for q in asked)
        parts.setdefault(part, set()).update(contents)
    assert not parts["train"] & parts["test"]


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("sum", "What do you get when you add the two numbers 7 and 30?", "add the two numbers 30 and 7?"),
        ("add, multiply", "Add 4 and 9 and", "Add 9 and 4 and"),
    ],
)
def test_commuted_operands_are_the_same_content(kind, one, other):
    keys = {}
    set_name = next(s for s, kinds in make.KINDS.items() if kind in kinds)
    rng = make.random.Random(1)
    for _ in range(200_000):
        key, text, _, _ = make.KINDS[set_name][kind](rng)
        for wanted in (one, other):
            if wanted in text and (kind == "sum" or "by 3" in text):
                keys[wanted] = key
        if len(keys) == 2:
            break
    assert keys[one] == keys[other]


def test_sums_have_one_key_in_every_set():
    """7 + 30 in a story, as plain numbers and as an ARC question is one content."""
    rng = make.random.Random(2)
    for generate in (make.story_sum, make.plain_sum, make.sum_choice):
        assert json.loads(generate(rng)[0])[0] == "+"


def test_answers_are_right(drawn):
    """The answers, computed again from the text by other code."""

    def numbers(q):
        return [int(n) for n in re.findall(r"\d+", q.text)]

    solve = {
        "story sum": sum, "sum": sum,
        "story difference": lambda n: n[0] - n[1], "difference": lambda n: n[1] - n[0],
        "add, subtract": lambda n: n[0] + n[1] - n[2], "double, add": lambda n: 2 * n[0] + n[1],
        "larger sum": lambda n: max(n[0] + n[1], n[2] + n[3]), "add, multiply": lambda n: (n[0] + n[1]) * n[2],
        "remainder": lambda n: n[0] % n[1], "median": statistics.median,
        "multiply, add": lambda n: n[0] * n[1] + n[2], "difference of products": lambda n: n[0] * n[1] - n[2] * n[3],
    }  # fmt: skip
    checked = set()
    for asked in drawn.values():
        for q in asked:
            chosen = q.choices[make.LABELS.index(q.answer)] if q.choices else q.answer
            if q.kind in solve:
                assert int(q.answer) == solve[q.kind](numbers(q)), q
            elif q.kind in ("larger", "larger, add"):
                n = numbers(q)
                pick = max if "larger" in q.text else min
                assert int(q.answer) == pick(n[:2]) + sum(n[2:]), q
            elif q.kind == "count":
                asked_for, listed = re.search(r"times is (\w+) in the list (.*)\?", q.text).groups()
                assert int(q.answer) == listed.split().count(asked_for)
            elif q.kind == "largest":
                assert int(chosen) == max(map(int, q.choices))
            elif q.kind == "second largest":
                assert int(chosen) == sorted(map(int, q.choices))[2]
            elif q.kind == "smallest":
                assert int(chosen) == min(map(int, q.choices))
            elif q.kind == "category":
                assert chosen in make.CATEGORIES[q.text.removeprefix("Which word names ").rstrip("?")]
            elif q.kind == "closest":
                assert abs(int(chosen) - numbers(q)[0]) == min(abs(int(c) - numbers(q)[0]) for c in q.choices)
            elif q.kind == "sum choice":
                assert int(chosen) == sum(numbers(q))
                assert q.choices.count(chosen) == 1
            else:
                raise AssertionError(f"no check for {q.kind}")
            checked.add(q.kind)
    assert checked == {kind for kinds in make.KINDS.values() for kind in kinds}


def test_fewer_options_leave_the_answer_right():
    rng = make.random.Random(3)
    for asked in (make.questions(s, "train", 60, 0) for s in ("arc_easy", "arc_challenge")):
        for q in asked:
            less = make.fewer_options(rng, q)
            assert less.choices[make.LABELS.index(less.answer)] == q.choices[make.LABELS.index(q.answer)]
            assert set(less.choices) <= set(q.choices)
            assert (less == q) == (q.kind == "second largest")


def test_labels_are_balanced(drawn):
    for s in ("arc_easy", "arc_challenge"):
        answers = [q.answer for q in drawn[s, "train"]]
        for label in make.LABELS:
            assert 0.18 < answers.count(label) / len(answers) < 0.32


def test_prompts_are_those_of_the_search():
    for s in ("arc_easy", "arc_challenge", "dart-1", "dart-5"):
        ours = make.questions(s, "test", 5, seed=0)
        theirs = load_questions(s, "test", DATA, limit=5)
        for mine, other in zip(ours, theirs, strict=True):
            assert render_prompt(other) == mine.prompt
            assert grade(other, mine.response)


def test_a_smaller_number_is_a_prefix():
    assert make.questions("dart-4", "test", 30, 0) == make.questions("dart-4", "test", 60, 0)[:30]


def test_asking_for_more_contents_than_there_are_is_said(monkeypatch):
    tiny = {"tiny": lambda rng: (make._key("tiny", rng.randrange(40)), "?", (), "1")}
    monkeypatch.setitem(make.KINDS, "dart-1", tiny)
    with pytest.raises(ValueError, match="dart-1 has only"):
        make.questions("dart-1", "test", 50, 0)


# ---------------------------------------------------------------------------------------- tokenizer and model


@pytest.fixture(scope="module")
def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(make.HERE / "model")


@pytest.fixture(scope="module")
def model():
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(make.HERE / "model", dtype=torch.float32)
    assert type(loaded) is transformers.LlamaForCausalLM
    return loaded.eval()


def test_tokenizer_round_trip(tokenizer, drawn):
    """Every question and response: no unknown token, decoding gives the text back."""
    for asked in drawn.values():
        texts = [q.prompt + q.response for q in asked]
        ids = tokenizer(texts)["input_ids"]
        assert not any(tokenizer.unk_token_id in row for row in ids)
        assert tokenizer.batch_decode(ids) == texts
        assert all(len(row) <= 30 for row in ids)


def test_prompt_and_response_are_tokenised_apart_as_together(tokenizer):
    for s in make.SETS:
        for q in make.questions(s, "test", 10, 0):
            assert tokenizer(q.prompt + q.response)["input_ids"] == (
                tokenizer(q.prompt)["input_ids"] + tokenizer(q.response)["input_ids"]
            )


def test_special_tokens(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0}) == 4
    assert tokenizer("Question:")["input_ids"] == [0]  # id 0 is a token like others, and nothing is added in front
    assert tokenizer.decode(tokenizer("quite unknown")["input_ids"]).count("<unk>") == 2


def test_tokenizer_is_the_one_of_the_script(tokenizer):
    assert tokenizer.get_vocab() == make.build_tokenizer().get_vocab()


def test_model_is_stock_llama_with_ten_blocks_in_a_few_megabytes(model):
    assert model.config.num_hidden_layers >= 10
    assert 1.5e6 < sum(p.numel() for p in model.parameters()) < 3.5e6
    assert (make.HERE / "model" / "model.safetensors").stat().st_size < 8e6
    assert all((p == p.bfloat16().float()).all() for p in model.parameters())


def test_model_answers_by_greedy_decoding(model, tokenizer):
    """transformers' own generate on 40 test questions a set, left-padded; it agrees with the quick check."""
    import torch

    torch.set_num_threads(1)
    shares = {}
    for s in make.SETS:
        asked = make.questions(s, "test", 40, seed=0)
        inputs = tokenizer([q.prompt for q in asked], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                                 max_new_tokens=5, do_sample=False)  # fmt: skip
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [text == q.response for text, q in zip(texts, asked, strict=True)]
        quick = make.correct(model, tokenizer, asked).tolist()
        assert sum(a != b for a, b in zip(right, quick, strict=True)) <= 1  # rounding may turn a tie
        shares[s] = sum(right) / len(right)
    # The README has 99, 92, 95, 64, 73, 64 and 49 percent on 400 a set; 40 questions are within 15 points of that.
    assert shares["arc_easy"] > 0.9, shares
    assert 0.3 < shares["dart-5"] < 0.7, shares
    assert 0.65 < sum(shares.values()) / len(shares) < 0.88, shares


def test_paths_of_pretraining_skip_and_repeat(model, tokenizer):
    """Against a plain loop over blocks, row by row."""
    import torch

    asked = make.questions("dart-3", "test", 4, 0)
    ids, _ = make.encode(asked, tokenizer)
    paths = torch.tensor([[1] * 10, [0, 1] * 5, [2] * 10, [1, 0, 2, 1, 0, 0, 1, 2, 1, 1]])
    with torch.no_grad():
        ours = make.hidden_along_paths(model, ids, paths)
        assert torch.allclose(ours[0], model.model(ids[:1]).last_hidden_state[0], atol=1e-4)
        for b in range(4):
            hidden = model.model.embed_tokens(ids[b : b + 1])
            rotary = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
            for layer, times in enumerate(paths[b].tolist()):
                for _ in range(times):
                    hidden = model.model.layers[layer](hidden, attention_mask=None, position_embeddings=rotary)
            assert torch.allclose(model.model.norm(hidden)[0], ours[b], atol=1e-4)


@pytest.mark.slow
def test_training_goes_on_from_its_checkpoint(tmp_path):
    """A run that is killed after a checkpoint and started again ends with the weights of an undisturbed one."""
    import subprocess
    import sys
    import time

    from safetensors.torch import load_file

    def command(name: str, steps: int = 200) -> list[str]:
        return [sys.executable, str(make.HERE / "make.py"), "train", "--output_dir", str(tmp_path / name), "--steps",
                str(steps), "--save_steps", "50", "--processes", "1", "--batch_size", "8", "--blocks", "2",
                "--width", "32"]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True)
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "killed.checkpoint").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = subprocess.run(command("killed"), check=True, capture_output=True, text=True)
    assert "from step 0" not in again.stdout
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all((whole[k] == resumed[k]).all() for k in whole)

    refused = subprocess.run(command("whole", steps=250), capture_output=True, text=True)
    assert refused.returncode != 0
    assert "other arguments" in refused.stderr
