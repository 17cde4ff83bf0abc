"""The part of a response that holds its answer: without thinking blocks and end-of-turn tokens."""

from __future__ import annotations

import re

# End-of-turn tokens that are decoded as text, and what comes after them.
_END_TOKEN = re.compile(
    r"</s>|<\|(?:im_end|eot_id|endoftext|end_of_text|end|eom_id|im_start|start_header_id)\|>|<end_of_turn>|<eos>"
)
_TAGS = "think|thinking|thought|reasoning|analysis|scratchpad"
_THINKING = re.compile(rf"<(?:{_TAGS})>", re.IGNORECASE)
_THINKING_BLOCK = re.compile(rf"<({_TAGS})>.*?</\1>", re.IGNORECASE | re.DOTALL)

# "The answer", in the languages that models answer in.
ANNOUNCED = (
    r"(?:(?:final\s+|correct\s+|right\s+|best\s+)?(?:answer|solution|result|option|choice|label)"
    r"|r[ée]ponse(?:\s+(?:finale|correcte))?|bonne\s+r[ée]ponse|antwort|l[öo]sung|respuesta(?:\s+(?:final|correcta))?|risposta"
    r"|resposta|antwoord|odpowied[źz]|svar(?:et)?|vastaus|ответ|відповідь|cevap|jawaban|câu trả lời|đáp án|उत्तर|"
    r"答え|解答|正解|回答|答案|정답|답|الإجابة|الجواب|תשובה)"
)


def final_text(response: str) -> str | None:
    """`response` without thinking blocks and before its end token, or None where nothing remains.

    A block that is not closed goes on to the end. A closing tag alone ends nothing: the answer before it would
    already have been graded.

    >>> final_text("<think>A or C?</think> B</s>")
    '\\n B'
    """
    text = _THINKING_BLOCK.sub("\n", response)
    text = _THINKING.split(_END_TOKEN.split(text, maxsplit=1)[0], maxsplit=1)[0]
    return text if text.strip() else None
