"""The label store: selection, progress files, refusals, and what training reads."""

import errno
import json
import random

import pytest

from drllm import files, labels
from drllm.errors import UserError
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.search import progress as progress_module
from drllm.search.pool import SearchedQuestion
from drllm.search.progress import Progress, begin, finish, to_row
from drllm.search.selection import Record, Selection, digest_of, seeded_order
from drllm.search.tree import SearchResult

SETS = ("arc_easy", "dart-1")
NUM_BLOCKS = 4
DEFAULT = (1,) * NUM_BLOCKS
KINDS = {
    labels.WRONG_TO_RIGHT: (False, (1, 2, 1, 1)),
    labels.SHORTER: (True, (1, 0, 1, 1)),
    "right": (True, DEFAULT),
    "wrong": (False, None),
}


def question(set_name: str, number: int) -> Question:
    return Question(set_name, f"{set_name}-{number:03d}", f"what is {number}\u2028?", (), (), str(number))


def searched(asked: Question, kind: str | None = None) -> SearchedQuestion:
    kind = kind or random.Random(asked.id).choice(list(KINDS))
    base_correct, best = KINDS[kind]
    good = () if best in (None, DEFAULT) else (best,)
    result = SearchResult(base_correct, best, good, simulations=5, inferences=6)
    return SearchedQuestion(Prompt(asked, f"Q: {asked.text}", (1, 2), 2), result, "a", None if best is None else "b")


def new_selection(samples: int = 6, count: int = 60, seed: int = 0) -> Selection:
    orders = {name: seeded_order([question(name, n) for n in range(count)], seed) for name in SETS}
    return Selection(orders, dict.fromkeys(SETS, samples), 0.5)


def manifest(**changes) -> dict:
    arguments = {"budget": 2.0, "c": 1.8, "samples": {"arc_easy": 6}} | changes.pop("arguments", {})
    return {"format": labels.FORMAT, "num_layers": NUM_BLOCKS, "commit": "abc", "arguments": arguments} | changes


def run(folder, selection, order, rank=0, stop=None):
    """Searches `order` as a process would; the kind of a question is a fixed function of its id."""
    progress = Progress(folder, rank, selection)
    progress.update()
    progress.open()
    for number, asked in enumerate(order):
        if number == stop:
            break
        progress.append(to_row(searched(asked)))
        progress.update()
    progress.close()
    return progress


@pytest.fixture
def finished(tmp_path):
    """A folder of finished labels."""
    begin(tmp_path, manifest())
    selection = new_selection()
    finish(tmp_path, run(tmp_path, selection, selection.remaining()))
    return tmp_path


def test_the_order_is_seeded_and_independent_of_the_source():
    asked = [question("arc_easy", number) for number in range(30)]
    order = seeded_order(asked, 0)
    assert order == seeded_order(asked[::-1], 0)
    assert order != seeded_order(asked, 1)
    assert sorted(order, key=lambda one: one.id) == asked


def test_digests_notice_other_questions_and_other_answers():
    asked = [question("arc_easy", number) for number in range(3)]
    changed = [*asked[:2], Question("arc_easy", asked[2].id, "x", (), (), "other")]
    assert digest_of(asked) == digest_of(asked[::-1])
    assert len({digest_of(some) for some in (asked, asked[:2], changed)}) == 3


