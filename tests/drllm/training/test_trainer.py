"""Training runs, from labels to a checkpoint that loads."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from drllm import files
from drllm.errors import UserError
from drllm.training import resuming, trainer
from drllm.training.config import RouterTrainingConfig
from drllm.training.data import load_labels, make_examples, split_by_question
from drllm.training.losses import effective_number_weights, routing_loss
from drllm.training.metrics import routing_metrics
from drllm.training.resuming import is_complete_checkpoint
from drllm.training.trainer import train_routers
from train_models.paths import path_to_layer_indices

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tiny_labels, tmp_path, capsys):
    """Train with a few fields changed; returns (record, checkpoint folder, what was printed)."""

    def train(*, data=tiny_labels, callbacks=(), **fields):
        fields = {"num_epochs": 2, "warmup_steps": 1, "eval_fraction": 0.25} | fields
        config = RouterTrainingConfig(
            data=(str(data),),
            output_dir=str(tmp_path / "checkpoints"),
            features_dir=str(tmp_path / "features"),
            **fields,
        )
        record = train_routers(config, callbacks)
        return record, config.checkpoint, capsys.readouterr().out

    return train


def router_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if ".routers." in name}


def assert_equal_weights(a: Path, b: Path, exact: bool = True) -> None:
    first, second = router_weights(a), router_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        if exact:
            assert torch.equal(first[name], second[name]), name
        else:
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=2e-5, msg=name)


def test_checkpoint_holds_all_it_should(run, tiny_base, tiny_labels):
    record, checkpoint, out = run(num_windows=4)
    source, made = load_file(tiny_base / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    for name, tensor in source.items():
        assert torch.equal(made.pop(name), tensor), name  # base weights: bit-identical
    assert made
    assert all(".routers." in name for name in made)
    assert not torch.equal(made["model.routers.0.layers.0.weight"], torch.zeros(128, 32))

    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert model.config.trained_num_windows == model.config.num_windows == 4
    assert model.config.base_model_fingerprint == record["base_model"]["fingerprint"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    out_ids = model.generate(**tokenizer("w1 w5 w7", return_tensors="pt"), max_new_tokens=2)
    assert out_ids.shape[1] >= 4

    assert json.loads((checkpoint / "training.json").read_text()) == json.loads(json.dumps(record))
    manifest = json.loads((checkpoint / "labels_manifest.json").read_text())
    assert manifest.items() >= json.loads((tiny_labels / "manifest.json").read_text()).items()
    assert {p.name for p in (checkpoint / "routers").iterdir()} == {
        "routers.safetensors",
        "router_config.json",
        "README.md",
        "labels_manifest.json",
    }
    names = ["macro_f1", "f1_skip", "f1_execute", "f1_repeat", "acc_skip", "acc_execute", "acc_repeat", "avg_layers"]
    assert {*names, "routers_loss"} <= record["metrics"].keys()
    assert "labels: 24 paths of 24 questions, 18 to train on, 6 held out" in out
    assert sum(record["class_counts"]) == 18 * 5
    assert (
        "class weights: skip 1.000, execute 1.000, repeat 1.000 at beta 0 (auto); the paper's: 0.916, 0.905, 1.179"
        in out
    )


def test_metrics_are_those_of_the_checkpoint(run, tiny_labels):
    record, checkpoint, _ = run(num_epochs=4, num_windows=3)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    examples = make_examples(load_labels([str(tiny_labels)]), tokenizer)
    _, held_out = split_by_question(examples, 0.25, seed=0)
    logits = []
    for i in held_out:
        prompt = torch.tensor([examples[i].token_ids])
        forced = path_to_layer_indices(examples[i].path)
        logits.append(model(prompt, layer_indices=forced, output_router_logits=True).router_logits)
    labels = torch.tensor([examples[i].path for i in held_out])
    counts = torch.tensor(record["class_counts"])
    assert record["beta"] == 0  # 90 decisions are fewer than 127
    assert record["config"]["beta"] == "auto"
    alpha = effective_number_weights(counts, record["beta"])
    assert record["alpha"] == pytest.approx(alpha.tolist())
    assert record["paper_alpha"] == pytest.approx([0.916, 0.905, 1.179], abs=5e-4)
    expected = routing_metrics(torch.cat(logits).argmax(-1), labels)
    expected["routers_loss"] = routing_loss(torch.cat(logits), labels, "focal", alpha).mean().item()
    assert record["metrics"] == pytest.approx(expected, rel=1e-4)


def test_the_checkpoint_routes_as_it_was_taught(run, tiny_labels):
    # Labels follow from the first word of the prompt. Without a held-out question the routers may learn them by heart.
    _, checkpoint, _ = run(num_epochs=40, learning_rate=1e-2, eval_fraction=0.0)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    rows = [json.loads(line) for line in (tiny_labels / "labels.jsonl").read_text().splitlines()]
    own = [model(**tokenizer(row["prompt"], return_tensors="pt")).paths[0].tolist() for row in rows]
    assert sum(path == row["optimal_layer_config"] for path, row in zip(own, rows, strict=True)) >= 20


class _Spoil(TrainerCallback):
    """Turns the routers' weights around before the last epoch."""

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if state.epoch > args.num_train_epochs - 1.5:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.neg_()


