"""Training of all routers together: from labels to a routed checkpoint (Section 3.2 of the paper).

The frozen model runs once over the questions (`drllm.training.features`); after that a training step is a handful of
batched matrix products, regardless of the depth of the model. With `teacher_forcing` or `stored_features` off the full
model runs at every step instead: slow, kept for comparison and as a reference.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback
from transformers.utils import logging

from drllm.checkpoints import load_config, load_routed, load_tokenizer
from drllm.errors import UserError
from drllm.files import check_output_folder, write_json, write_whole
from drllm.labels import Example
from drllm.manifests import Manifest, checkpoint_record
from drllm.processes import process_state
from drllm.provenance import commit, dtype_name, fingerprint, parse_dtype, versions
from drllm.questions.prompts import wants_chat_template
from drllm.saving import save_checkpoint
from drllm.training.config import RouterTrainingConfig
from drllm.training.data import TrainingLabels, default_folder, load_labels, make_examples
from drllm.training.features import FeatureStore, compute_features
from drllm.training.fitting import FitResult, FitSettings, PromptCollator, Split, evaluate_logits, fit
from drllm.training.losses import paper_alpha
from drllm.training.resuming import RECORD, finished_run, locked, prepare_folder, run_identity
from drllm.training.router_modules import FullModelRouters, StackedRouters, init_final_biases

__all__ = ["RouterTrainingConfig", "evaluate_routers", "quiet_libraries", "train_routers"]

STEPS_LOG = "training_log.jsonl"
DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BaseModel:
    """The model that the labels belong to, before its weights are loaded."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    tokenizer: Any
    dtype: torch.dtype
    chat_template: bool


