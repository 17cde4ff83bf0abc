import json

import pytest

from drllm.errors import UserError
from drllm.questions.grading import can_still_be_right, grade
from drllm.questions.hub_rows import distinct
from drllm.questions.prompts import apply_template, render_prompt
from drllm.questions.response_format import ResponseFormat
from drllm.questions.sets import SETS, expand_sets, load_questions


def _arc(question="Which is hot?", answer="B", labels="ABCD", **extra):
    texts = [f"option {label}" for label in labels]
    return {
        "id": "x",
        "question": question,
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": answer,
        **extra,
    }


def _dart(query="What is 1+1?", answer="2", level=1):
    return {"query": query, "gt_ans": answer, "query_metadata": {"level": level, "subject": "Algebra"}}


def _squad(answers):
    return {"context": "Paris is big.", "question": "What is big?", "answers": {"text": answers, "answer_start": []}}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_arc_rows_keep_their_own_labels(tmp_path):
    _write(
        tmp_path / "arc_easy_train.jsonl",
        [_arc("q1", "3", "1234"), _arc("q2", "C", "ABC"), _arc("q3", "E", "ABCDE")],
    )
    questions = load_questions("arc_easy", "train", tmp_path)
    assert [question.labels for question in questions] == [tuple("1234"), tuple("ABC"), tuple("ABCDE")]
    assert grade(questions[0], " 3")
    assert not grade(questions[0], " C")
    assert grade(questions[2], " E.")
    assert can_still_be_right(questions[1], " C")
    assert not can_still_be_right(questions[1], " A\n\nB")


def test_prompts_are_as_published(tmp_path):
    _write(tmp_path / "arc_easy_train.jsonl", [_arc(labels="ABC")])
    _write(tmp_path / "dart_math_train.jsonl", [_dart(level=3)])
    _write(tmp_path / "squad_v2_train.jsonl", [_squad(["Paris"])])
    (arc,) = load_questions("arc_easy", "train", tmp_path)
    (dart,) = load_questions("dart-3", "train", tmp_path)
    (squad,) = load_questions("squadv2", "train", tmp_path)
    assert render_prompt(arc) == (
        "Question: Which is hot?\nA. option A\nB. option B\nC. option C\n"
        "Answer with the label of the correct option only.\nAnswer:"
    )
    assert render_prompt(dart) == ("Problem: What is 1+1?\nGive only the final answer, as \\boxed{answer}.\nAnswer:")
    assert render_prompt(squad) == (
        "Passage: Paris is big.\nQuestion: What is big?\n"
        "Answer with a span of the passage, or with unanswerable.\nAnswer:"
    )


def test_dart_pool_becomes_five_sets_of_distinct_questions(tmp_path):
    rows = [_dart(f"q{n}", str(n), 1 + n % 5) for n in range(20)]
    rows += [{**row, "query": " " + row["query"] + "\n"} for row in rows] * 3
    rows += [_dart("no level", "1", None), _dart("no level", "1", "Level ?"), _dart("no answer", "", 2)]
    _write(tmp_path / "dart_math_train.jsonl", rows)
    found = {name: load_questions(name, "train", tmp_path) for name in expand_sets("dart")}
    assert [len(questions) for questions in found.values()] == [4] * 5
    assert [question.text for question in found["dart-2"]] == ["q1", "q6", "q11", "q16"]
    assert len({question.id for questions in found.values() for question in questions}) == 20


def test_level_may_be_written_as_in_math(tmp_path):
    _write(tmp_path / "dart_math_train.jsonl", [_dart(level="Level 4"), _dart("q", level="5")])
    assert len(load_questions("dart-4", "train", tmp_path)) == 1
    assert len(load_questions("dart-5", "train", tmp_path)) == 1


def test_question_ids_depend_on_content_only(tmp_path):
    _write(tmp_path / "arc_easy_train.jsonl", [_arc("a  b")])
    _write(tmp_path / "arc_easy_test.jsonl", [_arc("a b", id="other"), _arc("a c")])
    _write(tmp_path / "arc_challenge_test.jsonl", [_arc("a b")])
    (train,) = load_questions("arc_easy", "train", tmp_path)
    same, other = load_questions("arc_easy", "test", tmp_path)
    assert train.id == same.id != other.id
    assert load_questions("arc_challenge", "test", tmp_path)[0].id != train.id


def test_commonsense_and_squad(tmp_path):
    _write(tmp_path / "commonsense_qa_validation.jsonl", [_arc(answer="E", labels="ABCDE")])
    _write(tmp_path / "squad_v2_validation.jsonl", [_squad(["Paris", "the city"]), {**_squad([]), "context": "x"}])
    assert grade(load_questions("commonsense", "test", tmp_path)[0], " E")
    answerable, unanswerable = load_questions("squadv2", "test", tmp_path)
    assert grade(answerable, " The City.")
    assert not grade(answerable, " unanswerable")
    assert grade(unanswerable, " unanswerable\n")
    assert not can_still_be_right(unanswerable, "Paris\n")