def test_the_selection_is_the_first_of_each_kind_in_the_seeded_order(finished):
    rows = labels.read_labels(finished).rows
    for name in SETS:
        order = seeded_order([question(name, number) for number in range(60)], 0)
        expected = set()
        for kind in (labels.WRONG_TO_RIGHT, labels.SHORTER):
            of_kind = [asked.id for asked in order if to_row(searched(asked))["kind"] == kind]
            assert len(of_kind) > 3
            expected |= set(of_kind[:3])
        assert {row["question_id"] for row in rows if row["set"] == name} == expected
    assert [row["question_id"] for row in rows] == sorted(row["question_id"] for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_the_selection_does_not_depend_on_processes_arrival_or_stops(tmp_path, finished, seed):
    """Two processes that run by turns, are stopped, continue as three, and see each other's results late."""
    choose = random.Random(seed)
    folder = tmp_path / "other"
    begin(folder, manifest())
    for num_processes in (2, 3):
        selections = [new_selection() for _ in range(num_processes)]
        progresses = [Progress(folder, rank, selection) for rank, selection in enumerate(selections)]
        for progress in progresses:
            progress.update()
        orders = [selection.remaining(rank, num_processes) for rank, selection in enumerate(selections)]
        for progress in progresses:
            progress.open()
        searching = list(range(num_processes))
        for _ in range(20 if num_processes == 2 else 10_000):
            if not searching:
                break
            rank = choose.choice(searching)
            asked = next(orders[rank], None)
            if asked is None:
                searching.remove(rank)
                continue
            base_correct = searched(asked).result.base_correct
            kind = labels.SHORTER if base_correct else labels.WRONG_TO_RIGHT
            # What is not wanted is searched no further than the default path, as in data_generation.py.
            wanted = selections[rank].is_wanted(asked, kind)
            row = searched(asked) if wanted else searched(asked, "right" if base_correct else "wrong")
            progresses[rank].append(to_row(row))
            if choose.random() < 0.3:
                progresses[rank].update()
        for progress in progresses:
            progress.close()
    assert not searching
    progresses[0].update()
    finish(folder, progresses[0])
    assert (folder / "labels.jsonl").read_bytes() == (finished / "labels.jsonl").read_bytes()
    # And it did not search everything to get there.
    assert len(progresses[0].selection.records) < 2 * 60
    lines = [line for shard in (folder / "progress").iterdir() for line in shard.read_bytes().splitlines()]
    assert len(lines) == len(progresses[0].selection.records)  # each question once


def test_late_finds_do_not_spare_earlier_questions():
    selection = new_selection(samples=2)
    order = selection.orders["arc_easy"]
    found = Record("arc_easy", 10, labels.SHORTER, True, 1, 1, 1, "00000.jsonl", 0)
    selection.add(order[10].id, found)
    assert selection.is_wanted(order[9], labels.SHORTER)
    assert not selection.is_wanted(order[11], labels.SHORTER)
    assert selection.is_wanted(order[11], labels.WRONG_TO_RIGHT)
    selection.add(order[9].id, found._replace(position=9))
    assert [question_id for question_id, _ in selection.selected()] == [order[9].id]
    selection.add(order[9].id, found._replace(position=9, kind=labels.WRONG_TO_RIGHT))  # a second record of it
    assert [record.kind for _, record in selection.selected()] == [labels.SHORTER]
    assert selection.visited["arc_easy"] == 2


def test_a_kind_that_runs_out_is_not_made_up_for(tmp_path):
    selection = new_selection(samples=1000)
    begin(tmp_path, manifest())
    table = finish(tmp_path, run(tmp_path, selection, selection.remaining()))
    kinds = [row["kind"] for row in labels.read_labels(tmp_path).rows]
    assert [row["visited"] for row in table] == [60, 60]
    assert sum(row["sampled"] for row in table) == len(kinds) < 120
    assert set(kinds) == {labels.WRONG_TO_RIGHT, labels.SHORTER}


def test_table_2_counts_what_was_done(finished):
    table = labels.read_manifest(finished)["table2"]
    for row in table:
        assert (row["original"], row["sampled"], row["wanted"], row["wrong_to_right"]) == (60, 6, 6, 3)
        assert row["inferences"] == 6 * row["visited"]
        assert row["layers_saved"] == 0.0  # three paths one block longer, three one block shorter
        assert 6 <= row["visited"] <= 60


def test_progress_outlives_the_process_and_a_half_written_line_is_repaired(tmp_path):
    selection = new_selection()
    begin(tmp_path, manifest())
    progress = run(tmp_path, selection, selection.remaining(), stop=5)
    whole = progress.path.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[-1])):
        progress.path.write_bytes(whole[:-cut])
        again = Progress(tmp_path, 0, new_selection())
        again.update()
        assert len(again.selection.records) == 4
        again.open()
        again.close()
        assert progress.path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])


def test_lines_appear_at_once_for_other_processes(tmp_path):
    selection, other = new_selection(), new_selection()
    begin(tmp_path, manifest())
    writing, reading = Progress(tmp_path, 0, selection), Progress(tmp_path, 1, other)
    writing.open()
    for number, asked in enumerate(list(selection.remaining())[:3], start=1):
        writing.append(to_row(searched(asked)))
        reading.update()
        assert len(other.records) == number
        assert reading.read(other.records[asked.id]) == to_row(searched(asked))


def test_a_spoiled_line_is_named(tmp_path):
    selection = new_selection()
    begin(tmp_path, manifest())
    progress = run(tmp_path, selection, selection.remaining(), stop=3)
    lines = progress.path.read_bytes().splitlines(keepends=True)
    for spoiled in (b"\x00\x00\n", b'{"set": "arc_easy"}\n', b"[]\n", lines[1].replace(b"-0", b"-9")):
        progress.path.write_bytes(lines[0] + spoiled + lines[2])
        with pytest.raises(UserError, match=r"00000\.jsonl:2: not a finished question of this run; delete the line"):
            Progress(tmp_path, 0, new_selection()).update()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    begin(tmp_path, manifest())
    first = Progress(tmp_path, 0, new_selection())
    first.open()
    with pytest.raises(UserError, match="being written by another run"):
        Progress(tmp_path, 0, new_selection()).open()
    first.close()
    Progress(tmp_path, 0, new_selection()).open()


