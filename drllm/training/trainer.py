"""Training of all routers together, on the Hugging Face Trainer (Section 3.3 of the paper).

The frozen model runs once over the questions (drllm/features.py); after that a training step is a handful of batched
matrix products, whatever the depth of the model. `teacher_forcing="off"` (or `stored_features=False`) runs the full
model at every step instead: the slow path, kept as a rival and as a reference.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from drllm.checkpoints import load_config, load_routed, load_tokenizer, save_checkpoint
from drllm.errors import UserError
from drllm.files import is_whole, write_whole
from drllm.processes import process_state
from drllm.provenance import commit, dtype_name, fingerprint, parse_dtype, versions
from drllm.training.data import TrainingLabels, load_labels, make_examples, split_by_question
from drllm.training.features import Example, FeatureStore, compute_features, duration, pad_ids
from drllm.training.losses import class_counts, effective_number_weights, routing_loss
from drllm.training.metrics import routing_metrics
from drllm.training.router_modules import FullModelRouters, StackedRouters, init_final_biases

MAX_WINDOWS = 32


@dataclass(frozen=True)
class RouterTrainingConfig:
    """Everything a training run depends on; the fields are the arguments of train.py, the defaults the published ones.

    `gradient_accumulation` is the effective batch: examples an optimiser step, over all processes. The published
    training reaches it in micro batches of one example; from stored features a whole step fits into one batch,
    which is the same mathematics. (With several processes the Trainer fills up the last batch of an epoch, where it
    is short, with repeated examples.)
    """

    data: tuple[str, ...] = ("data",)
    model_id: str | None = None
    run_name: str = "drllm"
    output_dir: str = "checkpoints"
    num_epochs: int = 15
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 500
    gradient_accumulation: int = 16
    micro_batch_size: int | None = None
    num_windows: int = 8
    with_squad: bool = False
    with_commonsense: bool = False
    paths: str = "best"
    loss: str = "focal"
    gamma: float = 2.0
    beta: float = 0.999
    router_width: int = 128
    router_depth: int = 2
    bias_init: str = "zero"
    router_input: str = "previous_layer"
    teacher_forcing: bool = True
    stored_features: bool = True
    features_dir: str | None = None
    feature_batch_size: int = 16
    dtype: str | None = None
    bf16: bool | None = None
    eval_fraction: float = 0.1
    seed: int = 0
    report_to: str = "none"
    overwrite: bool = False

    @property
    def checkpoint(self) -> Path:
        """Where the routed checkpoint goes."""
        return Path(self.output_dir) / self.run_name


class _Rows(Dataset):
    """Indices of examples; batches are put together in one go by the collator."""

    def __init__(self, indices: Sequence[int]):
        self._indices = list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> int:
        return self._indices[i]


@dataclass(frozen=True)
class _PromptCollator:
    """Batches for `FullModelRouters`."""

    examples: Sequence[Example]
    pad_token_id: int

    def __call__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = [self.examples[i] for i in indices]
        paths = torch.tensor([e.path for e in batch])
        return pad_ids([e.token_ids for e in batch], self.pad_token_id) | {"paths": paths, "labels": paths.clone()}


# --------------------------------------------------------------------------------------------------
# The Trainer


class RouterTrainer(Trainer):
    """The stock Trainer, which stops at a loss that is no number instead of training on."""

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; lower --learning_rate (now "
                f"{self.args.learning_rate:g}) or raise --warmup_steps (now {self.args.warmup_steps:g})"
            )
        return loss


class _EpochLines(TrainerCallback):
    """One line an epoch."""

    def __init__(self, say: Callable[[str], None], evaluated_on: str):
        self._say = say
        self._evaluated_on = evaluated_on

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        shown = {"macro_f1": ".3f", "f1_skip": ".3f", "f1_execute": ".3f", "f1_repeat": ".3f", "avg_layers": ".2f"}
        values = ", ".join(f"{name} {metrics['eval_' + name]:{form}}" for name, form in shown.items())
        train_loss = f"loss {losses[-1]:.4f}, " if losses else ""
        loss = f"{self._evaluated_on} routers_loss {metrics['eval_routers_loss']:.4f}"
        self._say(f"epoch {state.epoch:.0f}: {train_loss}{loss}, {values}")


@dataclass(frozen=True)
class FitResult:
    """What `fit` found: held-out metrics of the best epoch, the log, the time."""

    metrics: dict[str, float]
    history: list[dict]
    best_step: int
    steps: int
    seconds: float


def fit(
    module: nn.Module,
    collator: Callable[[list[int]], dict[str, torch.Tensor]],
    train: Sequence[int],
    held_out: Sequence[int],
    counts: torch.Tensor,
    config: RouterTrainingConfig,
    trainer_dir: Path,
    bf16: bool = False,
    resume_from: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = print,
) -> FitResult:
    """Train the routers in `module` and leave the best weights by held-out macro-F1 in it.

    Args:
        module: maps a batch, less its labels, to {"logits": [B, L, 3]}.
        collator: from example indices to a batch with "labels" [B, L].
        train, held_out: example indices.
        counts: [3] class counts of the training labels.
        trainer_dir: for the Trainer's checkpoints, one an epoch.
        resume_from: one of them.
    """
    alpha = effective_number_weights(counts, config.beta)

    def loss_of(outputs: dict, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        losses = routing_loss(outputs["logits"], labels, config.loss, alpha, config.gamma)
        # Divided by the decisions of the whole effective batch, the gradient is that of its mean however the batch is
        # cut into micro batches and processes.
        return losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)

    def metrics_of(prediction) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        return evaluate_logits(logits, labels, config, alpha)

    arguments = _trainer_arguments(config, trainer_dir, len(train), bf16, isinstance(module, StackedRouters), say)
    trainer = RouterTrainer(
        model=module,
        args=arguments,
        data_collator=collator,
        train_dataset=_Rows(train),
        eval_dataset=_Rows(held_out or train),
        compute_loss_func=loss_of,
        compute_metrics=metrics_of,
        callbacks=[_EpochLines(say, "held-out" if held_out else "training"), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    seconds = time.perf_counter() - start
    best_step = trainer.state.best_global_step
    best = next(e for e in trainer.state.log_history if e["step"] == best_step and "eval_macro_f1" in e)
    metrics = {name.removeprefix("eval_"): value for name, value in best.items() if name.startswith("eval_")}
    metrics = {name: value for name, value in metrics.items() if name not in _NO_METRICS}
    return FitResult(metrics, trainer.state.log_history, best_step, trainer.state.global_step, seconds)


_NO_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def evaluate_logits(
    logits: torch.Tensor, labels: torch.Tensor, config: RouterTrainingConfig, alpha: torch.Tensor
) -> dict[str, float]:
    """`routing_metrics` of the greedy decisions for logits [N, L, 3], and routers_loss, the mean training loss."""
    metrics = routing_metrics(logits.argmax(-1), labels)
    metrics["routers_loss"] = routing_loss(logits, labels, config.loss, alpha, config.gamma).mean().item()
    return metrics


def _trainer_arguments(
    config: RouterTrainingConfig, trainer_dir: Path, num_train: int, bf16: bool, stored: bool, say
) -> TrainingArguments:
    effective = config.gradient_accumulation
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = config.micro_batch_size or (max(effective // world, 1) if stored else 1)
    if effective % (micro * world):
        raise UserError(
            f"--gradient_accumulation {effective} (examples an optimiser step) is no multiple of --micro_batch_size "
            f"{micro} times {world} processes"
        )
    steps = math.ceil(math.ceil(num_train / (micro * world)) / (effective // (micro * world))) * config.num_epochs
    if config.warmup_steps > steps:
        peak = config.learning_rate * steps / config.warmup_steps
        say(
            f"warning: the warm-up of {config.warmup_steps} steps is longer than the run of {steps} steps, so the "
            f"learning rate only reaches {peak:.2g} of {config.learning_rate:.2g}; pass a smaller --warmup_steps"
        )
    arguments = TrainingArguments(
        output_dir=str(trainer_dir),
        run_name=config.run_name,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=64 if stored else config.feature_batch_size,
        gradient_accumulation_steps=effective // (micro * world),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        bf16=bf16,
        use_cpu=_process_state().device.type == "cpu",
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="macro_f1",
        greater_is_better=True,
        logging_steps=10,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to=config.report_to,
    )
    # With several GPUs and one process the Trainer would multiply the batch by them; the routers need only one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


# --------------------------------------------------------------------------------------------------
# A run, from labels to checkpoint


def train_routers(config: RouterTrainingConfig, callbacks: Sequence[TrainerCallback] = ()) -> dict:
    """Train routers on labels and write the routed checkpoint to `config.checkpoint`.

    The folder gets the full checkpoint (base weights bit-identical to the source's, routers, tokenizer), the small one
    (routers/), labels_manifest.json and, last of all, training.json. A run that was killed is resumed from its last
    epoch; a finished one is not repeated.

    Returns:
        The training record, as in training.json.

    Raises:
        UserError: bad arguments or labels, labels of another model, a folder that holds another run, NaN loss.
    """
    state = _process_state()
    say = print if state.is_main_process else _silence
    _check_config(config)
    labels = load_labels(config.data, config.with_squad, config.with_commonsense, say)
    model_id, revision = _base_of(config, labels)
    dtype = parse_dtype(labels.dtype)
    tokenizer = load_tokenizer(model_id, revision)
    examples = make_examples(labels, tokenizer, config.paths)
    _check_examples(examples, load_config(model_id, revision), config)

    identity = _identity(config, labels, examples)
    if (finished := _finished_run(config, identity, say)) is not None:
        return finished
    trainer_dir = config.checkpoint / "trainer"
    resume_from = _resumable(config, identity, trainer_dir, state, say)

    start = time.perf_counter()
    routed = load_routed(model_id, dtype, revision, _router_fields(config))
    found = fingerprint(routed)
    if found != labels.model_fingerprint:
        raise UserError(
            f"the labels in {' '.join(config.data)} were made with another model: their weights have the fingerprint "
            f"{labels.model_fingerprint}, those of {model_id} {found}; pass the model they were made with "
            "(--model_id), or make the labels again"
        )
    routed.config.base_model_name, routed.config.base_model_revision = model_id, revision
    routed.config.base_model_fingerprint = found
    routed.config.trained_num_windows = config.num_windows
    routed.eval()

    train, held_out = split_by_question(examples, config.eval_fraction, config.seed)
    counts = class_counts(torch.tensor([examples[i].path for i in train]))
    _say_data(say, examples, train, held_out, counts)
    routed.model.routers.float()  # weights in training; the checkpoint gets them in the model's dtype
    routed.model.init_routers(config.seed)
    if config.bias_init == "frequency":
        init_final_biases(routed.model.routers, counts)

    bf16 = dtype == torch.bfloat16 if config.bf16 is None else config.bf16
    pad_token_id = tokenizer.pad_token_id or 0
    store = None
    if config.teacher_forcing and config.stored_features:
        routed.to(state.device)
        store = compute_features(
            routed,
            examples,
            Path(config.features_dir or Path(config.data[0]) / "features"),
            model_fingerprint=found,
            pad_token_id=pad_token_id,
            batch_size=config.feature_batch_size,
            state=state,
            say=say,
        )
        routed.to("cpu")
        module, collator = StackedRouters(routed.model.routers), store.batch
    else:
        say("training: the full model runs at every step (no stored features)")
        routed.to(state.device)
        module = FullModelRouters(routed, config.teacher_forcing)
        collator = _PromptCollator(examples, pad_token_id)

    result = fit(module, collator, train, held_out, counts, config, trainer_dir, bf16, resume_from, callbacks, say)
    if store is not None:
        module.to("cpu").copy_to(routed.model.routers)
    routed.to("cpu")
    routed.model.routers.to(dtype)
    metrics = result.metrics
    if store is not None:
        alpha = effective_number_weights(counts, config.beta)
        metrics = evaluate_routers(routed.model.routers, store, held_out or train, config, alpha)
    passes = dataclasses.asdict(store.statistics if store else module.statistics)
    # Unmap the features before the checkpoint is written; the Trainer's cycles would keep them.
    del store, module, collator
    gc.collect()
    record = {
        "config": dataclasses.asdict(config) | {"model_id": model_id, "bf16": bf16},
        "metrics": metrics,
        "metrics_on": "held-out questions" if held_out else "training questions",
        "train_examples": len(train),
        "held_out_examples": len(held_out),
        "questions_per_set": dict(Counter(q.split("/")[0] for q in {e.question for e in examples})),
        "class_counts": counts.long().tolist(),
        "alpha": effective_number_weights(counts, config.beta).tolist(),
        "best_step": result.best_step,
        "steps": result.steps,
        "base_model_passes": passes,
        "seconds_training": result.seconds,
        "seconds": time.perf_counter() - start,
        "base_model": {"name": model_id, "revision": revision, "fingerprint": found, "dtype": dtype_name(dtype)},
        "versions": versions(),
        "commit": commit(),
        "identity": identity,
        "history": result.history,
    }
    if state.is_main_process:
        _export(routed, tokenizer, config.checkpoint, labels, record)
        say(
            f"wrote {config.checkpoint} after {duration(record['seconds'])}: "
            + ", ".join(f"{n} {metrics[n]:.3f}" for n in ("macro_f1", "f1_skip", "f1_execute", "f1_repeat"))
            + f", avg_layers {metrics['avg_layers']:.2f} of {labels.num_layers} on {record['metrics_on']}"
        )
    state.wait_for_everyone()
    return record


@torch.no_grad()
def evaluate_routers(
    routers: Sequence[nn.Module],
    store: FeatureStore,
    indices: Sequence[int],
    config: RouterTrainingConfig,
    alpha: torch.Tensor,
    batch_size: int = 64,
) -> dict[str, float]:
    """Metrics of the RouterBlocks as the checkpoint holds them, dtype included, on stored features."""
    logits, labels = [], []
    for start in range(0, len(indices), batch_size):
        batch = store.batch(indices[start : start + batch_size])
        windows = batch["windows"].expand(-1, len(routers), -1, -1)
        votes = [router(windows[:, r], batch["window_mask"]) for r, router in enumerate(routers)]
        logits.append(torch.stack(votes, 1))
        labels.append(batch["labels"])
    return evaluate_logits(torch.cat(logits), torch.cat(labels), config, alpha)


def _process_state() -> PartialState:
    # A process that is done with its share of the features waits for the others, for hours if need be.
    return process_state(datetime.timedelta(days=1))


def quiet_libraries() -> None:
    """For scripts: no progress bars and notices of transformers, which would drown what the script says."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _silence(message: str) -> None:
    """Takes the place of `print` on all processes but the first."""


def _router_fields(config: RouterTrainingConfig) -> dict:
    return {
        "num_windows": config.num_windows,
        "router_width": config.router_width,
        "router_depth": config.router_depth,
        "router_input": config.router_input,
    }


def _check_config(config: RouterTrainingConfig) -> None:
    positive = (
        "num_epochs",
        "learning_rate",
        "gradient_accumulation",
        "micro_batch_size",
        "router_width",
        "router_depth",
        "feature_batch_size",
    )
    for name in positive:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}; it must be greater than 0")
    for name in ("weight_decay", "warmup_steps", "gamma"):
        if not getattr(config, name) >= 0:
            raise UserError(f"--{name} is {getattr(config, name)}; it must not be negative")
    if not 1 <= config.num_windows <= MAX_WINDOWS:
        raise UserError(f"--num_windows is {config.num_windows}; it must lie in 1..{MAX_WINDOWS}")
    if not 0 <= config.beta <= 1:
        raise UserError(f"--beta is {config.beta}; it must lie in [0, 1]")
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"--report_to {config.report_to}: not installed; pip install {config.report_to}")
    if not 0 <= config.eval_fraction < 1:
        raise UserError(f"--eval_fraction is {config.eval_fraction}; it must lie in [0, 1)")


