import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from drllm.questions import math_answers
from drllm.questions.grading import (
    extract_label,
    grade_label,
    grade_span,
    label_can_still_be_right,
    span_can_still_be_right,
)
from drllm.questions.math_answers import grade_math, math_can_still_be_right
from drllm.questions.math_checker import CheckerPool, SymbolicChecker
from drllm.questions.response_text import first_box, last_box

LETTERS = ("A", "B", "C", "D")
DIGITS = ("1", "2", "3", "4")


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("B", "B"),
        (" B", "B"),
        (" B.", "B"),
        ("(B)", "B"),
        ("**C**", "C"),
        ("\n\nC", "C"),
        ("b", "B"),
        ("b.\nnext", "B"),
        ("The answer is B", "B"),
        ("the answer is b.", "B"),
        ("Answer: (c) the sun", "C"),
        ("I think it's C.", "C"),
        ("The correct option is D.", "D"),
        ("B The sun", "B"),
        ("B because it is hot", "B"),
        ("A", "A"),
        ("A.", "A"),
        ("A\nthe rest", "A"),
        ("A because it is hot", "A"),
        ("A: the sun", "A"),
        # no option is named
        ("", None),
        ("A good answer", None),
        ("a good answer", None),
        ("Because", None),
        ("E", None),
        ("the sun", None),
        ("A-frame", None),
        ("D'accord", None),
        ("U.S.A", None),
        ("B.C. was long ago", None),
        # the first that is named counts
        ("A good answer is (C)", "C"),
        ("Based on the text, D", "D"),
    ],
)
def test_label_of_a_response(response, label):
    assert extract_label(response, LETTERS) == label


@pytest.mark.parametrize(
    ("response", "label"),
    [(" 2", "2"), ("(4)", "4"), ("2. the sun", "2"), ("3 apples", None), ("3.5", None), ("1/2", None), ("12", None)],
)
def test_numeric_labels_are_not_mistaken_for_numbers(response, label):
    assert extract_label(response, DIGITS) == label


def test_labels_are_those_of_the_item():
    assert extract_label(" E", ("A", "B", "C", "D", "E")) == "E"
    assert extract_label(" D", ("A", "B", "C")) is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r" \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}} and \boxed{3}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a\}", None),
        (r"\boxed{\frac{1}{2}", None),
        ("42", None),
    ],
)
def test_first_closed_box(text, content):
    assert first_box(text) == content


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so $\boxed{3}$, no, $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"The answer is $\boxed 5$.", "5"),
        (r"It is $\boxed 3.5$.", "3.5"),
        (r"It is $\boxed 1,000$.", "1,000"),
        (r"It is $\boxed 12\%$, or $\fbox 7, 8$", "7"),
        (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"$\boxed \frac12.$", r"\frac12"),
        (r"$\boxed\sqrt{5}$", r"\sqrt{5}"),
        (r"$\boxed\text{odd}$", r"\text{odd}"),
        (r"$\boxed{1}$, see \boxedfigure 2", "1"),
        (r"\fbox{\text{odd}}", r"\text{odd}"),
        (r"\boxed{3", None),
        ("3", None),
    ],
)
def test_the_last_box_is_the_answer_of_a_solution(solution, answer):
    assert last_box(solution) == answer


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", r" \boxed{42}"),
        ("42", "42"),
        ("42", " 42.\n\nProblem: what is 7?"),
        ("42", "The answer is $42$."),
        ("-7", r"\boxed{ -7 }"),
        (r"\frac12", r"\boxed{0.5}"),
        (r"\text{June 20}", r"\boxed{June 20}"),
        ("Monday", r"\boxed{\text{Monday}}"),
        (r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}"),
        (r"\frac{1}{2}", "1/2"),
        (r"4 \text{ feet}", r"\boxed{4}"),
        (r"\$15,\!000", r"\boxed{15000}"),
        ("(-4,4)", r"\boxed{\left( -4, 4 \right)}"),
        ("(2) (x+2) (x-2)", r"\boxed{2(x^2-4)}"),
        ("7,9,12,13", r"\boxed{13,12,9,7}"),
        (r"\text{odd}", r"\boxed{\text{odd}}"),
    ],
)
def test_right_mathematical_answers(answer, response):
    assert grade_math(response, answer)


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        ("42", r"\boxed{43}"),
        ("42", r"\boxed{43} no, \boxed{42}"),  # the first box is the answer
        ("42", r"\boxed{42"),  # cut off
        ("42", ""),
        ("42", r"\boxed{}"),
        (r"\text{even}", r"\boxed{\text{odd}}"),
        ("2", "The problem asks for 2 things"),
        (r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"),
        ("5", r"\boxed{__import__('os').system('true')}"),
    ],
)
def test_wrong_mathematical_answers(answer, response):
    assert not grade_math(response, answer)


