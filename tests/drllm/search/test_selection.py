"""Which questions are searched and which labels are kept, whatever the processes and the order of arrival."""

import math
import random

import pytest

from drllm import labels
from drllm.manifests import begin, read_manifest
from drllm.questions.sets import Question
from drllm.search.progress import finish, label_of
from drllm.search.quotas import allocate, apportion
from drllm.search.report import shortfall_lines, surplus_line
from drllm.search.selection import Record, Selection, digest_of, seeded_order
from tests.label_toys import (
    KINDS,
    SETS,
    make_finished,
    manifest,
    new_selection,
    question,
    random_kind,
    run_in_turns,
    searched,
)

W2R, SHORTER = labels.WRONG_TO_RIGHT, labels.SHORTER


@pytest.fixture
def finished(tmp_path):
    """A folder of finished labels."""
    return make_finished(tmp_path)


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
    kept = labels.read_labels(finished).labels
    for name in SETS:
        order = seeded_order([question(name, number) for number in range(60)], 0)
        expected = set()
        for kind in (labels.WRONG_TO_RIGHT, labels.SHORTER):
            of_kind = [asked.id for asked in order if label_of(searched(asked)).kind == kind]
            assert len(of_kind) > 3
            expected |= set(of_kind[:3])
        assert {label.question_id for label in kept if label.set == name} == expected
    assert [label.question_id for label in kept] == sorted(label.question_id for label in kept)


