"""The optimisation: all routers at once, on the Hugging Face Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from drllm.errors import UserError
from drllm.files import disk_errors
from drllm.labels import Example
from drllm.questions.padding import pad_ids
from drllm.training.config import RouterTrainingConfig
from drllm.training.data import split_by_question
from drllm.training.losses import NUM_CLASSES, class_counts, effective_number_weights, routing_loss
from drllm.training.metrics import confusion_matrix, metrics_of_counts, routing_metrics
from drllm.training.router_modules import StackedRouters

_NOT_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


@dataclass(frozen=True)
class Split:
    """Indices of the examples to train on and of those held out, and what follows from the former.

    Attributes:
        counts: [3] labels per class of the training examples.
        beta: effective number of samples of the class weights.
        alpha: [3] class weights.
    """

    train: list[int]
    held_out: list[int]
    counts: torch.Tensor
    beta: float
    alpha: torch.Tensor

    @classmethod
    def of(cls, examples: Sequence[Example], config: RouterTrainingConfig) -> Split:
        """The split of `config`, with class counts and weights (`effective_number_weights`)."""
        train, held_out = split_by_question(examples, config.eval_fraction, config.seed)
        counts = class_counts(torch.tensor([examples[i].path for i in train]))
        beta = config.beta_at(float(counts.sum()))
        return cls(train, held_out, counts, beta, effective_number_weights(counts, beta))

    @property
    def evaluated(self) -> list[int]:
        """What metrics are measured on: the held-out examples, or the training ones if none is held out."""
        return self.held_out or self.train


@dataclass(frozen=True)
class FitSettings:
    """How to run `fit`, beyond what the result depends on.

    Attributes:
        trainer_dir: folder of the Trainer's checkpoints, one per epoch.
        processes: data-parallel processes.
        use_cpu: train on the CPU.
        bf16: mixed precision.
        resume_from: one of the Trainer's checkpoints.
        callbacks: callbacks of the Trainer.
        say: prints a line.
    """

    trainer_dir: Path
    processes: int = 1
    use_cpu: bool = True
    bf16: bool = False
    resume_from: Path | None = None
    callbacks: Sequence[TrainerCallback] = ()
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class FitResult:
    """What `fit` returns.

    Attributes:
        metrics: metrics of the kept epoch, on `Split.evaluated`.
        epochs: one entry per epoch: step, epoch and its metrics as eval_NAME.
        steps_log: one entry per `logging_steps` optimizer steps: loss, learning rate, gradient norm and the metrics of
            the decisions on the training batches since the previous entry.
        best_step, kept_step: last step of the epoch with the best macro-F1, and of the one whose weights are kept.
        steps: optimizer steps.
        seconds: time of the optimisation, in this process.
    """

    metrics: dict[str, float]
    epochs: list[dict[str, Any]]
    steps_log: list[dict[str, Any]]
    best_step: int
    kept_step: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class PromptCollator:
    """Batches for `FullModelRouters`."""

    examples: Sequence[Example]
    pad_token_id: int

    def __call__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        batch = [self.examples[i] for i in indices]
        paths = torch.tensor([e.path for e in batch])
        return pad_ids([e.token_ids for e in batch], self.pad_token_id) | {"paths": paths, "labels": paths.clone()}


class RoutingObjective:
    """The Trainer's loss; counts the decisions on training batches for the log."""

    def __init__(self, config: RouterTrainingConfig, alpha: torch.Tensor):
        self._config = config
        self._alpha = alpha
        self._matrix: torch.Tensor | None = None  # [3, 3]
        self._questions = 0

    def __call__(
        self, outputs: dict, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Mean loss over the decisions of the effective batch; logits [B, L, 3], labels [B, L]."""
        logits = outputs["logits"]
        losses = routing_loss(logits, labels, self._config.loss, self._alpha, self._config.gamma)
        if logits.requires_grad:
            matrix = confusion_matrix(logits.detach().argmax(-1), labels)
            self._matrix = matrix if self._matrix is None else self._matrix + matrix
            self._questions += len(labels)
        # Divided by the decisions of the effective batch, the gradient is that of its mean regardless of how the batch
        # is split into micro batches and processes.
        return losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)

    def take_counts(self, device: torch.device) -> torch.Tensor:
        """int64 [10]: the confusion matrix and the number of questions since the last call."""
        matrix = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.long) if self._matrix is None else self._matrix
        counts = torch.cat([matrix.reshape(-1).to(device), torch.tensor([self._questions], device=device)])
        self._matrix, self._questions = None, 0
        return counts


class RouterTrainer(Trainer):
    """The stock Trainer, which stops at a NaN loss, logs routing metrics and says one sentence about a full disk."""

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}; lower --learning_rate (now "
                f"{self.args.learning_rate:g}) or raise --warmup_steps (now {self.args.warmup_steps:g})"
            )
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:  # a log of optimizer steps, written by all processes
            counts = self.accelerator.reduce(self.compute_loss_func.take_counts(self.args.device), "sum").cpu()
            if counts[-1] > 0:
                metrics = metrics_of_counts(counts[:-1].view(NUM_CLASSES, NUM_CLASSES), int(counts[-1]))
                logs = logs | {name: value for name, value in metrics.items() if not name.startswith("count_")}
                logs["routers_loss"] = logs["loss"]
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        with disk_errors(Path(self.args.output_dir), "finished epochs are kept"):
            super()._save_checkpoint(*args, **kwargs)


class _EpochLines(TrainerCallback):
    """One line per epoch."""

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


def fit(
    module: nn.Module,
    collator: Callable[[list[int]], dict[str, torch.Tensor]],
    split: Split,
    config: RouterTrainingConfig,
    settings: FitSettings,
) -> FitResult:
    """Train the routers in `module` and leave the weights of the epoch to keep (`config.keep`) in it.

    Args:
        module: maps a batch, without its labels, to {"logits": [B, L, 3]}.
        collator: turns example indices into a batch with "labels" [B, L].

    Raises:
        UserError: a NaN loss, a full disk.
    """

    def metrics_of(prediction) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        return evaluate_logits(logits, labels, config, split.alpha)

    trainer = RouterTrainer(
        model=module,
        args=_trainer_arguments(config, settings, len(split.train), isinstance(module, StackedRouters)),
        data_collator=collator,
        train_dataset=split.train,  # indices; the collator puts a batch together at once
        eval_dataset=split.evaluated,
        compute_loss_func=RoutingObjective(config, split.alpha),
        compute_metrics=metrics_of,
        callbacks=[_EpochLines(settings.say, "held-out" if split.held_out else "training"), *settings.callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(settings.resume_from) if settings.resume_from else None)
    seconds = time.perf_counter() - start
    state = trainer.state
    epochs = [entry for entry in state.log_history if "eval_macro_f1" in entry]
    kept_step = state.best_global_step if config.keep == "best" else epochs[-1]["step"]
    kept = next(entry for entry in epochs if entry["step"] == kept_step)
    metrics = {name.removeprefix("eval_"): value for name, value in kept.items() if name.startswith("eval_")}
    return FitResult(
        metrics={name: value for name, value in metrics.items() if name not in _NOT_METRICS},
        epochs=epochs,
        steps_log=[entry for entry in state.log_history if "loss" in entry],
        best_step=state.best_global_step,
        kept_step=kept_step,
        steps=state.global_step,
        seconds=seconds,
    )


def evaluate_logits(
    logits: torch.Tensor, labels: torch.Tensor, config: RouterTrainingConfig, alpha: torch.Tensor
) -> dict[str, float]:
    """`routing_metrics` of the greedy decisions for logits [N, L, 3], and routers_loss, the mean training loss."""
    metrics = routing_metrics(logits.argmax(-1), labels)
    metrics["routers_loss"] = routing_loss(logits, labels, config.loss, alpha, config.gamma).mean().item()
    return metrics


def _trainer_arguments(
    config: RouterTrainingConfig, settings: FitSettings, num_train: int, is_stored: bool
) -> TrainingArguments:
    micro = config.micro_batch(settings.processes)
    accumulation = config.gradient_accumulation // (micro * settings.processes)
    steps = math.ceil(math.ceil(num_train / (micro * settings.processes)) / accumulation) * config.num_epochs
    if config.warmup_steps > steps:
        peak = config.learning_rate * steps / config.warmup_steps
        settings.say(
            f"warning: the warm-up of {config.warmup_steps} steps is longer than the run of {steps} steps, so the "
            f"learning rate only reaches {peak:.2g} of {config.learning_rate:.2g}; pass a smaller --warmup_steps"
        )
    arguments = TrainingArguments(
        output_dir=str(settings.trainer_dir),
        run_name=config.run_name,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=64 if is_stored else config.feature_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        bf16=settings.bf16,
        use_cpu=settings.use_cpu,
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=config.keep == "best",
        metric_for_best_model="macro_f1",
        greater_is_better=True,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and not is_stored,  # stored features may be on the GPU
        disable_tqdm=True,
        report_to=config.report_to,
    )
    # With several GPUs and one process the Trainer would multiply the batch by them; the routers need only one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