def train_routers(config: RouterTrainingConfig, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train routers on labels and write the routed checkpoint to `config.checkpoint`.

    The folder gets the full checkpoint (base weights bit-identical to the source's, routers, tokenizer), the routers
    on their own (routers/), labels_manifest.json, training_log.jsonl (one line per `logging_steps` optimizer steps)
    and, last of all, training.json. A run that was killed is resumed from its last epoch; a finished one is not
    repeated.

    Returns:
        The training record, as in training.json. Its `history` has the metrics after each epoch.

    Raises:
        UserError: bad arguments or labels, labels of another model, a folder that holds another run, a NaN loss.
    """
    # A process that is done with its share of the features waits for the others, for hours if necessary.
    state = process_state(datetime.timedelta(days=1))
    say = print if state.is_main_process else _silence
    config.check(state.num_processes)
    if not config.data:
        config = dataclasses.replace(config, data=[default_folder()])
        say(f"labels: reading {config.data[0]}")
    if config.uses_features:
        check_output_folder(config.features_folder, "--features_dir")
    labels = load_labels(config.data, config.with_squad, config.with_commonsense, say)
    base = _base_of(config, labels, say)
    examples = make_examples(labels, base.tokenizer, config.paths, base.chat_template)
    _check_examples(examples, base.config, config)
    identity = run_identity(config, labels, examples, dtype_name(base.dtype), state.num_processes)
    if (record := finished_run(config, identity, say)) is not None:
        return record
    trainer_dir = config.checkpoint / "trainer"
    with locked(trainer_dir, state):
        resume_from = prepare_folder(config, identity, trainer_dir, state, say)
        settings = FitSettings(
            trainer_dir,
            processes=state.num_processes,
            use_cpu=state.device.type == "cpu",
            bf16=base.dtype == torch.bfloat16 if config.bf16 is None else config.bf16,
            resume_from=resume_from,
            callbacks=callbacks,
            say=say,
        )
        record = _train(config, labels, base, examples, identity, settings, state)
        state.wait_for_everyone()
    return record


def _train(
    config: RouterTrainingConfig,
    labels: TrainingLabels,
    base: BaseModel,
    examples: list[Example],
    identity: dict[str, Any],
    settings: FitSettings,
    state: PartialState,
) -> dict[str, Any]:
    """Load the model, compute the features, optimise, write the checkpoint; returns the record."""
    start = time.perf_counter()
    say = settings.say
    routed = _load_base(config, labels, base)
    split = Split.of(examples, config)
    _say_data(say, examples, split, config)
    _init_routers(routed, config, split)
    pad_token_id = base.tokenizer.pad_token_id or 0
    store = None
    routed.to(state.device)
    if config.uses_features:
        store = compute_features(
            routed,
            examples,
            config.features_folder,
            pad_token_id=pad_token_id,
            batch_size=config.feature_batch_size,
            state=state,
            say=say,
        )
        routed.to("cpu")
        near = store.on(state.device) if store.fits(state.device) else store
        module, collator = StackedRouters(routed.model.routers), near.batch
        del near
    else:
        say("training: the full model runs at every step (no stored features)")
        module = FullModelRouters(routed, config.teacher_forcing)
        collator = PromptCollator(examples, pad_token_id)

    result = fit(module, collator, split, config, settings)
    metrics = result.metrics
    if store is not None:
        module.to("cpu").copy_to(routed.model.routers)
    routed.to("cpu")
    routed.model.routers.to(base.dtype)
    if store is not None:
        metrics = evaluate_routers(routed.model.routers, store, split.evaluated, config, split.alpha)
    passes = dataclasses.asdict(store.statistics if store else module.statistics)
    # Unmap the features before the checkpoint is written; the Trainer's cycles would keep them.
    del store, module, collator
    gc.collect()
    record = _record(config, base, examples, split, result) | {
        "metrics": metrics,
        "base_model_passes": passes,
        "base_model": {
            "name": base.name,
            "revision": base.revision,
            "fingerprint": routed.config.base_model_fingerprint,
            "dtype": dtype_name(base.dtype),
        },
        "identity": identity,
        "seconds": time.perf_counter() - start,
    }
    record["config"]["bf16"] = settings.bf16
    if state.is_main_process:
        _export(routed, base, config, labels, record, result.steps_log)
        say(
            f"wrote {config.checkpoint} after {record['seconds'] / 60:.1f} min: "
            + ", ".join(f"{n} {metrics[n]:.3f}" for n in ("macro_f1", "f1_skip", "f1_execute", "f1_repeat"))
            + f", avg_layers {metrics['avg_layers']:.2f} of {labels.num_layers} on {record['metrics_on']}"
        )
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


def quiet_libraries() -> None:
    """For programs: turns off transformers' progress bars and notices."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _silence(message: str) -> None:
    """Replaces `print` on all processes but the first."""


def _base_of(config: RouterTrainingConfig, labels: TrainingLabels, say: Callable[[str], None]) -> BaseModel:
    """The base model of the labels; refuses a dtype other than theirs."""
    made_with = labels.manifest
    if made_with is None:
        return _assumed_base(config, say)
    if config.dtype is not None and dtype_name(config.dtype) != dtype_name(made_with.dtype):
        raise UserError(
            f"--dtype {dtype_name(config.dtype)} differs from that of the labels, {made_with.dtype}: in another dtype "
            "the model answers other questions right; omit --dtype, or make the labels again with it"
        )
    name, revision = made_with.model, made_with.revision
    if config.model_id is not None and config.model_id != made_with.model:
        name, revision = config.model_id, None
    tokenizer = load_tokenizer(name, revision)
    base_config = load_config(name, revision)
    return BaseModel(name, revision, base_config, tokenizer, parse_dtype(made_with.dtype), made_with.chat_template)


def _assumed_base(config: RouterTrainingConfig, say: Callable[[str], None]) -> BaseModel:
    """The base model of labels without a manifest; prints what is assumed about them."""
    if config.model_id is None:
        raise UserError(
            f"the labels in {' '.join(config.data)} have no manifest.json, which would say what model they were made "
            "with; name it with --model_id"
        )
    tokenizer = load_tokenizer(config.model_id)
    base_config = load_config(config.model_id)
    stored = str(getattr(base_config, "dtype", None)).removeprefix("torch.")
    dtype = parse_dtype(config.dtype or (stored if stored in DTYPE_NAMES else "float32"))
    chat_template, _ = wants_chat_template("auto", config.model_id, tokenizer, base_config.eos_token_id)
    say(
        f"labels: no manifest.json; assumed: they were made with {config.model_id} in {dtype_name(dtype)}, and a "
        "question is the whole prompt, " + ("as the user's turn of the chat template" if chat_template else "as it is")
    )
    return BaseModel(config.model_id, None, base_config, tokenizer, dtype, chat_template)


def _check_examples(examples: Sequence[Example], base_config, config: RouterTrainingConfig) -> None:
    layers = base_config.num_hidden_layers
    max_tokens = getattr(base_config, "max_position_embeddings", None)
    for example in examples:
        if len(example.path) != layers:
            raise UserError(
                f"the labels in {' '.join(config.data)} were made with another model: question {example.question} has "
                f"a path over {len(example.path)} layers, the model has {layers}"
            )
        if max_tokens is not None and len(example.token_ids) > max_tokens:
            raise UserError(
                f"question {example.question}: its prompt has {len(example.token_ids)} tokens, the model takes "
                f"{max_tokens}; remove it from the labels"
            )


def _load_base(config: RouterTrainingConfig, labels: TrainingLabels, base: BaseModel):
    """The base model with new routers, frozen; refuses a model other than that of the labels."""
    routed = load_routed(base.name, base.dtype, base.revision, config.router_fields)
    model_fingerprint = fingerprint(routed)
    if labels.manifest is not None and model_fingerprint != labels.manifest.model_fingerprint:
        raise UserError(
            f"the labels in {' '.join(config.data)} were made with another model: their weights have the fingerprint "
            f"{labels.manifest.model_fingerprint}, those of {base.name} {model_fingerprint}; pass the model they were "
            "made with (--model_id), or make the labels again"
        )
    routed.config.base_model_name, routed.config.base_model_revision = base.name, base.revision
    routed.config.base_model_fingerprint = model_fingerprint
    routed.config.trained_num_windows = config.num_windows
    return routed.eval()


def _init_routers(routed, config: RouterTrainingConfig, split: Split) -> None:
    routed.model.routers.float()  # the dtype of training; the checkpoint gets them in the model's
    routed.model.init_routers(config.seed)
    if config.bias_init == "frequency":
        init_final_biases(routed.model.routers, split.counts)


def _say_data(say, examples: Sequence[Example], split: Split, config: RouterTrainingConfig) -> None:
    questions = len({e.question for e in examples})
    shares = split.counts / split.counts.sum()
    say(
        f"labels: {len(examples)} paths of {questions} questions, {len(split.train)} to train on, "
        f"{len(split.held_out)} held out; skip {shares[0]:.1%}, execute {shares[1]:.1%}, repeat {shares[2]:.1%}"
    )
    say(
        f"class weights: skip {split.alpha[0]:.3f}, execute {split.alpha[1]:.3f}, repeat {split.alpha[2]:.3f} at beta "
        f"{split.beta:.6g} ({config.beta}); the paper's: {', '.join(f'{weight:.3f}' for weight in paper_alpha())}"
    )
    if not split.held_out:
        best = " and the best epoch" if config.keep == "best" else ""
        say(f"warning: no question is held out, so metrics{best} are those of the training questions")


def _record(
    config: RouterTrainingConfig, base: BaseModel, examples: Sequence[Example], split: Split, result: FitResult
) -> dict[str, Any]:
    questions = {e.question for e in examples}
    return {
        "config": dataclasses.asdict(config) | {"model_id": base.name},
        "metrics_on": "held-out questions" if split.held_out else "training questions",
        "train_examples": len(split.train),
        "held_out_examples": len(split.held_out),
        "questions_per_set": dict(Counter(question.split("/")[0] for question in questions)),
        "class_counts": split.counts.long().tolist(),
        "beta": split.beta,
        "alpha": split.alpha.tolist(),
        "paper_alpha": paper_alpha(),
        "best_step": result.best_step,
        "kept_step": result.kept_step,
        "steps": result.steps,
        "seconds_training": result.seconds,
        "versions": versions(),
        "commit": commit(),
        "history": result.epochs,
    }


def _export(
    routed, base: BaseModel, config: RouterTrainingConfig, labels: TrainingLabels, record: dict, steps_log: list[dict]
) -> None:
    manifests = labels.manifests or [
        Manifest(
            model=base.name,
            revision=base.revision,
            model_fingerprint=routed.config.base_model_fingerprint,
            num_layers=labels.num_layers,
            dtype=dtype_name(base.dtype),
            chat_template=base.chat_template,
            arguments={"budget": 2.0},
            labels=len(labels.labels),
            results={"assumed": "the labels came without a manifest"},
        )
    ]
    save_checkpoint(routed, base.tokenizer, config.checkpoint, checkpoint_record(manifests), record)
    write_whole(config.checkpoint / STEPS_LOG, "".join(json.dumps(entry) + "\n" for entry in steps_log))
    write_json(config.checkpoint / RECORD, record)
