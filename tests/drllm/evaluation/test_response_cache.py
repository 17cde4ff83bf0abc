import json
import pickle
import sqlite3

import pytest

from drllm.errors import UserError
from drllm.evaluation.layer_counts import Measurement
from drllm.evaluation.response_cache import ResponseCache

OPTION = Measurement("c0ffee", "0112", prefill_blocks=4, blocks=8, passes=2)
ALONE = Measurement(None, "1111", prefill_blocks=4, blocks=0, passes=0)
REQUESTS = [
    ("loglikelihood", ("prompt", " A"), (-0.1 - 0.2, True), OPTION),
    ("generate_until", ("prompt", {"until": ["\n"], "do_sample": False}), 'text "with" \\ and \u2028 é', ALONE),
    ("loglikelihood_rolling", ("text",), -1e-30, [OPTION, ALONE]),
    ("loglikelihood_rolling", ("",), 0.0, []),
]


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_answers_come_back_as_they_were(tmp_path, is_on_disk):
    path = tmp_path / "below" / "answers.db" if is_on_disk else None
    cache = ResponseCache(path, "model")
    for kind, arguments, answer, measurement in REQUESTS:
        assert cache.get(kind, arguments) is None
        cache.put(kind, arguments, answer, measurement)
    cache.forget()
    again = ResponseCache(path, "model") if is_on_disk else cache
    for kind, arguments, answer, measurement in REQUESTS:
        assert again.get(kind, arguments) == ((answer, measurement) if is_on_disk else None)
        assert ResponseCache(path, "other model").get(kind, arguments) is None


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_cache_from_elsewhere_executes_nothing(tmp_path):
    path, mark = tmp_path / "answers.db", tmp_path / "mark"
    kind, arguments, answer, measurement = REQUESTS[0]
    ResponseCache(path, "model").put(kind, arguments, answer, measurement)
    code = pickle.dumps(Mark(mark))
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET entry = ?", (code,))
        # the layout of sqlitedict, which lm-eval uses and which unpickles what it reads
        database.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        database.execute("INSERT INTO unnamed SELECT key, ? FROM answers", (code,))
    with pytest.raises(UserError, match=r"answers\.db is not a response cache"):
        ResponseCache(path, "model").get(kind, arguments)
    assert not mark.exists()
    pickle.loads(code)
    assert mark.exists(), "the code would have left its mark"


DAMAGED = ["", "3", "{}", '{"answer": 1, "windows": false, "measurements": []}', "[" * 100_000]
DAMAGED += [json.dumps({"answer": 1, "windows": False, "measurements": [[None, "11", "4", 0, 0]]})]


@pytest.mark.parametrize("entry", DAMAGED)
def test_a_damaged_entry_is_one_sentence(tmp_path, entry):
    path = tmp_path / "answers.db"
    kind, arguments, answer, measurement = REQUESTS[0]
    ResponseCache(path, "model").put(kind, arguments, answer, measurement)
    with sqlite3.connect(path) as database:
        database.execute("UPDATE answers SET entry = ?", (entry,))
    with pytest.raises(UserError, match="not a response cache"):
        ResponseCache(path, "model").get(kind, arguments)


def test_files_that_are_not_a_cache(tmp_path):
    text = tmp_path / "text"
    text.write_text("not a database " * 100)
    for path, message in ((text, "delete it"), (tmp_path, "response cache"), (text / "x", "text")):
        with pytest.raises(UserError, match=message):
            ResponseCache(path, "model")


def test_a_full_disk_keeps_the_answers_so_far(tmp_path):
    path = tmp_path / "answers.db"
    cache = ResponseCache(path, "model")
    cache._execute("PRAGMA max_page_count = 5")  # SQLite's own SQLITE_FULL, as on a full disk
    stored = []

    def fill():
        for number in range(100):
            cache.put("loglikelihood_rolling", (str(number),), "y" * 1000, [])
            stored.append(number)

    with pytest.raises(UserError, match=r"full.*run the same command to resume"):
        fill()
    assert len(stored) > 2
    again = ResponseCache(path, "model")
    assert all(again.get("loglikelihood_rolling", (str(number),)) for number in stored)
