"""Stored router inputs: those of the full model, computed once, and never mistaken for others."""

import json
import random
import shutil
from collections import namedtuple

import pytest
import torch

from drllm.errors import UserError
from drllm.labels import Example
from drllm.provenance import fingerprint
from drllm.rollouts import routed_paths
from drllm.rollouts.routed_paths import windows_in_batches
from drllm.training import features
from drllm.training.features import compute_features
from drllm.training.losses import routing_loss
from drllm.training.router_modules import StackedRouters
from train_models import retrofit
from train_models.paths import path_to_layer_indices

LAYERS = 6  # of the fixture `stock_checkpoint`


def make_examples(count: int = 12, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        length = (1, 2, 7, 8, 9)[i] if i < 5 else rng.randint(3, 40)
        path = [rng.choice((0, 1, 1, 2)) for _ in range(LAYERS)]
        path[rng.randrange(LAYERS)] = 1
        examples.append(Example(f"set/q{i}", tuple(rng.randint(1, 60) for _ in range(length)), tuple(path)))
    return examples


def make_model(checkpoint: str, **router_config):
    return retrofit(checkpoint, dtype=torch.float32, router_config=router_config).eval()


def store_of(model, examples, directory, **kwargs):
    said = []
    store = compute_features(model, examples, directory, say=said.append, **kwargs)
    return store, said


def full_model_loss(model, example, alpha) -> torch.Tensor:
    """Loss of one example through the whole teacher-forced model, alone and without padding."""
    output = model(
        input_ids=torch.tensor([example.token_ids]),
        layer_indices=path_to_layer_indices(example.path),
        use_cache=False,
        output_router_logits=True,
    )
    return routing_loss(output.router_logits, torch.tensor([example.path]), "focal", alpha).mean()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("router_input", ["previous_layer", "embeddings"])
def test_loss_and_gradients_equal_the_full_models(family, router_input, stock_checkpoint, tmp_path):
    model = make_model(stock_checkpoint(family), router_input=router_input)
    examples, alpha = make_examples(), torch.tensor([0.5, 1.0, 1.5])
    for example in examples:
        (full_model_loss(model, example, alpha) / len(examples)).backward()

    store, _ = store_of(model, examples, tmp_path, batch_size=5)  # mixed lengths and paths in a batch
    stacked = StackedRouters(model.model.routers)
    order = list(range(len(examples)))
    random.Random(1).shuffle(order)
    batch = store.batch(order)
    logits = stacked(batch["windows"], batch["window_mask"])["logits"]
    loss = routing_loss(logits, batch["labels"], "focal", alpha).mean()
    loss.backward()

    with torch.no_grad():
        expected = sum(full_model_loss(model, e, alpha) for e in examples) / len(examples)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for r, router in enumerate(model.model.routers):
        for k, linear in enumerate(m for m in router.modules() if isinstance(m, torch.nn.Linear)):
            torch.testing.assert_close(stacked.weights[k].grad[r].t(), linear.weight.grad, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(stacked.biases[k].grad[r], linear.bias.grad, rtol=1e-4, atol=1e-6)
    assert not any(p.grad is not None for n, p in model.named_parameters() if "routers" not in n)


def test_paths_matter(stock_checkpoint, tmp_path):
    # What the tests above rely on: along another path the features are others, from the first edited block on.
    model = make_model(stock_checkpoint("llama"))
    tokens = tuple(range(1, 20))
    examples = [Example("s/a", tokens, (1,) * LAYERS), Example("s/b", tokens, (1, 1, 0, 2, 1, 1))]
    windows = store_of(model, examples, tmp_path)[0].batch([0, 1])["windows"]
    same = [torch.allclose(windows[0, layer], windows[1, layer], atol=1e-5) for layer in range(LAYERS)]
    assert same == [True, True, True, False, False, False]


@pytest.mark.parametrize("num_windows", [1, 8, 32])
def test_prompts_shorter_than_the_windows(num_windows, stock_checkpoint, tmp_path):
    model = make_model(stock_checkpoint("llama"), num_windows=num_windows)
    examples = make_examples(8)
    batch = store_of(model, examples, tmp_path)[0].batch(range(8))
    assert batch["windows"].shape == (8, LAYERS, num_windows, 32)
    assert batch["window_mask"].sum(1).tolist() == [min(num_windows, len(e.token_ids)) for e in examples]
    # The first router reads the embeddings: one window a token where tokens are fewer than windows.
    embedded = model.model.embed_tokens(torch.tensor(examples[1].token_ids))
    if num_windows >= 2:
        torch.testing.assert_close(batch["windows"][1, 0, :2], embedded)


def test_a_pass_is_counted_and_done_once(stock_checkpoint, tmp_path, capsys):
    model, examples = make_model(stock_checkpoint("llama")), make_examples(70)
    store, said = store_of(model, examples, tmp_path)
    assert store.statistics.block_applications == sum(sum(e.path) for e in examples)
    assert store.statistics.examples == 70
    assert len(list(store.directory.glob("*.safetensors"))) == 2
    assert "70 examples x 6 routers x 8 windows x 32 numbers in float32: 430 kB" in said[0]
    again, said = store_of(model, examples, tmp_path)
    assert again.statistics.forward_passes == 0
    assert "nothing to compute" in said[0]
    assert "100%" in capsys.readouterr().err
    assert torch.equal(store.batch(range(70))["windows"], again.batch(range(70))["windows"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_copy_on_a_device_gives_the_same_batches(device, stock_checkpoint, tmp_path):
    store, _ = store_of(make_model(stock_checkpoint("llama")), make_examples(70), tmp_path)
    assert store.fits(torch.device(device)) == (device == "cuda")
    order = [69, 3, 64, 0]
    ours, theirs = store.on(torch.device(device)).batch(order), store.batch(order)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values.device.type == device
        assert torch.equal(values.cpu(), theirs[name])


def test_long_prompts_make_smaller_batches(stock_checkpoint, monkeypatch):
    model, examples = make_model(stock_checkpoint("llama")), make_examples(20)
    whole = {
        place: read[row]
        for places, read, _ in windows_in_batches(model, examples, 7)
        for row, place in enumerate(places)
    }
    monkeypatch.setattr(routed_paths, "MOST_TOKENS", 40)
    sizes = []
    for places, read, _ in windows_in_batches(model, examples, 7):
        longest = max(len(examples[place].token_ids) for place in places)
        assert len(places) == 1 or len(places) * longest <= 40
        sizes.append(len(places))
        for row, place in enumerate(places):
            torch.testing.assert_close(read[row], whole[place], rtol=1e-4, atol=1e-5)
    assert sum(sizes) == 20
    assert min(sizes) < max(sizes) <= 7


def test_every_part_of_the_key_makes_another_store(stock_checkpoint, tmp_path):
    checkpoint, examples = stock_checkpoint("llama"), make_examples()
    changed_path = [*examples[:-1], Example(examples[-1].question, examples[-1].token_ids, (1,) * LAYERS)]
    changed_token = [*examples[:-1], Example(examples[-1].question, (1, 2, 3), examples[-1].path)]
    other_weights = make_model(checkpoint)
    with torch.no_grad():
        other_weights.model.layers[3].mlp.up_proj.weight.mul_(1.5)
    runs = [
        (make_model(checkpoint), examples),
        (make_model(checkpoint), changed_path),
        (make_model(checkpoint), changed_token),
        (make_model(checkpoint), examples[::-1]),
        (make_model(checkpoint, num_windows=4), examples),
        (make_model(checkpoint, router_input="embeddings"), examples),
        (make_model(checkpoint).to(torch.bfloat16), examples),
        (other_weights, examples),
    ]
    stores = [store_of(model, chosen, tmp_path)[0] for model, chosen in runs]
    assert len({store.directory for store in stores}) == len(runs)
    assert all(store.statistics.examples == len(examples) for store in stores)
    assert stores[6].batch([0])["windows"].dtype == torch.bfloat16


def damage_cut_off(shard):
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 10)


def damage_cut_off_header(shard):
    with shard.open("r+b") as file:
        file.truncate(5)


def damage_remove(shard):
    shard.unlink()


@pytest.mark.parametrize("damage", [damage_cut_off, damage_cut_off_header, damage_remove])
def test_only_a_damaged_shard_is_computed_again(damage, stock_checkpoint, tmp_path):
    model, examples = make_model(stock_checkpoint("llama")), make_examples(70)
    store, _ = store_of(model, examples, tmp_path)
    expected = store.batch(range(70))["windows"]
    damage(sorted(store.directory.glob("*.safetensors"))[1])
    again, said = store_of(model, examples, tmp_path)
    assert again.statistics.examples == 6
    assert "64 more are already stored" in said[0]
    torch.testing.assert_close(again.batch(range(70))["windows"], expected)


def test_a_stale_shard_under_this_name_is_refused(stock_checkpoint, tmp_path):
    model, examples = make_model(stock_checkpoint("llama")), make_examples()
    ours, _ = store_of(model, examples, tmp_path)
    theirs, _ = store_of(model, examples[::-1], tmp_path)
    expected = ours.batch(range(12))["windows"]
    (shard,) = ours.directory.glob("*.safetensors")
    shutil.copy(next(theirs.directory.glob("*.safetensors")), shard)
    again, _ = store_of(model, examples, tmp_path)
    assert again.statistics.examples == 12
    torch.testing.assert_close(again.batch(range(12))["windows"], expected)


def test_an_interrupted_pass_continues(stock_checkpoint, tmp_path, monkeypatch):
    model, examples = make_model(stock_checkpoint("llama")), make_examples(70)
    real = features.windows_in_batches

    def interrupted(model, examples, *arguments):
        for number, batch in enumerate(real(model, examples, *arguments)):
            if number == 0 and len(examples) == 6:  # in the second shard
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(features, "windows_in_batches", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store_of(model, examples, tmp_path)
    assert store_of(model, examples, tmp_path)[0].statistics.examples == 6


def test_processes_share_the_work(stock_checkpoint, tmp_path):
    Process = namedtuple("Process", "process_index num_processes is_main_process wait_for_everyone")
    model, examples = make_model(stock_checkpoint("llama")), make_examples(3 * 64)

    class _Stopped(Exception):
        pass

    def barriers(allowed):
        count = iter(range(allowed + 1))

        def wait():
            if next(count) == allowed:
                raise _Stopped  # the others are not there in this test

        return wait

    # Process 1 of 2 computes the second of three shards and then waits for process 0.
    (tmp_path / features.key_digest(key_of(model, examples))).mkdir()
    with pytest.raises(_Stopped):
        store_of(model, examples, tmp_path, state=Process(1, 2, False, barriers(2)))
    shards = sorted(tmp_path.glob("*/*.safetensors"))
    assert [shard.name for shard in shards] == ["features-00002-of-00003.safetensors"]
    store, _ = store_of(model, examples, tmp_path)
    assert store.statistics.examples == 2 * 64


def key_of(model, examples) -> dict:
    config = model.config
    return features.feature_key(examples, fingerprint(model), config.num_windows, config.router_input, torch.float32)


def test_the_store_says_what_it_is(stock_checkpoint, tmp_path):
    model, examples = make_model(stock_checkpoint("llama")), make_examples()
    store, _ = store_of(model, examples, tmp_path)
    assert json.loads((store.directory / "features.json").read_text())["key"] == key_of(model, examples)


def test_no_room_on_the_disk(stock_checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage(1e6, 1e6, 1000))
    with pytest.raises(UserError, match=r"need 73\.7 kB, but only 1 kB are free.*--features_dir"):
        store_of(make_model(stock_checkpoint("llama")), make_examples(), tmp_path)


def test_hidden_states_that_are_not_finite(stock_checkpoint, tmp_path):
    model = make_model(stock_checkpoint("llama"))
    with torch.no_grad():
        model.model.embed_tokens.weight[17] = float("inf")
    examples = [Example("s/fine", (1, 2), (1,) * LAYERS), Example("s/bad", (1, 17), (1,) * LAYERS)]
    with pytest.raises(UserError, match=r"s/bad.*not finite in float32"):
        store_of(model, examples, tmp_path)


def test_an_empty_prompt(stock_checkpoint, tmp_path):
    with pytest.raises(UserError, match="s/empty: its prompt has no tokens"):
        store_of(make_model(stock_checkpoint("llama")), [Example("s/empty", (), (1,) * LAYERS)], tmp_path)
