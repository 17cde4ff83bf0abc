"""The settings of a training run: the fields of `RouterTrainingConfig` are the arguments of train.py."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from drllm.arguments import MAX_SEED
from drllm.errors import UserError
from drllm.files import check_output_folder
from drllm.provenance import parse_dtype
from drllm.training.losses import scaled_beta

MAX_WINDOWS = 32


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _argument(default: Any, text: str, **options: Any) -> Any:
    """A field with its help text; `options` are further options of argparse."""
    return field(default=default, metadata={"help": text, **options})


@dataclass(frozen=True)
class RouterTrainingConfig:
    """Everything that a training run depends on; the defaults are the paper's (Section 3.2).

    `gradient_accumulation` is the effective batch size: examples per optimizer step, over all processes. The published
    training reaches it in micro batches of one example. From stored features a whole step fits into one batch, which
    is the same mathematics. (With several processes the Trainer fills up the last batch of an epoch, when it is short,
    with repeated examples.)
    """

    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "folders of labels, or .jsonl files of labels without a manifest (default: data/mcts_paths or data)"
        },
    )
    model_id: str | None = _argument(
        None, "base model, a folder or a name on the Hub (default: the one that the labels name)"
    )
    run_name: str = _argument("drllm", "the checkpoint is written to {output_dir}/{run_name}")
    output_dir: str = _argument("checkpoints", "folder of checkpoints")
    num_epochs: int = _argument(25, "passes over the labels; 25 in the paper, 15 in the authors' script")
    learning_rate: float = _argument(1e-3, "peak learning rate, reached at the end of the warm-up")
    weight_decay: float = _argument(0.01, "weight decay of AdamW, on weights and not on biases")
    warmup_steps: int = _argument(500, "steps of linear warm-up, followed by a cosine schedule to 0")
    gradient_accumulation: int = _argument(16, "effective batch size: examples per optimizer step, over all processes")
    micro_batch_size: int | None = _argument(
        None,
        "examples per forward pass and process; does not change the result (default: the effective batch size with "
        "stored features, 1 with the full model)",
    )
    num_windows: int = _argument(8, f"pooling windows per prompt, 1 to {MAX_WINDOWS}")
    with_squad: bool = _argument(False, "use labels of squadv2 too")
    with_commonsense: bool = _argument(False, "use labels of commonsense too")
    paths: Literal["best", "all"] = _argument("best", "train on the best path of each question, or on all good ones")
    loss: Literal["focal", "weighted_ce", "ce"] = _argument("focal", "training loss")
    gamma: float = _argument(2.0, "focusing exponent of the focal loss")
    beta: str = _argument(
        "auto",
        "effective number of samples of the class weights: a number from 0 to 1, or auto, which gives few labels the "
        "class weights that 0.999 gives the paper's 126,812 decisions",
    )
    router_width: int = _argument(128, "hidden width of a router")
    router_depth: int = _argument(2, "linear layers of a router")
    bias_init: Literal["zero", "frequency"] = _argument("zero", "initial output bias of the routers")
    router_input: Literal["previous_layer", "embeddings"] = _argument("previous_layer", "what routers read")
    teacher_forcing: bool = _argument(
        True, "off: hidden states follow the routers' own decisions, and the full model runs at every step (slow)"
    )
    stored_features: bool = _argument(True, "off: run the full model at every step instead of once (slow, same result)")
    features_dir: str | None = _argument(None, "folder for the stored router inputs (default: {data}/features)")
    feature_batch_size: int = _argument(16, "prompts per forward pass of the full model")
    dtype: str | None = _argument(
        None,
        "dtype of the base model (default: that of the labels, any other is refused; without a manifest that of the "
        "base model)",
    )
    bf16: bool | None = _argument(
        None,
        "train the routers in bf16 mixed precision (default: on when the labels are in bfloat16)",
        nargs="?",
        const=True,
    )
    eval_fraction: float = _argument(0.1, "share of the questions held out for evaluation; 0 trains on all of them")
    keep: Literal["best", "last"] = _argument(
        "last", "routers to keep: those of the last epoch, or those of the epoch with the best held-out macro-F1"
    )
    seed: int = _argument(0, "seed for the routers' weights, the held-out split and the order of the data")
    logging_steps: int = _argument(1, "optimizer steps per log entry")
    report_to: Literal["none", "wandb", "tensorboard"] = _argument("none", "where the Trainer logs")
    overwrite: bool = _argument(False, "train again even if {run_name} exists")

    def __post_init__(self) -> None:
        # One spelling per number, so that equal runs have equal records.
        with contextlib.suppress(ValueError):
            object.__setattr__(self, "beta", str(float(self.beta)))

    def beta_at(self, decisions: float) -> float:
        """Beta of the class weights for so many decisions (labels times blocks) in the training split."""
        return scaled_beta(decisions) if self.beta == "auto" else float(self.beta)

    @property
    def checkpoint(self) -> Path:
        """Where the routed checkpoint is written."""
        return Path(self.output_dir) / self.run_name

    @property
    def uses_features(self) -> bool:
        """Whether the routers train on stored router inputs instead of running the full model at every step."""
        return self.teacher_forcing and self.stored_features

    @property
    def features_folder(self) -> Path:
        """Where router inputs are stored; needs `data`."""
        if self.features_dir is not None:
            return Path(self.features_dir)
        source = Path(self.data[0])
        return (source.parent if source.is_file() else source) / "features"

    @property
    def router_fields(self) -> dict[str, Any]:
        """The fields of the routers' configuration."""
        return {name: getattr(self, name) for name in ("num_windows", "router_width", "router_depth", "router_input")}

    def micro_batch(self, processes: int) -> int:
        """Examples per forward pass and process."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        return max(self.gradient_accumulation // processes, 1) if self.uses_features else 1

    def check(self, processes: int = 1) -> None:
        """Checks every value and where output goes, before anything is loaded.

        Raises:
            UserError: a value that is not allowed; the message names the argument.
        """
        self._check_choices()
        self._check_ranges()
        if self.dtype is not None:
            parse_dtype(self.dtype)
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise UserError(f"--report_to {self.report_to}: not installed; pip install {self.report_to}")
        micro = self.micro_batch(processes)
        if self.gradient_accumulation % (micro * processes):
            raise UserError(
                f"--gradient_accumulation {self.gradient_accumulation} (examples per optimizer step) is not a multiple "
                f"of --micro_batch_size {micro} times {processes} processes"
            )
        check_output_folder(self.checkpoint, "--output_dir")
        if self.uses_features and self.features_dir is not None:
            check_output_folder(self.features_dir, "--features_dir")

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            if get_origin(hints[item.name]) is Literal and getattr(self, item.name) not in get_args(hints[item.name]):
                choices = ", ".join(get_args(hints[item.name]))
                raise UserError(f"--{item.name} is {getattr(self, item.name)!r}; choose one of {choices}")

    def _check_ranges(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{item.name} is {value}; it must be a finite number")
        positive = (
            "num_epochs",
            "learning_rate",
            "gradient_accumulation",
            "micro_batch_size",
            "router_width",
            "router_depth",
            "feature_batch_size",
            "logging_steps",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value}; it must be greater than 0")
        for name in ("weight_decay", "warmup_steps", "gamma"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} is {getattr(self, name)}; it must not be negative")
        ranges = {"num_windows": (1, MAX_WINDOWS), "seed": (0, MAX_SEED)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie in {low}..{high}")
        if self.beta != "auto" and not _is_share(self.beta):
            raise UserError(f"--beta is {self.beta}; it must be auto or lie in [0, 1]")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"--eval_fraction is {self.eval_fraction}; it must lie in [0, 1)")
        if not self.run_name.strip():
            raise UserError("--run_name is empty; pass the name of a folder")