def _base_of(config: RouterTrainingConfig, labels: TrainingLabels) -> tuple[str, str | None]:
    """(name, revision) of the base model; refuses another dtype than the labels'."""
    if config.dtype is not None and dtype_name(config.dtype) != labels.dtype:
        raise UserError(
            f"--dtype {dtype_name(config.dtype)} differs from that of the labels, {labels.dtype}: a model in another "
            "dtype answers other questions right; leave --dtype away, or make the labels again with it"
        )
    if config.model_id is None or config.model_id == labels.model:
        return labels.model, labels.revision
    return config.model_id, None


def _check_examples(examples: Sequence[Example], base_config, config: RouterTrainingConfig) -> None:
    layers = base_config.num_hidden_layers
    longest = getattr(base_config, "max_position_embeddings", None)
    for example in examples:
        if len(example.path) != layers:
            raise UserError(
                f"the labels in {' '.join(config.data)} were made with another model: question {example.question} has "
                f"a path over {len(example.path)} layers, the model has {layers}"
            )
        if longest is not None and len(example.token_ids) > longest:
            raise UserError(
                f"question {example.question}: its prompt has {len(example.token_ids)} tokens, the model takes "
                f"{longest}; remove it from the labels"
            )


_NOT_IDENTITY = ("data", "run_name", "output_dir", "features_dir", "feature_batch_size", "report_to", "overwrite")