def test_the_best_epoch_is_kept(run):
    record, _, out = run(num_epochs=6, learning_rate=3e-3, keep="best", callbacks=[_Spoil()])
    evaluated = [entry for entry in record["history"] if "eval_macro_f1" in entry]
    best = max(evaluated, key=lambda entry: entry["eval_macro_f1"])
    assert len(evaluated) == out.count("held-out routers_loss") == 6
    assert best["step"] < evaluated[-1]["step"]
    assert record["best_step"] == best["step"]
    # The record's metrics are measured on the weights of the checkpoint.
    assert record["metrics"]["macro_f1"] == pytest.approx(best["eval_macro_f1"])
    assert record["metrics"]["routers_loss"] == pytest.approx(best["eval_routers_loss"])


def test_the_full_model_gives_the_same_result(run):
    stored, first, _ = run(run_name="stored")
    full, second, out = run(run_name="full", stored_features=False)
    assert "the full model runs at every step" in out
    assert_equal_weights(first, second, exact=False)
    assert full["metrics"]["routers_loss"] == pytest.approx(stored["metrics"]["routers_loss"], rel=1e-4)
    assert stored["base_model_passes"]["examples"] == 24


def test_without_teacher_forcing(run):
    record, checkpoint, out = run(teacher_forcing=False)
    _, forced, _ = run(run_name="forced")
    assert "the full model runs at every step" in out
    assert record["base_model_passes"]["examples"] > 0
    last = "model.routers.4.layers.0.weight"
    assert not torch.allclose(router_weights(checkpoint)[last], router_weights(forced)[last], atol=1e-4)


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batches_do_not_change_the_result(micro_batch_size, run):
    # 18 examples: the last step of an epoch is a short one.
    _, whole, _ = run(run_name="whole")
    _, cut, _ = run(run_name="cut", micro_batch_size=micro_batch_size)
    assert_equal_weights(whole, cut, exact=False)


@pytest.fixture(scope="module")
def plain(tiny_labels, tmp_path_factory) -> Path:
    """The checkpoint of a run with nothing changed."""
    config = RouterTrainingConfig(
        data=(str(tiny_labels),),
        output_dir=str(tmp_path_factory.mktemp("plain")),
        num_epochs=2,
        warmup_steps=1,
        eval_fraction=0.25,
        learning_rate=1e-2,
    )
    train_routers(config)
    return config.checkpoint


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "ce"},
        {"loss": "weighted_ce", "beta": "1"},
        {"gamma": 0.5},
        {"router_width": 16, "router_depth": 3},
        {"router_depth": 1},
        {"bias_init": "frequency"},
        {"router_input": "embeddings"},
        {"paths": "all"},
        {"num_windows": 32},
        {"bf16": True},
        {"weight_decay": 0.3},
        {"seed": 5},
    ],
)
def test_every_choice_changes_the_result_and_loads(fields, run, plain):
    record, checkpoint, _ = run(run_name="changed", learning_rate=1e-2, **fields)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    for name in ("num_windows", "router_width", "router_depth", "router_input"):
        assert getattr(model.config, name) == record["config"][name]
    assert model(torch.tensor([[5, 6, 7]])).paths.shape == (1, 5)
    before, after = router_weights(plain), router_weights(checkpoint)
    assert before.keys() != after.keys() or any(
        before[name].shape != after[name].shape or not torch.equal(before[name], after[name]) for name in before
    )