def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, capsys):
    begin(tmp_path, manifest())

    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(progress_module.fcntl, "flock", no_locks)
    selection = new_selection()
    run(tmp_path, selection, selection.remaining(), stop=2)
    assert "00000.jsonl: no locks here, so start no second run" in capsys.readouterr().err
    again = Progress(tmp_path, 0, new_selection())
    again.update()
    assert len(again.selection.records) == 2


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    selection = new_selection()
    begin(tmp_path, manifest())
    progress = run(tmp_path, selection, selection.remaining(), stop=2)
    before = progress.path.read_bytes()
    progress.open()

    class FullDisk:
        """Takes ten bytes, then is full."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    progress._file = FullDisk(progress._file)
    with pytest.raises(UserError, match=r"no space left to write .*2 finished questions are safe: free some space"):
        progress.append(to_row(searched(next(selection.remaining()))))
    progress._file.close()
    assert progress.path.read_bytes() == before
    monkeypatch.setattr(files.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota")))
    with pytest.raises(UserError, match=r"no space left to write .*labels\.jsonl"):
        finish(tmp_path, progress)
    assert not (tmp_path / "labels.jsonl").exists()


def test_another_run_is_refused_with_the_difference_named(finished):
    begin(finished, manifest(commit="other", versions={"torch": "9"}))
    for changes, message in (
        ({"arguments": {"c": 2.5}}, r"arguments\.c was 1\.8 and is now 2\.5"),
        ({"arguments": {"samples": {"arc_easy": 7}}}, r"arguments\.samples\.arc_easy was 6 and is now 7"),
        ({"num_layers": 5}, r"num_layers was 4 and is now 5"),
        ({"dtype": "bfloat16"}, r'dtype was null and is now "bfloat16"'),
    ):
        with pytest.raises(UserError, match=rf"holds labels of another run: {message}; repeat .*--output_dir"):
            begin(finished, manifest(**changes))


def test_a_folder_with_progress_but_no_manifest_is_refused(tmp_path):
    (tmp_path / "progress").mkdir()
    with pytest.raises(UserError, match="has progress files but no manifest"):
        begin(tmp_path, manifest())


def test_finishing_again_gives_the_same_file(finished):
    before = (finished / "labels.jsonl").read_bytes()
    selection = new_selection()
    progress = Progress(finished, 0, selection)
    progress.update()
    assert list(selection.remaining()) == []
    finish(finished, progress)
    assert (finished / "labels.jsonl").read_bytes() == before


def test_labels_are_read_back(finished):
    found = labels.read_labels(finished)
    assert found.manifest["labels"] == len(found.rows) == 12
    for row in found.rows:
        assert set(row) == set(labels.COLUMNS)
        assert to_row(searched(question(row["set"], int(row["question_id"][-3:])))) == row


def spoil(folder, number, change):
    """Changes line `number` of the labels: `change` gets the row and returns the new line."""
    path = folder / "labels.jsonl"
    lines = path.read_text().split("\n")
    lines[number - 1] = change(json.loads(lines[number - 1]))
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: json.dumps(row)[:30], r"labels\.jsonl:3: not valid JSON .*repeat the data_generation.py command"),
        (lambda row: "[1]", r"labels\.jsonl:3: not an object with the columns question"),
        (lambda row: json.dumps({k: v for k, v in row.items() if k != "prompt"}), r":3: no column 'prompt'"),
        (lambda row: json.dumps(row | {"prompt": ""}), r""":3: 'prompt' is "", expected text"""),
        (lambda row: json.dumps(row | {"kind": "longer"}), r""":3: 'kind' is "longer", expected "wrong_to_right" or"""),
        (lambda row: json.dumps(row | {"path_correct": False}), r":3: 'path_correct' is false, expected true"),
        (lambda row: json.dumps(row | {"optimal_layer_config": [1, 1, 1]}), r":3: .*has 3 entries.*4 blocks"),
        (lambda row: json.dumps(row | {"optimal_layer_config": [1, 3, 1, 1]}), r":3: .*block 1 has the value 3"),
        (lambda row: json.dumps(row | {"optimal_layer_config": [0, 0, 0, 1]}), r":3: .*at most two in a row"),
        (lambda row: json.dumps(row | {"optimal_layer_config": "1111"}), r"""expected a list of 0, 1 and 2"""),
        (lambda row: json.dumps(row | {"good_paths": [[1, 1, 1, 1], [9]]}), r":3: 'good_paths'"),
        (lambda row: json.dumps(row | {"question_id": "arc_easy-000"}), r":3: the question of line 1 again"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(finished, change, message):
    first = labels.read_labels(finished).rows[0]
    spoil(finished, 1, lambda row: json.dumps(first | {"question_id": "arc_easy-000"}))
    labels.read_labels(finished)
    spoil(finished, 3, change)
    with pytest.raises(UserError, match=message):
        labels.read_labels(finished)


def test_missing_empty_and_cut_off_files_are_named(finished, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/manifest\.json does not exist; make the labels with data_generation"):
        labels.read_labels(tmp_path / "nowhere")
    path = finished / "labels.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-2]))
    with pytest.raises(UserError, match="has 10 rows, the manifest says 12: cut off"):
        labels.read_labels(finished)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty: the search kept no label"):
        labels.read_labels(finished)
    path.unlink()
    with pytest.raises(UserError, match=r"unfinished run; repeat its data_generation\.py command"):
        labels.read_labels(finished)
    (finished / "manifest.json").write_text('{"format": 1')
    with pytest.raises(UserError, match=r"manifest\.json: not valid JSON"):
        labels.read_labels(finished)
    (finished / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="not a manifest of format 1"):
        labels.read_labels(finished)
