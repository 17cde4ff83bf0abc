"""Pre-trains a base model of the miniature on the CPU, with one thread per process; interrupted runs are resumed."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
import transformers
from torch.nn.functional import cross_entropy

from drllm.errors import UserError
from drllm.files import write_state
from miniature.base_model import (
    answer_positions,
    build_model,
    build_tokenizer,
    copies_of,
    encode,
    hidden_along_paths,
    keep_memory,
    shape_numbers,
    with_doubled_blocks,
    write_model,
)
from miniature.measurement import accuracy
from miniature.muon import Muon, learning_rate_at
from miniature.questions import KINDS, LABELS, SETS, Question, draw, questions
from miniature.training_paths import KnownPaths, RandomEdits

# Share of the pre-training questions per set, before normalisation; equal for the kinds of a set.
WEIGHT = {"arc_easy": 1.4, "arc_challenge": 1.6, "dart-1": 0.8, "dart-2": 1.0, "dart-3": 1.0, "dart-4": 1.2,
          "dart-5": 1.2}  # fmt: skip


@dataclass(frozen=True)
class PretrainingSettings:
    """What one run of `train` does.

    Attributes:
        output_dir: folder of the model; the checkpoint of an unfinished run is `output_dir`.checkpoint.
        paths: which path each question follows.
        family: "llama", "qwen2" or "qwen3"; ignored with `init`.
        blocks: L; ignored with `init`.
        width: hidden size; ignored with `init`.
        init: folder of a model of the miniature whose weights are the start; None starts from random ones.
        doubled: blocks of `init` that the model has twice in a row; only these copies are trained, the rest is frozen.
        steps: optimiser steps.
        batch_size: questions per step, over all processes.
        learning_rate: peak, of both optimisers.
        processes: number of processes, of one thread each; changes the result, since each draws questions of its own.
        muon_dtype: dtype of Muon's orthogonalisation.
        save_steps: steps between checkpoints.
        seed: seed of weights, questions and paths.
    """

    output_dir: Path
    paths: RandomEdits | KnownPaths
    family: str = "llama"
    blocks: int = 10
    width: int = 128
    init: Path | None = None
    doubled: tuple[int, ...] = ()
    steps: int = 3000
    batch_size: int = 128
    learning_rate: float = 3e-3
    processes: int = 2
    muon_dtype: str = "bfloat16"
    save_steps: int = 250
    seed: int = 0

    @property
    def checkpoint(self) -> Path:
        """The file with the state of the run."""
        return self.output_dir.with_name(self.output_dir.name + ".checkpoint")

    def identity(self) -> dict[str, Any]:
        """Everything that decides the weights; a checkpoint with another identity is not resumed."""
        fields = asdict(self)
        del fields["output_dir"], fields["save_steps"], fields["paths"]
        fields["doubled"] = list(self.doubled)
        return {**fields, "init": None if self.init is None else str(self.init), **self.paths.identity()}


def fewer_options(rng: random.Random, question: Question) -> Question:
    """The question without one or two of its wrong options, where this does not change the right one."""
    if question.kind == "second largest":
        return question
    right = LABELS.index(question.answer)
    kept = sorted([right, *rng.sample([i for i in range(4) if i != right], rng.choice((1, 2)))])
    choices = tuple(question.choices[i] for i in kept)
    return replace(question, choices=choices, answer=LABELS[kept.index(right)])


def batches(
    seed: int, start: int, steps: int, size: int, rank: int = 0
) -> Iterator[tuple[list[Question], random.Random]]:
    """Pre-training batches `start` to `steps`; each depends on seed, step and rank alone, so a run can be resumed."""
    pairs = [(s, k) for s in SETS for k in KINDS[s]]
    weights = [WEIGHT[s] / len(KINDS[s]) for s, _ in pairs]
    for step in range(start, steps):
        rng = random.Random(f"{seed}/pretrain/{step}/{rank}")
        # Choosing among options is learned late, and sooner between two than among four.
        fewer = 0.6 if step < 0.4 * steps else 0.0
        batch = [draw(rng, s, k, "pretrain") for s, k in rng.choices(pairs, weights, k=size)]
        yield [fewer_options(rng, q) if q.choices and rng.random() < fewer else q for q in batch], rng


def train(settings: PretrainingSettings) -> None:
    """Pre-trains the base model and writes it to `settings.output_dir`; resumes from the checkpoint if there is one.

    Runs `settings.processes` processes of one thread each, each on its share of the batch: on two cores twice as fast
    as one process with two threads, because the operations at this width are too small to be split.
    """
    saved_state(settings)  # a damaged or foreign checkpoint is refused before processes are started
    with tempfile.NamedTemporaryFile() as meeting_point:
        os.unlink(meeting_point.name)
        try:
            torch.multiprocessing.spawn(_train_process, (meeting_point.name, settings), nprocs=settings.processes)
        except torch.multiprocessing.ProcessExitedException as error:  # it has said why
            raise UserError(f"a training process ended ({error}); run the same command to resume") from None
        finally:
            Path(meeting_point.name).touch()


def saved_state(settings: PretrainingSettings) -> dict[str, Any] | None:
    """The state of the run that `settings.checkpoint` holds, None without one.

    Raises:
        UserError: the file is damaged, or belongs to a run with other arguments.
    """
    path = settings.checkpoint
    if not path.exists():
        return None
    fix = "remove it, or pass another --output_dir"
    try:
        saved = torch.load(path, weights_only=True)
        identity = saved["identity"]
    except Exception as error:  # torch.load raises whatever it stumbles over
        raise UserError(f"{path} is not a checkpoint of this program ({type(error).__name__}); {fix}") from None
    if identity != settings.identity():
        raise UserError(f"{path} belongs to a run with other arguments ({identity}); {fix}")
    return saved


class _Pretraining:
    """The state of one process: model, optimisers and the step reached."""

    def __init__(self, settings: PretrainingSettings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.tokenizer = build_tokenizer()
        if settings.init is None:
            self.model = build_model(settings.family, len(self.tokenizer), self.tokenizer.pad_token_id,
                                     self.tokenizer.eos_token_id, settings.blocks, settings.width)  # fmt: skip
            shape_numbers(self.model, self.tokenizer)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(settings.init, dtype=torch.float32)
            self.model = with_doubled_blocks(model, settings.doubled) if settings.doubled else model
        if settings.doubled:
            self.model.requires_grad_(False)
            for block in copies_of(settings.doubled):
                self.model.model.layers[block].requires_grad_(True)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        named = [("layers" in name and p.ndim == 2, p) for name, p in trained]
        self.muon = Muon([p for is_matrix, p in named if is_matrix], dtype=getattr(torch, settings.muon_dtype))
        rest = [p for is_matrix, p in named if not is_matrix]
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        self.start, self.seconds = 0, 0.0
        if (saved := saved_state(settings)) is not None:
            self._resume(saved)

    def _resume(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.adamw.load_state_dict(saved["adamw"])
        self.muon.buffers = saved["muon"]
        self.start, self.seconds = saved["step"], saved["seconds"]

    def step(self, step: int, batch: list[Question], rng: random.Random) -> float:
        """One optimiser step; returns the loss. SystemExit when it is NaN or infinite."""
        settings, tokenizer = self.settings, self.tokenizer
        ids, prompt_lengths = encode(batch, tokenizer)
        paths = torch.tensor([settings.paths.path(rng, question, step / settings.steps) for question in batch])
        hidden = hidden_along_paths(self.model, ids[:, :-1], paths)
        wanted = answer_positions(ids, prompt_lengths, tokenizer.pad_token_id)
        loss = cross_entropy(self.model.lm_head(hidden[wanted]), ids[:, 1:][wanted])
        loss.backward()
        # A block that no path of the batch visits has no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradient = torch.cat([g.view(-1) for g in gradients])
        torch.distributed.all_reduce(gradient)
        # The mean over processes, clipped at norm 1.
        gradient *= min(1.0, settings.processes / gradient.norm().item()) / settings.processes
        for p, g in zip(self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = g.view_as(p)
        rate = learning_rate_at(step, settings.steps, settings.learning_rate)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.muon.step(rate)
        self.model.zero_grad()
        if not math.isfinite(loss.item()):
            raise SystemExit(f"error: the loss is {loss.item()} at step {step}; use a lower --learning_rate.")
        return loss.item()

    def save(self, step: int, seconds: float) -> None:
        """Writes checkpoint and model."""
        state = {"identity": self.settings.identity(), "step": step, "seconds": seconds,
                 "model": self.model.state_dict(), "adamw": self.adamw.state_dict(),
                 "muon": self.muon.buffers}  # fmt: skip
        write_state(self.settings.checkpoint, state)
        write_model(self.model, self.tokenizer, self.settings.output_dir)


def _train_process(rank: int, meeting_point: str, settings: PretrainingSettings) -> None:
    """One process of `train`; the processes draw different questions and paths and average their gradients."""
    processes = settings.processes
    torch.distributed.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=processes)
    keep_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    run = _Pretraining(settings)
    if rank == 0:
        size = sum(p.numel() for p in run.parameters)
        print(f"{size:,} parameters, {len(run.model.model.layers)} blocks, from step {run.start}", flush=True)
    begun, losses = time.time(), []
    stream = batches(settings.seed, run.start, settings.steps, settings.batch_size // processes, rank)
    for step, (batch, rng) in enumerate(stream, run.start):
        if not torch.multiprocessing.parent_process().is_alive():  # no orphan goes on training after a kill
            raise SystemExit("error: the parent process is gone.")
        losses.append(run.step(step, batch, rng))
        done = step + 1
        if rank or (done % 50 and done < settings.steps):
            continue
        elapsed = time.time() - begun
        left = elapsed / (done - run.start) * (settings.steps - done)
        print(f"step {done}/{settings.steps}  loss {sum(losses) / len(losses):.4f}  {elapsed / 60:.1f} min, "
              f"left {left / 60:.1f} min", flush=True)  # fmt: skip
        losses.clear()
        if done % settings.save_steps == 0 or done == settings.steps:
            run.save(done, run.seconds + elapsed)
            by_set = {s: questions(s, "train", 60, settings.seed) for s in SETS}
            scores = accuracy(run.model, run.tokenizer, by_set)
            print(
                "  on 60 search questions per set: " + "  ".join(f"{s} {v:.0%}" for s, v in scores.items()), flush=True
            )
    if rank == 0:
        print(f"{settings.output_dir}: {(run.seconds + time.time() - begun) / 60:.0f} minutes of training")