def test_json_and_parquet_and_limit(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [_arc(f"q{n}") for n in range(5)]
    (tmp_path / "arc_easy_train.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "arc_easy_test.parquet")
    assert len(load_questions("arc_easy", "train", tmp_path)) == 5
    assert load_questions("arc_easy", "test", tmp_path, limit=2) == load_questions("arc_easy", "test", tmp_path)[:2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "no column 'answerKey'"),
        (_arc(answer="Z"), "answerKey 'Z' is none of the labels"),
        ({**_arc(), "choices": ["a", "b"]}, "column 'choices' must hold"),
        ({**_arc(), "choices": {"text": ["a", "b"], "label": ["A"]}}, "every choice needs its own label"),
        ({**_arc(), "choices": {"text": None, "label": 3}}, "column 'choices' must hold"),
        ({**_arc(), "choices": {"text": ["a", None], "label": ["A", "B"]}}, "'choices.text' holds None in its list"),
        ({**_arc(), "choices": {"text": ["a", "b"], "label": ["A", None]}}, "'choices.label' holds None in its list"),
        ({**_arc(), "question": ""}, "column 'question' holds '', expected text"),
        ([1], "expected an object"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, row, message):
    _write(tmp_path / "arc_easy_train.jsonl", [_arc(), row])
    with pytest.raises(UserError, match=r"arc_easy_train\.jsonl:2: ") as error:
        load_questions("arc_easy", "train", tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_dart(level=7), "level is 7, expected 1 to 5"),
        ({"query": "q", "gt_ans": "1"}, "'query_metadata' must hold"),
        ({"query": "q", "query_metadata": {"level": 1}}, "no column 'gt_ans'"),
    ],
)
def test_bad_dart_rows(tmp_path, row, message):
    _write(tmp_path / "dart_math_train.jsonl", [row])
    with pytest.raises(UserError, match=r"dart_math_train\.jsonl:1: ") as error:
        load_questions("dart-1", "train", tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("stem", "row"),
    [
        ("truthfulqa_mc_validation", {"question": "q", "mc1_targets": {"choices": ["a", None], "labels": [1, 0]}}),
        ("squad_v2_train", _squad(["Paris", None])),
        ("hellaswag_train", {"activity_label": "l", "ctx_a": "c", "ctx_b": "", "endings": ["a", None], "label": 0}),
    ],
)
def test_null_is_no_option(tmp_path, stem, row):
    _write(tmp_path / f"{stem}.jsonl", [row])
    name = {"truthfulqa_mc_validation": "truthfulqa_mc1", "squad_v2_train": "squadv2"}.get(stem, "hellaswag")
    with pytest.raises(UserError, match=rf"{stem}\.jsonl:1: column '.*' holds None in its list, expected text"):
        load_questions(name, "test" if stem.endswith("validation") else "train", tmp_path)


def test_null_is_no_context(tmp_path):
    row = {"activity_label": "l", "ctx_a": "c", "ctx_b": None, "endings": ["a", "b"], "label": 0}
    _write(tmp_path / "hellaswag_train.jsonl", [row])
    assert "None" not in load_questions("hellaswag", "train", tmp_path)[0].text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_files_of_another_encoding_are_named(tmp_path, encoding):
    (tmp_path / "arc_easy_train.jsonl").write_text(json.dumps(_arc()) + "\n", encoding=encoding)
    with pytest.raises(UserError, match=rf"arc_easy_train\.jsonl: the file is {encoding.upper()}.*, expected UTF-8"):
        load_questions("arc_easy", "train", tmp_path)


def test_other_encodings(tmp_path):
    (tmp_path / "arc_easy_train.jsonl").write_text(json.dumps(_arc()) + "\n", encoding="utf-8-sig")
    assert len(load_questions("arc_easy", "train", tmp_path)) == 1
    accented = json.dumps([_arc("où ?")], ensure_ascii=False).encode("latin-1")
    (tmp_path / "arc_easy_train.jsonl").write_bytes(accented)
    with pytest.raises(UserError, match=r"arc_easy_train\.jsonl:1: not UTF-8 .*convert the file"):
        load_questions("arc_easy", "train", tmp_path)
    (tmp_path / "arc_easy_train.jsonl").rename(tmp_path / "arc_easy_train.json")
    with pytest.raises(UserError, match=r"arc_easy_train\.json: not UTF-8 .*convert the file"):
        load_questions("arc_easy", "train", tmp_path)


