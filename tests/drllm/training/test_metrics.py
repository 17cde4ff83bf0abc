"""Metrics against scikit-learn, and their edge cases."""

import warnings

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score

from drllm.training.metrics import routing_metrics


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [(0, 1, 2), (1, 2), (0, 1), (1,)])
def test_against_scikit_learn(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    choice = torch.tensor(classes)
    labels = choice[torch.randint(0, len(classes), (13, 9), generator=generator)]
    predicted = choice[torch.randint(0, len(classes), (13, 9), generator=generator)]
    predicted = torch.where(torch.rand(13, 9, generator=generator) < 0.6, labels, predicted)
    check(predicted, labels)


def check(predicted, labels):
    metrics = routing_metrics(predicted, labels)
    y, p = labels.flatten().numpy(), predicted.flatten().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = f1_score(y, p, average=None, labels=[0, 1, 2], zero_division=0)
        recall = recall_score(y, p, average=None, labels=[0, 1, 2], zero_division=0)
        assert metrics["macro_f1"] == pytest.approx(f1_score(y, p, average="macro"))
    for c, name in enumerate(("skip", "execute", "repeat")):
        assert metrics[f"f1_{name}"] == pytest.approx(f1[c])
        assert metrics[f"count_{name}"] == (y == c).sum()
    assert metrics["acc"] == pytest.approx(accuracy_score(y, p))
    assert metrics["acc_skip"] == pytest.approx(recall[0])
    assert metrics["acc_execute"] == pytest.approx(recall[1])
    assert metrics["acc_repeat"] == pytest.approx(recall[2])
    assert metrics["avg_layers"] == pytest.approx(predicted.sum(1).double().mean().item())


def test_class_predicted_but_never_labelled():
    # scikit-learn counts a class that only the predictions hold: its F1 of 0 lowers the mean.
    check(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]))


def test_one_example_by_hand():
    metrics = routing_metrics(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 1]], dtype=torch.int8))
    assert metrics["f1_skip"] == pytest.approx(2 / 3)
    assert metrics["f1_execute"] == pytest.approx(1 / 2)
    assert metrics["f1_repeat"] == 0.0
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert metrics["acc_skip"] == 0.5
    assert metrics["acc_repeat"] == 0.0
    assert metrics["avg_layers"] == 4.0
    assert metrics["avg_layers_labels"] == 2.0


def test_refusals():
    with pytest.raises(ValueError, match="differ in shape"):
        routing_metrics(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no question"):
        routing_metrics(torch.zeros(0, 3), torch.zeros(0, 3))