def test_training_is_repeatable(run):
    _, first, _ = run(run_name="first")
    _, second, _ = run(run_name="second")
    assert_equal_weights(first, second)


def test_bfloat16_labels_make_a_bfloat16_checkpoint(run, tiny_base, labels_maker, tmp_path):
    data = labels_maker(tmp_path / "data", tiny_base, 8, dtype="bfloat16")
    record, checkpoint, _ = run(data=data)
    assert record["config"]["bf16"] is True
    source, made = load_file(tiny_base / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert all(torch.equal(made[name], tensor.to(torch.bfloat16)) for name, tensor in source.items())


class _Stop(TrainerCallback):
    """Breaks a run off after some steps, in the middle of an epoch."""

    def __init__(self, step: int):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 2, "gradient_accumulation": 4}])
def test_an_interrupted_run_is_resumed_to_the_same_result(fields, run):
    fields |= {"num_epochs": 4, "paths": "all"}  # several steps an epoch
    plain, undisturbed, _ = run(run_name="undisturbed", **fields)
    with pytest.raises(KeyboardInterrupt):
        run(run_name="disturbed", callbacks=[_Stop(plain["steps"] // 2 + 1)], **fields)
    record, disturbed, out = run(run_name="disturbed", **fields)
    assert f"resuming {disturbed} from step {plain['steps'] // 2}" in out
    assert_equal_weights(undisturbed, disturbed)
    assert record["metrics"] == plain["metrics"]
    keep = [e for e in plain["history"] if "eval_macro_f1" in e]
    assert [e["eval_routers_loss"] for e in keep] == [
        e["eval_routers_loss"] for e in record["history"] if "eval_macro_f1" in e
    ]


def test_a_run_stopped_while_it_writes_the_checkpoint_is_finished(run, monkeypatch):
    _, undisturbed, _ = run(run_name="undisturbed")

    def interrupted(*args):
        raise KeyboardInterrupt

    real = trainer._export
    monkeypatch.setattr(trainer, "_export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(run_name="stopped")
    monkeypatch.setattr(trainer, "_export", real)
    _, stopped, out = run(run_name="stopped")
    assert f"resuming {stopped} from step 4" in out
    assert_equal_weights(undisturbed, stopped)


def test_a_run_killed_while_it_notes_its_arguments_keeps_its_checkpoints(run, monkeypatch):
    _, undisturbed, _ = run(run_name="undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run(run_name="killed", callbacks=[_Stop(3)])
    write = files.write_whole

    def cut_off(path, content):
        if path.name != "run.json":
            return write(path, content)

        def half():
            yield content[: len(content) // 2].encode()
            raise KeyboardInterrupt

        write(path, half())

    with monkeypatch.context() as patched:
        patched.setattr(resuming, "write_whole", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(run_name="killed")
    _, killed, out = run(run_name="killed")
    assert f"resuming {killed} from step 2" in out
    assert_equal_weights(undisturbed, killed)


def test_a_killed_run_is_resumed_to_the_same_result(run, tiny_labels, tmp_path):
    fields = {"num_epochs": 60, "gradient_accumulation": 2, "warmup_steps": 10, "eval_fraction": 0.25}
    arguments = [f"--{name}={value}" for name, value in fields.items()]
    command = [sys.executable, "train.py", "--data", str(tiny_labels), "--run_name", "killed", *arguments]
    command += ["--output_dir", str(tmp_path / "checkpoints"), "--features_dir", str(tmp_path / "features")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    trainer = tmp_path / "checkpoints" / "killed" / "trainer"
    try:
        deadline = time.monotonic() + 120
        # A folder of the fourth epoch or later appears: somewhere in the writing of it, the process dies.
        while not any(int(d.name.split("-")[1]) >= 4 * 9 for d in trainer.glob("checkpoint-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (trainer.parent / "training.json").exists()
    _, killed, out = run(run_name="killed", **fields)
    assert "resuming" in out
    _, undisturbed, _ = run(run_name="undisturbed", **fields)
    assert_equal_weights(undisturbed, killed)


def test_a_checkpoint_cut_off_while_written_is_passed_over(run):
    fields = {"num_epochs": 6, "gradient_accumulation": 6}
    _, undisturbed, _ = run(run_name="undisturbed", **fields)
    with pytest.raises(KeyboardInterrupt):
        run(run_name="cut", callbacks=[_Stop(13)], **fields)
    trainer = undisturbed.parent / "cut" / "trainer"
    os.truncate(trainer / "checkpoint-12" / "optimizer.pt", 100)
    _, cut, out = run(run_name="cut", **fields)
    assert f"resuming {cut} from step " in out
    assert "from step 12" not in out
    assert_equal_weights(undisturbed, cut)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("how", ["missing", "cut off"])
def test_incomplete_trainer_checkpoints_are_noticed(file, how, finished_trainer, tmp_path):
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(finished_trainer, copy)
    assert is_complete_checkpoint(copy)
    assert not is_complete_checkpoint(copy, processes=2)
    if how == "missing":
        (copy / file).unlink()
    else:
        os.truncate(copy / file, (copy / file).stat().st_size - 5)
    assert not is_complete_checkpoint(copy)


@pytest.fixture(scope="module")
def finished_trainer(tiny_labels, tmp_path_factory) -> Path:
    """A complete checkpoint of the Trainer."""
    config = RouterTrainingConfig(
        data=(str(tiny_labels),), output_dir=str(tmp_path_factory.mktemp("finished")), num_epochs=1
    )
    train_routers(config)
    (checkpoint,) = (config.checkpoint / "trainer").glob("checkpoint-*")
    return checkpoint


def test_a_finished_run_is_not_repeated(run):
    record, checkpoint, _ = run()
    stamp = (checkpoint / "model.safetensors").stat().st_mtime_ns
    again, _, out = run()
    assert again == json.loads(json.dumps(record))
    assert "is already trained" in out
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_run_in_the_folder_is_refused(run):
    run()
    with pytest.raises(UserError, match=r"holds another run \(num_epochs 2 there, 3 here\); pass another --run_name"):
        run(num_epochs=3)
    record, _, _ = run(num_epochs=3, overwrite=True)
    assert record["config"]["num_epochs"] == 3


def test_another_unfinished_run_in_the_folder_is_refused(run):
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[_Stop(1)])
    with pytest.raises(UserError, match=r"another, unfinished run \(learning_rate 0.001 there, 0.1 here\)"):
        run(learning_rate=0.1)


def test_a_warm_up_longer_than_the_run_is_said(run):
    _, _, out = run(warmup_steps=500)
    assert "the warm-up of 500 steps is longer than the run of 4 steps" in out
    assert "only reaches 8e-06 of 0.001" in out
    _, _, out = run(run_name="short", warmup_steps=4)
    assert "warm-up" not in out


def test_a_loss_that_is_no_number_stops_the_run(run):
    with pytest.raises(UserError, match=r"the loss became (nan|inf) at step \d+; lower --learning_rate \(now 1e\+30\)"):
        run(learning_rate=1e30, num_epochs=10, warmup_steps=0)


@pytest.mark.parametrize("questions", [1, 2])
def test_one_question_and_two(questions, run, tiny_base, labels_maker, tmp_path):
    data = labels_maker(tmp_path / "data", tiny_base, questions)
    record, _, out = run(data=data)
    assert ("no question is held out" in out) == (questions == 1)
    assert (record["train_examples"], record["held_out_examples"]) == (1, questions - 1)


def test_a_single_class(run, tiny_base, labels_maker, tmp_path):
    data = labels_maker(tmp_path / "data", tiny_base, 6)
    rows = [json.loads(line) for line in (data / "labels.jsonl").read_text().splitlines()]
    rows = [row | {"optimal_layer_config": [2] * 5} for row in rows]
    (data / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record, _, _ = run(data=data, num_epochs=10, learning_rate=1e-2)
    assert record["class_counts"][:2] == [0, 0]
    assert record["metrics"]["macro_f1"] == record["metrics"]["f1_repeat"] == 1.0
    assert record["metrics"]["avg_layers"] == 10


def test_labels_of_another_model_are_refused(run, base_maker, tmp_path):
    other = base_maker(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"made with another model: their weights have the fingerprint \w+, those of"):
        run(model_id=str(other))
    deeper = base_maker(tmp_path / "deeper", layers=6)
    with pytest.raises(
        UserError, match=r"made with another model: question .* has a path over 5 layers, the model has 6"
    ):
        run(model_id=str(deeper))


def test_the_same_model_under_another_name_is_accepted(run, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    record, _, _ = run(model_id=str(tmp_path / "moved"))
    assert record["base_model"]["name"] == str(tmp_path / "moved")


def test_another_dtype_is_refused(run):
    with pytest.raises(UserError, match="--dtype bfloat16 differs from that of the labels, float32"):
        run(dtype="bf16")
    run(dtype="fp32")


def test_a_missing_model(run, tmp_path):
    with pytest.raises(UserError, match=r"cannot load the tokenizer of .*nowhere|cannot load the model .*nowhere"):
        run(model_id=str(tmp_path / "nowhere"))


def test_a_prompt_longer_than_the_context(run, tiny_base, labels_maker, tmp_path):
    data = labels_maker(tmp_path / "data", tiny_base, 3)
    rows = [json.loads(line) for line in (data / "labels.jsonl").read_text().splitlines()]
    rows[1]["prompt"] = "w1 " * 65
    (data / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="its prompt has 65 tokens, the model takes 64"):
        run(data=data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_windows": 33}, "--num_windows is 33; it must lie in 1..32"),
        ({"num_windows": 0}, "--num_windows is 0"),
        ({"beta": "1.5"}, "--beta is 1.5"),
        ({"gamma": -1.0}, "--gamma is -1.0; it must not be negative"),
        ({"learning_rate": 0.0}, "--learning_rate is 0.0; it must be greater than 0"),
        ({"learning_rate": float("nan")}, "--learning_rate is nan"),
        ({"eval_fraction": 1.0}, "--eval_fraction is 1.0"),
        ({"micro_batch_size": 5}, "--gradient_accumulation 16 .* is not a multiple of --micro_batch_size 5"),
    ],
)
def test_bad_arguments(fields, message, run):
    with pytest.raises(UserError, match=message):
        run(**fields)


def test_logging_to_tensorboard(run):
    _, checkpoint, _ = run(report_to="tensorboard")
    assert list(checkpoint.rglob("events.out.tfevents.*"))


def test_published_defaults():
    config = RouterTrainingConfig()
    published = {
        "num_epochs": 25,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "warmup_steps": 500,
        "gradient_accumulation": 16,
        "num_windows": 8,
        "with_squad": False,
        "with_commonsense": False,
        "loss": "focal",
        "gamma": 2.0,
        "beta": "auto",  # 0.999 at the paper's number of labels: test_losses.py
        "keep": "last",
        "router_width": 128,
        "router_depth": 2,
        "bias_init": "zero",
        "router_input": "previous_layer",
        "teacher_forcing": True,
        "paths": "best",
    }
    assert {name: dataclasses.asdict(config)[name] for name in published} == published