def _identity(config: RouterTrainingConfig, labels: TrainingLabels, examples: Sequence[Example]) -> dict:
    """What a run's result depends on: two runs of equal identity end with equal weights."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.question, example.token_ids, example.path]).encode())
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_IDENTITY}
    fields["model_id"] = None  # the fingerprint says which model, however it is spelled
    fields["dtype"] = labels.dtype
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return fields | {"model": labels.model_fingerprint, "labels": digest.hexdigest()[:16], "processes": world}


def _differences(found: dict, wanted: dict) -> str:
    names = [name for name in wanted if found.get(name) != wanted[name]]
    return ", ".join(f"{name} {found.get(name)} there, {wanted[name]} here" for name in names)


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _finished_run(config: RouterTrainingConfig, identity: dict, say) -> dict | None:
    """The record of an equal run that ended here; UserError when another one did."""
    record = _read_json(config.checkpoint / "training.json")
    if record is None or config.overwrite:
        return None
    if record["identity"] == identity:
        say(f"{config.checkpoint} is trained already, nothing to do (--overwrite trains it again)")
        return record
    raise UserError(
        f"{config.checkpoint} holds another run ({_differences(record['identity'], identity)}); pass another "
        "--run_name, or --overwrite"
    )


def _resumable(config: RouterTrainingConfig, identity: dict, trainer_dir: Path, state, say) -> Path | None:
    """The last complete checkpoint of an equal run that was stopped; prepares `trainer_dir` for this run."""
    found = _read_json(trainer_dir / "run.json")
    if found is not None and found != identity and not config.overwrite:
        raise UserError(
            f"{config.checkpoint} holds an unfinished other run ({_differences(found, identity)}); pass another "
            "--run_name, or --overwrite"
        )
    last = None
    if found == identity and not config.overwrite:
        complete = [d for d in _trainer_checkpoints(trainer_dir) if is_complete_checkpoint(d, identity["processes"])]
        last = complete[-1] if complete else None
    # Everybody has looked before the first process tidies up.
    state.wait_for_everyone()
    if state.is_main_process:
        for directory in _trainer_checkpoints(trainer_dir):
            if last is None or _step_of(directory) > _step_of(last):
                shutil.rmtree(directory)
        if last is None:
            (config.checkpoint / "training.json").unlink(missing_ok=True)
        trainer_dir.mkdir(parents=True, exist_ok=True)
        write_whole(trainer_dir / "run.json", json.dumps(identity, indent=2) + "\n")
        if last is not None:
            say(f"training: resuming {config.checkpoint} from step {_step_of(last)}")
    state.wait_for_everyone()
    return last


def _step_of(directory: Path) -> int:
    return int(directory.name.removeprefix("checkpoint-"))


def _trainer_checkpoints(trainer_dir: Path) -> list[Path]:
    found = [d for d in trainer_dir.glob("checkpoint-*") if d.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step_of)


def is_complete_checkpoint(directory: Path, processes: int = 1) -> bool:
    """Whether a checkpoint of the Trainer was written to its end, by every process."""
    states = list(directory.glob("rng_state*.pth"))
    archives = [directory / "optimizer.pt", directory / "scheduler.pt", *states]
    if len(states) != processes or not all(zipfile.is_zipfile(path) for path in archives):
        return False
    return is_whole(directory / "model.safetensors") and _read_json(directory / "trainer_state.json") is not None


def _say_data(say, examples, train, held_out, counts) -> None:
    questions = len({e.question for e in examples})
    shares = counts / counts.sum()
    say(
        f"labels: {len(examples)} paths of {questions} questions, {len(train)} to train on, {len(held_out)} held out; "
        f"skip {shares[0]:.1%}, execute {shares[1]:.1%}, repeat {shares[2]:.1%}"
    )
    if not held_out:
        say("warning: no question is held out, so metrics and the best epoch are those of the training questions")


def _export(routed, tokenizer, directory: Path, labels: TrainingLabels, record: dict) -> None:
    manifests = labels.manifests[0] if len(labels.manifests) == 1 else labels.manifests
    save_checkpoint(routed, tokenizer, directory, manifests, record)
    write_whole(directory / "training.json", json.dumps(record, indent=2) + "\n")