def test_equal_strings_and_integers_need_no_symbolic_comparison(monkeypatch):
    def fail():
        raise AssertionError("started the helper process")

    monkeypatch.setattr(math_answers, "_checkers", fail)
    math_answers._same_value.cache_clear()
    assert grade_math(r"\boxed{\dfrac{x+1}{2}}", r"\frac{x + 1}{2}")
    assert grade_math(r"\boxed{+7}", "7")
    assert not grade_math(r"\boxed{12}", "13")


def test_model_output_is_never_evaluated(tmp_path):
    marker = tmp_path / "evaluated"
    for attack in (f"open('{marker}','w')", f"__import__('pathlib').Path('{marker}').touch()"):
        assert not grade_math(rf"\boxed{{{attack}}}", "5")
        assert not grade_math(attack, "5")
    assert not marker.exists()


def test_hostile_answers_end_in_time_and_leave_the_grader_working():
    checker = SymbolicChecker(timeout_s=3)
    try:
        assert checker.equal(r"\frac{1}{2}", "0.5")  # started and warm
        for hostile in ("9^{9^{9^{9}}}", "2^{99999999999}", "99999999!", "{(" * 2000):
            start = time.monotonic()
            assert not checker.equal("5", hostile)
            assert time.monotonic() - start < 6
        assert checker.equal(r"\frac{1}{2}", "0.5")
    finally:
        checker.close()


def test_a_helper_that_hangs_is_replaced():
    checker = SymbolicChecker(stuck_s=2)
    try:
        assert checker.equal("x+1", "1+x")
        checker._process.send_signal(19)  # SIGSTOP: hangs without dying
        start = time.monotonic()
        assert not checker.equal("x+1", "1+x")
        assert time.monotonic() - start < 5
        assert checker.timeouts == 1
        assert checker.equal("x+1", "1+x")
    finally:
        checker.close()


def test_a_grade_does_not_depend_on_the_load_of_the_machine():
    checker = SymbolicChecker(timeout_s=1)
    try:
        assert checker.equal("x+1", "1+x")
        checker._process.send_signal(19)  # SIGSTOP: as if other processes had the core
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(checker.equal, r"\frac{1}{2}", "0.5")
            time.sleep(2.5)
            checker._process.send_signal(18)  # SIGCONT
            assert waiting.result()
        assert checker.timeouts == 0
    finally:
        checker.close()


def test_helpers_of_a_pool_start_when_the_others_are_busy_and_share_the_work():
    pool = CheckerPool(3)

    def started() -> int:
        return sum(checker._process is not None for checker in pool.checkers)

    try:
        assert all(pool.equal("x+1", "1+x") for _ in range(3))
        assert started() == 1, "one after the other needs one"
        busy = pool.checkers[-1]._process
        busy.send_signal(19)  # SIGSTOP: hangs without dying
        with ThreadPoolExecutor(4) as threads:
            hanging = threads.submit(pool.equal, "x+1", "1+x")
            time.sleep(0.2)
            assert all(threads.map(pool.equal, ["x+1"] * 6, ["1+x"] * 6)), "the others do not wait for it"
            assert not hanging.done()
            busy.kill()
            assert not hanging.result()
        assert 2 <= started() <= 3
        assert [pool.equal("x+1", "1+x") for _ in range(3)] == [True] * 3, "the one that died is replaced"
    finally:
        pool.close()
    assert started() == 0


