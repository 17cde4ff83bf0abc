"""Accuracy and layers of a method on test questions, and paired statistics over questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Outcome:
    """What a method did on N test questions, in their order.

    right: [N], 1 for a right answer, 0 for a wrong one; between 0 and 1 after averaging.
    layers: [N], block applications of one forward pass.
    value: [N], the reward in [0, 1]: the probability of the right option, or `right`.
    answered: [N], 1 where the response holds an answer to grade, else 0; None where responses were not looked at.
    """

    right: list[float]
    layers: list[float]
    value: list[float]
    answered: list[float] | None = None

    @property
    def accuracy(self) -> float:
        """Mean of `right`."""
        return statistics.mean(self.right)

    @property
    def mean_layers(self) -> float:
        """Mean of `layers`."""
        return statistics.mean(self.layers)

    def of(self, places: Sequence[int]) -> Outcome:
        """The outcome on some of the questions."""
        return Outcome(*(values and [values[place] for place in places] for values in vars(self).values()))

    def summary(self) -> dict[str, float | None]:
        """Accuracy, layers, the share of responses with an answer, and the accuracy among those."""
        answers = sum(self.answered or ())
        return {
            "accuracy": self.accuracy,
            "layers": self.mean_layers,
            "answered": None if self.answered is None else statistics.mean(self.answered),
            "accuracy_of_answered": sum(self.right) / answers if answers else None,
        }

    @classmethod
    def average(cls, outcomes: Sequence[Outcome], weights: Sequence[float] | None = None) -> Outcome:
        """The weighted mean per question, over seeds or over the parts of a mixture."""
        weights = weights or [1 / len(outcomes)] * len(outcomes)

        def mixed(columns: Sequence[list[float] | None]) -> list[float] | None:
            if None in columns:
                return None
            return [sum(w * v for w, v in zip(weights, values, strict=True)) for values in zip(*columns, strict=True)]

        return cls(*map(mixed, zip(*(vars(outcome).values() for outcome in outcomes), strict=True)))


def mixture(controls: Sequence[Outcome], layers: float) -> Outcome | None:
    """The mixture of two neighbouring controls with `layers` layers on average; None outside their range."""
    ordered = sorted(controls, key=lambda outcome: outcome.mean_layers)
    for below, above in pairwise(ordered):
        if below.mean_layers <= layers <= above.mean_layers:
            width = above.mean_layers - below.mean_layers
            share = (layers - below.mean_layers) / width if width else 1.0
            return Outcome.average([below, above], [1 - share, share])
    return None


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Paired difference of shares [N] in percentage points, with its 95% interval over questions (normal)."""
    differences = [100 * (a - b) for a, b in zip(values, reference, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return {"points": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def differences_by_set(
    outcome: Outcome, reference: Outcome, places: dict[str, Sequence[int]], weights: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Paired differences of accuracy per set, over all questions ("all"), and for a mix of the sets ("mix").

    Args:
        places: set -> its questions.
        weights: set -> its weight in the mix; empty for no mix.
    """
    table = {
        name: paired_difference(outcome.of(members).right, reference.of(members).right)
        for name, members in places.items()
    }
    result = table | {"all": paired_difference(outcome.right, reference.right)}
    if weights:
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        points = sum(share * table[name]["points"] for name, share in shares.items())
        half = math.hypot(*(share * (table[name]["high"] - table[name]["points"]) for name, share in shares.items()))
        result["mix"] = {"points": points, "low": points - half, "high": points + half}
    return result


def share_recovered(outcome: Outcome, base: Outcome, known: Outcome, seed: int = 0) -> dict[str, float] | None:
    """The share of the gain of `known` over `base` that `outcome` has: (outcome - base) / (known - base) in accuracy.

    With its 95% interval: percentiles of 2,000 bootstrap samples of the questions, the same in all three terms; samples
    in which `known` gains nothing are left out. None where `known` is not above `base` at all.
    """
    right = torch.tensor([outcome.right, base.right, known.right], dtype=torch.float64)
    gained, known_gain = right[0] - right[1], right[2] - right[1]
    if known_gain.mean() <= 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randint(len(gained), (len(gained),), generator=generator) for _ in range(2000)]
    shares = [gained[sample].mean() / known_gain[sample].mean() for sample in samples if known_gain[sample].sum() > 0]
    low, high = torch.stack(shares).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"share": float(gained.mean() / known_gain.mean()), "low": low, "high": high}


def method_row(name: str, outcomes: Sequence[Outcome], base: Outcome, controls: Sequence[Outcome]) -> dict:
    """One method of the comparison: means and standard deviations over seeds, and the paired differences.

    Args:
        outcomes: one per seed, over the same questions.
        controls: static paths; the row has "against_static" where a mixture of two has as many layers.
    """
    average = Outcome.average(outcomes)
    several = len(outcomes) > 1
    row = {
        "method": name,
        "seeds": len(outcomes),
        **average.summary(),
        "accuracy_std": statistics.stdev([outcome.accuracy for outcome in outcomes]) if several else 0.0,
        "layers_std": statistics.stdev([outcome.mean_layers for outcome in outcomes]) if several else 0.0,
        "against_base": paired_difference(average.right, base.right),
        "value_against_base": paired_difference(average.value, base.value),
    }
    static = mixture(controls, average.mean_layers)
    if static is not None:
        row["against_static"] = paired_difference(average.right, static.right)
    return row
