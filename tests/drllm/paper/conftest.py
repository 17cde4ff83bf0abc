"""What the tests of figures share."""

import pytest
from matplotlib.axes import Axes

METHODS = ("errorbar", "plot", "annotate", "imshow", "boxplot", "bar", "axhline", "set_xticks")


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn: (method of Axes, positional arguments, keyword arguments) of each call, in order."""
    calls = []

    def watch(name, method):
        def record(self, *args, **options):
            calls.append((name, args, options))
            return method(self, *args, **options)

        monkeypatch.setattr(Axes, name, record)

    for name in METHODS:
        watch(name, getattr(Axes, name))
    return calls
