"""Labels on which routers agree: right paths only, the most probable one, resumed, and trained on."""

import json
import math

import pytest
import torch

import data_generation
import train
from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from drllm.labels import SHORTER, read_labels
from drllm.miniature import MINIATURE_DATA
from drllm.rollouts.scores import ScoreStore
from extensions import agreement
from train_models.paths import path_to_layer_indices


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Labels of the miniature, and routers that were trained on them."""
    folder = tmp_path_factory.mktemp("first")
    search = f"--data_dir {MINIATURE_DATA} --dataset arc_easy,dart-1 --limit 20 --samples 20 --num_simulations 25"
    assert data_generation.main([*search.split(), "--output_dir", str(folder / "labels")]) == 0
    fit = f"--data {folder / 'labels'} --output_dir {folder} --run_name routers --num_epochs 4 --warmup_steps 1"
    assert train.main(fit.split()) == 0
    return folder


def _run(first, output, *more):
    command = ["--data", str(first / "labels"), "--checkpoint", str(first / "routers"), "--output_dir", str(output)]
    return agreement.main([*command, "--device", "cpu", *more])


def test_the_label_is_the_right_path_that_the_routers_find_most_probable(first, tmp_path, capsys):
    assert _run(first, tmp_path / "agreed", "--batch_size", "7") == 0
    assert "labels, " in capsys.readouterr().out
    old, new = read_labels(first / "labels").labels, read_labels(tmp_path / "agreed").labels
    routed, tokenizer = load_routed_checkpoint(first / "routers", "float32", "cpu"), load_tokenizer(first / "routers")

    def nats(prompt, path):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        indices = path_to_layer_indices(path)
        with torch.no_grad():
            logits = routed.model(ids, layer_indices=indices, use_cache=False, output_router_logits=True).router_logits
        return sum(logits[0, block].log_softmax(-1)[visits].item() for block, visits in enumerate(path))

    assert any(before.path != after.path for before, after in zip(old, new, strict=True))
    for before, after in zip(old[::4], new[::4], strict=True):
        right = [path for path in {before.path, *before.good_paths} if set(path) != {1}]
        right = [path for path in right if before.kind != SHORTER or sum(path) < len(path)]
        assert after.path in right
        assert nats(after.prompt, after.path) == pytest.approx(
            max(nats(before.prompt, path) for path in right), abs=1e-3
        )
        assert after.path_response == (before.path_response if after.path == before.path else "")
    fit = f"--data {tmp_path / 'agreed'} --output_dir {tmp_path} --run_name second --num_epochs 1 --warmup_steps 1"
    assert train.main(fit.split()) == 0


def test_a_price_per_edited_block_asks_for_paths_near_the_default(first, tmp_path):
    edited = {}
    for price in (0, 50):
        assert _run(first, tmp_path / str(price), "--price", str(price)) == 0
        labels = read_labels(tmp_path / str(price)).labels
        edited[price] = sum(visits != 1 for label in labels for visits in label.path)
    assert edited[50] < edited[0]


def test_a_stopped_run_scores_nothing_twice(first, tmp_path, monkeypatch):
    def stop(store, rows):
        add(store, rows)
        raise KeyboardInterrupt

    add = ScoreStore.add
    monkeypatch.setattr(ScoreStore, "add", stop)
    assert _run(first, tmp_path / "agreed") == 130
    monkeypatch.setattr(ScoreStore, "add", add)
    assert _run(first, tmp_path / "agreed") == 0
    lines = (tmp_path / "agreed-scores" / "00000.jsonl").read_text().splitlines()
    asked = [tuple(json.loads(line)[:2]) for line in lines]
    assert len(asked) == len(set(asked))
    assert _run(first, tmp_path / "whole") == 0
    assert (tmp_path / "whole" / "labels.jsonl").read_bytes() == (tmp_path / "agreed" / "labels.jsonl").read_bytes()


def test_routers_of_another_base_are_refused(first, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(agreement, "fingerprint", lambda model: "other")
    assert _run(first, tmp_path / "agreed") == 2
    assert "has base weights other" in capsys.readouterr().err
    assert _run(first, tmp_path / "agreed", f"--price={math.nan}") == 2
    assert list(tmp_path.iterdir()) == []