def test_deep_nesting_is_refused_before_it_is_parsed():
    start = time.monotonic()
    assert not grade_math(r"\boxed{" + r"\frac{" * 40 + "1}{2}" * 40 + "}", "5")
    assert time.monotonic() - start < 0.1


def test_grading_works_in_threads():
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(grade_math(rf"\boxed{{{n}+{n}}}", f"{2 * n}.0")))
        for n in range(3, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6


@pytest.mark.parametrize(
    ("response", "right"),
    [(" the Eiffel Tower.\nmore", True), ("Eiffel tower", True), ("Eiffel", False), ("", False)],
)
def test_spans_are_compared_normalised(response, right):
    assert grade_span(response, ("Eiffel Tower", "tower of Paris")) is right


def test_unanswerable():
    assert grade_span(" unanswerable", ("unanswerable",))


def _prefixes_agree(right, can, responses):
    """Whenever the whole response is right, every prefix of it can still be right."""
    hopeless = 0
    for response in responses:
        whole = right(response)
        for end in range(len(response) + 1):
            possible = can(response[:end])
            hopeless += not possible
            assert possible or not whole, (response, response[:end])
        assert can(response) or not whole
    return hopeless


def _random_texts(pieces, count, length, seed):
    rng = random.Random(seed)
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(1, length))) for _ in range(count)]


@pytest.mark.parametrize("labels", [LETTERS, DIGITS, ("A", "B", "C", "D", "E"), ("a", "b")])
def test_no_prefix_of_a_right_label_is_given_up(labels):
    pieces = [
        *labels, *(label.lower() for label in labels), " ", " ", "\n", ".", ".", ",", ")", "(", "*", "'", "-", ":", "%",
        "ecause", "because", "is", "s", " good", "The", "answer", "option", "5", "/", "I", "\t", '"',
    ]  # fmt: skip
    for answer in labels:
        hopeless = _prefixes_agree(
            lambda response, answer=answer: grade_label(response, labels, answer),
            lambda partial, answer=answer: label_can_still_be_right(partial, labels, answer),
            _random_texts(pieces, 3000, 9, seed=labels.index(answer)),
        )
        assert hopeless > 500  # and hopeless rollouts are found


def test_a_committed_label_ends_the_rollout():
    assert not label_can_still_be_right("B. The sun", LETTERS, "C")
    assert not label_can_still_be_right(" B\n\nQ", LETTERS, "C")
    assert label_can_still_be_right(" B", LETTERS, "C")  # may become "Because"
    assert label_can_still_be_right("A is", LETTERS, "C")  # may become "A issue ... (C)"
    assert label_can_still_be_right("A    ", LETTERS, "C")  # may become "A    good answer"
    assert not label_can_still_be_right("A is r", LETTERS, "C")
    assert label_can_still_be_right("B. The sun", LETTERS, "B")


def test_no_prefix_of_a_right_box_is_given_up(monkeypatch):
    # By string: what this property is about is which candidate counts, not how values compare.
    monkeypatch.setattr(math_answers, "_same_value", lambda answer, candidate: answer == candidate)
    pieces = ["\\boxed", "{", "{", "}", "}", "1", "2", "\\", "{1}", " ", "\n", "\\boxed{12}", "\\boxed{1"]
    for answer in ("12", "1", "112"):
        hopeless = _prefixes_agree(
            lambda response, answer=answer: grade_math(response, answer),
            lambda partial, answer=answer: math_can_still_be_right(partial, answer),
            _random_texts(pieces, 3000, 8, seed=1),
        )
        assert hopeless > 500


def test_a_wrong_closed_box_ends_the_rollout():
    assert not math_can_still_be_right(r" \boxed{7} or \boxed{8}", "8")
    assert math_can_still_be_right(r" \boxed{7", "71")


def test_no_prefix_of_a_right_span_is_given_up():
    pieces = ["the ", "tower", " ", "\n", ".", "red"]
    answers = ("red tower", "tower")
    hopeless = _prefixes_agree(
        lambda response: grade_span(response, answers),
        lambda partial: span_can_still_be_right(partial, answers),
        _random_texts(pieces, 2000, 7, seed=2),
    )
    assert hopeless > 200