def test_missing_and_cut_off_files(tmp_path):
    with pytest.raises(UserError, match=r"data folder .*nowhere does not exist"):
        load_questions("arc_easy", "train", tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no arc_easy_train\.jsonl"):
        load_questions("arc_easy", "train", tmp_path)
    (tmp_path / "arc_easy_train.jsonl").write_text(json.dumps(_arc()) + '\n{"question": "cut')
    with pytest.raises(UserError, match=r"arc_easy_train\.jsonl:2: not valid JSON"):
        load_questions("arc_easy", "train", tmp_path)
    (tmp_path / "arc_easy_train.jsonl").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"arc_easy_train\.jsonl:1: not valid JSON"):
        load_questions("arc_easy", "train", tmp_path)
    (tmp_path / "dart_math_train.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no question of the set 'dart-1'"):
        load_questions("dart-1", "train", tmp_path)


def test_unknown_names():
    assert expand_sets("arc,dart-2,arc_easy") == ["arc_easy", "arc_challenge", "dart-2"]
    for call in (lambda: expand_sets("arc,darts"), lambda: load_questions("darts")):
        with pytest.raises(UserError, match=r"unknown question set 'darts'.*dart-5"):
            call()
    with pytest.raises(UserError, match="'dart' is a group"):
        load_questions("dart")
    with pytest.raises(UserError, match="no split 'dev'"):
        load_questions("arc_easy", "dev")


def test_all_of_the_dart_pool_trains_and_the_test_problems_of_math_test(monkeypatch):
    import datasets

    pool = [{**_dart(f"question {n % 200}", str(n % 200), 1), "resp": "long"} for n in range(600)]
    solution = r"First $x=\boxed{1}$, then $\boxed{\frac{1}{2}}$."
    math = {"level": "Level 1", "type": "Algebra", "solution": solution}
    loaded = []

    def fake(path, config, split):
        loaded.append((path, config, split))
        if split == "train":
            return datasets.Dataset.from_list(pool)
        rows = [math | {"problem": f"test {config}"}, math | {"problem": "other level", "level": "Level 2"}]
        return datasets.Dataset.from_list([*rows, math | {"problem": "without a box", "solution": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    train = load_questions("dart-1", "train")
    assert loaded == [("hkust-nlp/dart-math-pool-math", None, "train")]
    assert {question.text for question in train} == {f"question {n}" for n in range(200)}
    test = load_questions("dart-1", "test")
    assert len(test) == 7
    assert {call[0] for call in loaded[1:]} == {"EleutherAI/hendrycks_math"}
    assert test[0].text == "test algebra"
    assert {question.answer for question in test} == {r"\frac{1}{2}"}


def test_of_the_pools_equal_rows_the_first_is_read_and_the_order_stays():
    import datasets

    def row(query, level, answer, **more):
        return {"query": query, "gt_ans": answer, "query_metadata": {"level": level, "id": None}, **more}

    kept = [row("b", 1, "1"), row("a", 1, "1"), row("a", 2, "1"), row("a", 1, None), row("b", 1, "2")]
    rows = [kept[0], kept[1], kept[0], kept[2], kept[1], kept[3], kept[3], kept[4], kept[2]]
    table = datasets.Dataset.from_list(rows).with_format("arrow")[:]
    assert distinct(table).to_pylist() == kept


def test_hub_failure_names_the_way_out(monkeypatch):
    import datasets

    def fail(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"allenai/ai2_arc.*--data_dir"):
        load_questions("arc_easy")


def test_limits_and_samples_are_the_papers():
    assert [SETS[name].samples for name in expand_sets("arc,dart")] == [400, 600, 200, 400, 600, 800, 1000]
    assert (ResponseFormat().limit("arc_easy", chat=False), ResponseFormat().limit("arc_easy", chat=True)) == (2, 10)
    assert (ResponseFormat().limit("dart-1", chat=False), ResponseFormat().limit("dart-5", chat=True)) == (15, 15)


class _Tokenizer:
    name_or_path = "some/model"
    chat_template = None

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **template_arguments):
        assert not tokenize
        fixed = {"date_string": "26 Jul 2024", "enable_thinking": False}
        assert template_arguments == fixed, "prompts must not depend on today's date"
        assert add_generation_prompt
        return f"<user>{messages[0]['content']}<assistant>"


def test_chat_template_is_explicit():
    tokenizer = _Tokenizer()
    assert apply_template("p", tokenizer, chat=False) == "p"
    with pytest.raises(UserError, match="some/model has no chat template"):
        apply_template("p", tokenizer, chat=True)
    tokenizer.chat_template = "x"
    assert apply_template("p", tokenizer, chat=True) == "<user>p<assistant>"
