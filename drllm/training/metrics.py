"""Metrics of router training, from predicted and labelled paths.

Every routing decision (one router, one question) is one sample of a three-class problem: skip, execute,
repeat.
"""

from __future__ import annotations

import torch

from drllm.training.losses import NUM_CLASSES

CLASS_NAMES = ("skip", "execute", "repeat")


def confusion_matrix(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts of (label, prediction) pairs: int64 [3, 3], rows are labels. Shapes of the two must agree."""
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} differ in shape")
    pairs = labels.reshape(-1).long() * NUM_CLASSES + predicted.reshape(-1).long()
    return torch.bincount(pairs, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)


def routing_metrics(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Compare predicted paths with labelled ones.

    A class that occurs neither among labels nor among predictions has no F1: it is left out of `macro_f1` (as
    scikit-learn does) and reported as 0. An accuracy of a class without labels is reported as 0 as well; the
    `count_*` entries say how many labels each number is based on.

    Args:
        predicted: [N, L] paths the routers chose, values 0/1/2.
        labels: [N, L] labelled paths.

    Returns:
        macro_f1; f1_skip, f1_execute, f1_repeat; acc (all decisions), acc_skip, acc_execute, acc_repeat (share of the
        labels of that class that were predicted so, i.e. recall); avg_layers (block applications of a prefill along
        the predicted path, mean over questions) and avg_layers_labels (along the labelled path); count_skip,
        count_execute, count_repeat.

    Raises:
        ValueError: shapes differ, or there is no question.
    """
    if predicted.numel() == 0:
        raise ValueError("cannot compute routing metrics of no question")
    return metrics_of_counts(confusion_matrix(predicted, labels), len(labels))


def metrics_of_counts(matrix: torch.Tensor, num_questions: int) -> dict[str, float]:
    """`routing_metrics` from a confusion matrix [3, 3] over the decisions of `num_questions` questions."""
    matrix = matrix.cpu().double()
    hits, support, chosen = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    f1 = 2 * hits / (support + chosen).clamp_min(1)
    recall = hits / support.clamp_min(1)
    occurs = (support + chosen) > 0
    visits = torch.arange(NUM_CLASSES, dtype=torch.double)  # block applications per class
    metrics = {"macro_f1": f1[occurs].mean()}
    metrics |= {f"f1_{name}": f1[c] for c, name in enumerate(CLASS_NAMES)}
    metrics["acc"] = hits.sum() / matrix.sum()
    metrics |= {f"acc_{name}": recall[c] for c, name in enumerate(CLASS_NAMES)}
    metrics["avg_layers"] = (chosen * visits).sum() / num_questions
    metrics["avg_layers_labels"] = (support * visits).sum() / num_questions
    metrics |= {f"count_{name}": support[c] for c, name in enumerate(CLASS_NAMES)}
    return {name: value.item() for name, value in metrics.items()}