@pytest.mark.parametrize(("samples", "share"), [(6, 0.5), (20, 0.9), (20, 0.05), (45, 0.3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_selection_does_not_depend_on_processes_arrival_or_stops(tmp_path, seed, samples, share):
    """Two processes that run in turns and are stopped are resumed by three; the larger samples need later stages."""

    def new():
        return new_selection(samples, share=share)

    expected, folder = tmp_path / "expected", tmp_path / "other"
    for path in (expected, folder):
        begin(path, manifest())
    undisturbed = run_in_turns(expected, new)
    finish(expected, manifest(), undisturbed)
    assert run_in_turns(folder, new, num_processes=2, seed=seed, stop=10) is None
    progress = run_in_turns(folder, new, num_processes=3, seed=seed)
    finish(folder, manifest(), progress)
    assert (folder / "labels.jsonl").read_bytes() == (expected / "labels.jsonl").read_bytes()
    if samples == 6:  # it did not search everything to get there
        assert len(progress.selection.records) < 2 * 60
    # A question is searched once; before that it may have been visited without a search.
    lines = [line for shard in (folder / "progress").iterdir() for line in shard.read_text("utf-8").split("\n") if line]
    rows = [labels._parse(line.encode(), "") for line in lines]
    ids = [row["question_id"] for row in rows if row["simulations"]]
    assert len(set(ids)) == len(ids)


def test_the_selection_equals_the_allocation_of_what_exists(tmp_path):
    """Brute force: search everything, allocate, keep the first of every kind."""
    for number, (samples, share) in enumerate([(6, 0.5), (20, 0.9), (20, 0.0), (30, 1.0), (45, 0.3), (500, 0.3)]):
        selection = new_selection(samples, share=share)
        available = {
            (name, kind): [asked.id for asked in order if random_kind(asked) == kind]
            for name, order in selection.orders.items()
            for kind in (W2R, SHORTER)
        }
        # What exists limits every cell; the search only learns of the limits that matter.
        quotas = allocate(selection.samples, share, {cell: len(ids) for cell, ids in available.items()})
        expected = {i for (name, kind), ids in available.items() for i in ids[: quotas[name][kind]]}
        folder = tmp_path / str(number)
        begin(folder, manifest())
        progress = run_in_turns(folder, lambda samples=samples, share=share: new_selection(samples, share=share))
        assert {question_id for question_id, _ in progress.selection.selected()} == expected
        assert len(expected) == min(2 * samples, sum(map(len, available.values())))


def test_apportion_meets_exact_proportions_and_bounds():
    weights = {"a": 400, "b": 600, "c": 200}
    zero, free = dict.fromkeys(weights, 0), dict.fromkeys(weights, math.inf)
    assert apportion(360, weights, zero, free) == {"a": 120, "b": 180, "c": 60}
    assert apportion(360, weights, zero, free | {"b": 30}) == {"a": 220, "b": 30, "c": 110}
    assert apportion(360, weights, zero | {"c": 300}, free) == {"a": 24, "b": 36, "c": 300}
    assert apportion(360, weights, zero, dict.fromkeys(weights, 7)) == dict.fromkeys(weights, 7)
    assert apportion(10, weights, dict.fromkeys(weights, 20), free) == dict.fromkeys(weights, 20)
    assert apportion(1, {"a": 1, "b": 1}, {"a": 0, "b": 0}, {"a": 9, "b": 9}) == {"a": 1, "b": 0}


def test_quotas_prefer_full_slots_then_full_sets_then_the_share():
    samples = {"arc": 100, "dart": 300}

    def quotas(limits=None, share=0.3):
        cells = {(name, kind): count for name, kinds in (limits or {}).items() for kind, count in kinds.items()}
        result = allocate(samples, share, cells)
        return {name: (kinds[W2R], kinds[SHORTER]) for name, kinds in result.items()}

    assert quotas() == {"arc": (30, 70), "dart": (90, 210)}
    assert quotas({"arc": {W2R: 10}}) == {"arc": (10, 90), "dart": (110, 190)}  # dart keeps the share at 30%
    assert quotas({"dart": {SHORTER: 200}}) == {"arc": (20, 80), "dart": (100, 200)}
    assert quotas({"dart": {SHORTER: 50}}) == {"arc": (0, 100), "dart": (250, 50)}  # full sets before the share
    assert quotas({"dart": {SHORTER: 50, W2R: 60}}) == {"arc": (60, 230), "dart": (60, 50)}  # arc fills dart's slots
    everything = {"dart": {SHORTER: 50, W2R: 60}, "arc": {SHORTER: 5, W2R: 6}}
    assert quotas(everything) == {"arc": (6, 5), "dart": (60, 50)}
    assert quotas(share=1.0) == {"arc": (100, 0), "dart": (300, 0)}


def test_four_thousand_labels_of_a_base_that_is_right_on_one_dart_question_in_eight(tmp_path):
    """Table 2's samples, the sizes of the real training sets, a base model that answers 11.8% of DART."""
    sizes = {"arc_easy": 2251, "arc_challenge": 1118, "dart-1": 564, "dart-2": 1348, "dart-3": 1592, "dart-4": 1690}
    sizes["dart-5"] = 2301
    samples = dict(zip(sizes, (400, 600, 200, 400, 600, 800, 1000), strict=True))

    def kind_of(asked: Question) -> str:
        choose = random.Random(asked.id)
        is_right = choose.random() < (0.118 if asked.set.startswith("dart") else 0.7)
        has_label = choose.random() < (0.8 if is_right else 0.35)
        return (SHORTER if has_label else "right") if is_right else (W2R if has_label else "wrong")

    def new(scale: int = 1) -> Selection:
        orders = {
            name: seeded_order([Question(name, f"{name}-{n}", "?", (), (), "1") for n in range(size // scale)], 0)
            for name, size in sizes.items()
        }
        return Selection(orders, samples, 0.3)

    counts = {name: {kind: 0 for kind in KINDS} for name in sizes}
    for order in new().orders.values():
        for asked in order:
            counts[asked.set][kind_of(asked)] += 1
    exist = {name: count[W2R] + count[SHORTER] for name, count in counts.items()}
    begun = begin(tmp_path / "full", manifest(arguments={"wrong_to_right_share": 0.3}))
    completed = finish(tmp_path / "full", begun, run_in_turns(tmp_path / "full", new, kind_of, share_read=0.01))
    table = {row["set"]: row for row in completed.results["table2"]}
    assert completed.labels == 4000
    assert exist["dart-5"] < 1000
    for name, row in table.items():
        assert row["sampled"] >= min(samples[name], exist[name])
    # The other sets fill what is missing; those with labels left do so in proportion to their samples.
    ratios = [row["sampled"] / samples[name] for name, row in table.items() if row["sampled"] < exist[name]]
    assert len(ratios) >= 4
    assert min(ratios) > 1
    assert max(ratios) - min(ratios) < 0.01  # of 200 to 600 samples, up to rounding
    said = "\n".join(shortfall_lines(completed))
    assert f"dart-5: {counts['dart-5'][SHORTER]} of 700 shorter labels: the base model is right on" in said
    assert f"dart-5: {exist['dart-5']} labels instead of 1000" in said
    assert "of all labels, target 30.0%" in said
    # A quarter of the questions: not 4,000 labels, but all that exist.
    begun = begin(tmp_path / "few", manifest(arguments={"wrong_to_right_share": 0.3}))
    completed = finish(tmp_path / "few", begun, run_in_turns(tmp_path / "few", lambda: new(4), kind_of, share_read=0.1))
    exist = sum(kind_of(asked) in (W2R, SHORTER) for order in new(4).orders.values() for asked in order)
    assert completed.labels == exist < 4000
    assert f"{exist} of 4000 labels: no question is left to search" in shortfall_lines(completed)


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


def test_a_question_that_was_not_searched_is_searched_when_its_kind_becomes_wanted():
    selection = new_selection(samples=2)
    order = selection.orders["arc_easy"]
    visited = Record("arc_easy", 0, None, True, 1, 0, 0, "00000.jsonl", 0)
    assert not visited.is_searched
    selection.add(order[0].id, visited)
    assert order[0] in list(selection.remaining())
    selection.quotas["arc_easy"] = {W2R: 5, SHORTER: 0}
    assert order[0] not in list(selection.remaining())
    selection.add(order[0].id, visited._replace(kind=SHORTER, simulations=5))
    selection.add(order[0].id, visited)  # the first record, read late
    assert selection.records[order[0].id].kind == SHORTER
    assert selection.visited["arc_easy"] == 1


def test_the_surplus_is_what_one_question_after_the_other_would_not_take():
    selection = new_selection(samples=2)  # one of each kind
    order = selection.orders["arc_easy"]
    found = Record("arc_easy", 0, SHORTER, True, 9, 8, 1, "00000.jsonl", 0)
    selection.add(order[0].id, found)
    selection.add(order[1].id, found._replace(position=1))  # searched beside it; another wrong one was still wanted
    assert selection.surplus() == (0, 8)
    selection.add(order[2].id, found._replace(position=2, kind=W2R, base_correct=False))
    selection.add(order[4].id, found._replace(position=4, base_correct=False, kind=None, simulations=5))
    assert selection.surplus() == (1, 13)
    assert surplus_line(selection) == "beyond the quotas: 1 of 4 visited questions, 13 of 29 simulations"


def test_table_2_counts_what_was_done(finished):
    table = read_manifest(finished).results["table2"]
    for row in table:
        assert (row["original"], row["sampled"], row["wanted"], row["wrong_to_right"]) == (60, 6, 6, 3)
        assert row["inferences"] == row["visited"] + row["simulations"]
        assert row["layers_saved"] == 0.0  # three paths one block longer, three one block shorter
        assert 6 <= row["visited"] <= 60
