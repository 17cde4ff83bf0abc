"""The label of a response: one rule for letters and digits, alternatives, thinking blocks, other languages."""

import pytest

from drllm.questions.grading import extract_label, label_can_still_be_right

LETTERS = ("A", "B", "C", "D")
DIGITS = ("1", "2", "3", "4")

WAYS = [
    "{}", "({})", "{})", "{}.", "[{}]", "**{}**", "*{}*", "_{}_", "__{}__", "`{}`", '"{}"', "${}$", r"\({}\)",
    r"\boxed{{{}}}", r"\text{{{}}}", "={}", "#{}", "→ {}", "- {}", "{},", "{}!", "{}</s>", "{}<|im_end|>",
    "<answer>{}</answer>",
    "<b>{}</b>", "Answer:{}", "Answer = {}", "Answer:**{}**", "**Answer: {}**", "The answer is **{}**.",
    "The answer is: {}",
    'The answer is "{}"', "Final answer: ({})", "The correct answer is option {}.", "The answer is number {}.",
    "Option {}", "It is {}.", "I choose {}.", "{} is right", "{} because it is", "{} would be right", "{}\nthe rest",
    "{}: the sun",
    "{} - the sun", "答案是{}", "答案：{}", "选{}", "正解は{}です", "答えは{}", "정답은 {}입니다", "Réponse : {}",
    "Antwort: {}", "La respuesta es {}", "La risposta è {}", "Ответ: {}", "<think>1 or A?</think>{}",
    "<think>hm</think>\n\n**{}**",
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_one_rule_for_all_labels(way):
    for labels in (LETTERS, DIGITS):
        for label in labels:
            assert extract_label(way.format(label), labels) == label
    full_width = way.format("Ｃ"), way.format("３")
    assert [extract_label(full_width[0], LETTERS), extract_label(full_width[1], DIGITS)] == ["C", "3"]


@pytest.mark.parametrize(
    "response",
    ["A or B", "A/B", "B or C", "Either B or C", "(A) or (B)", "**A** or **B**", "A or B or C", "A | B", "A oder B",
    "A ou B",
     "The answer is A or B", "A or maybe B", "A或B", "A, B", "A, B.", "A, B or C", "A, B, and C"],
)  # fmt: skip
def test_alternatives_name_no_option(response):
    assert extract_label(response, LETTERS) is None
    digits = response.translate(str.maketrans("ABC", "123"))
    assert extract_label(digits, DIGITS) is None


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("A or B? B.", "B"),  # named after all
        ("A, because", "A"),
        ("A, B is wrong", "A"),
        ("<think>A or C?</think>B", "B"),
        ("<think>A</think>", None),
        ("<think>A is right. So", None),  # cut off while it thinks
        ("<think>\nOkay, B", None),
        ("B <think>or C?", "B"),
        ("<thinking>A</thinking>\nC", "C"),
        ("not B but C", "C"),
        ("（Ｃ）", "C"),
        ("réponse b", "B"),
        ("Answer: (c) the sun", "C"),
        ("A dog or B", "B"),
        # words that only look like labels
        ("A good one", None),
        ("A man is tall", None),
        ("Vitamin D", None),
        ("A-frame", None),
        ("D'accord", None),
        ("B.C. was", None),
        ("Because", None),
    ],
)
def test_letters(response, label):
    assert extract_label(response, LETTERS) == label


@pytest.mark.parametrize(
    "response",
    ["4.5", "14", "3 apples", "2 + 2 = 4", "2+2=4", "x=4", "1/2", "3*4", "3 > 2", "4^2", "4%", "4°", "$4.50",
    "costs $4 now",
     "4:30", "1,000", "-4", "4th", "4cm", "Step 1: look", "There are 3 of them", "4 or 5", "the 4 seasons"],
)  # fmt: skip
def test_digits_inside_numbers_and_counts_are_no_labels(response):
    assert extract_label(response, DIGITS) is None


def test_i_is_a_word():
    labels = ("G", "H", "I")
    assert extract_label("I would say H", labels) == "H"
    assert extract_label("I is right", labels) == "I"


def test_a_label_is_final_only_when_no_alternative_can_follow():
    assert label_can_still_be_right("A", LETTERS, "B")
    assert label_can_still_be_right("A or", LETTERS, "B")
    assert label_can_still_be_right("A or B", LETTERS, "C")  # may go on to name C
    assert label_can_still_be_right("<think>A. ", LETTERS, "C")
    assert not label_can_still_be_right("A because ", LETTERS, "B")
    assert not label_can_still_be_right("**4** the ", DIGITS, "3")
