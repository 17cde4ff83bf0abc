"""What a search shows while it runs."""

from types import SimpleNamespace

from drllm.search.report import Display


def display(finished: list[int], expected: int, processes: int = 1) -> Display:
    """Of a resumed run; `finished`: the simulations of its questions."""
    records = {str(n): SimpleNamespace(kind=None, layers_saved=0, simulations=s) for n, s in enumerate(finished)}
    selection = SimpleNamespace(records=records, expected_visits=lambda: expected)
    return Display(SimpleNamespace(selection=selection), processes, is_shown=False, num_simulations=50)


def test_the_time_left_counts_simulations_and_not_questions():
    """All questions may be open at once: then none has ended half-way."""
    shown = display([], expected=10)
    shown.simulations = 250
    assert shown.seconds_left(rate=5.0) == (10 * 50 - 250) / 5
    shown.simulations = 900
    assert shown.seconds_left(rate=5.0) == 0
    shown = display([40] * 6, expected=10)
    assert shown.seconds_left(rate=2.0) == 4 * 50 / 2
    shown.simulations = 20
    shown.progress.selection.records["new"] = SimpleNamespace(kind=None, layers_saved=0, simulations=5)
    assert shown.seconds_left(rate=1.0) == 3 * 50 - 15, "5 of the 20 are those of a finished one"
    assert display([], expected=10, processes=4).seconds_left(rate=4.0) == 125
