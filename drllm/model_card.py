"""The model card (README.md) of a folder of routers, and of a whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drllm.schema import COUNT, NUMBER, OBJECT, TEXT, Schema, check_fields
from train_models._releases import NEWEST, OLDEST

SHOWN_METRICS = (
    "macro_f1",
    "f1_skip",
    "f1_execute",
    "f1_repeat",
    "acc_skip",
    "acc_repeat",
    "avg_layers",
    "routers_loss",
)
# What the card reads in a training record.
RECORD: Schema = {
    "metrics": OBJECT,
    "config": OBJECT,
    "questions_per_set": OBJECT,
    "train_examples": COUNT,
    "held_out_examples": COUNT,
}
SETTINGS: Schema = {"loss": TEXT} | dict.fromkeys(
    ("num_epochs", "gradient_accumulation", "learning_rate", "weight_decay", "seed"), NUMBER
)

ENGINES = (
    "vLLM, TGI and llama.cpp do not know routed checkpoints. Use `generate` of transformers on padded batches, or "
    "lm-eval's `hf`."
)


def model_card(description: dict[str, Any], training: dict[str, Any] | None, is_whole: bool = False) -> str:
    """The README.md of a folder of routers, or of a checkpoint.

    Args:
        description: router_config.json, see `drllm.saving.save_routers`.
        training: the training record (training.json), for a table of settings and metrics; None without one.
        is_whole: whether the folder is a checkpoint, which holds the base weights and the code, too.
    """
    base = description["base_model_name"] or "unknown"
    revision = f" at revision `{description['base_model_revision']}`" if description["base_model_revision"] else ""
    is_hub_name = not Path(base).exists() and base.count("/") <= 1 and base != "unknown"
    on_hub = f"base_model: {base}\nbase_model_relation: adapter\n" if is_hub_name else ""
    name, shape = Path(base).name, description["routers"]
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
{on_hub}tags:
- dr-llm
- dynamic-depth
- layer-routing
---

# {f"{name} with Dr.LLM routers" if is_whole else f"Dr.LLM routers for {name}"}

Routers of [Dr.LLM](https://arxiv.org/abs/2510.12773) for `{base}`{revision}: one MLP per block that reads the prompt \
and decides whether to skip, execute or repeat the block. The base model's weights are not \
changed{"" if is_whole else " and not included"}.

| | |
| --- | --- |
| base model | `{base}`{revision} |
| base weights (fingerprint) | `{description["base_model_fingerprint"]}` |
| blocks, hidden size | {description["num_hidden_layers"]}, {description["hidden_size"]} |
| routers | {description["num_hidden_layers"]}, of {shape["router_depth"]} linear layers, width \
{shape["router_width"]}, {shape["num_windows"]} windows, reading {_reads(shape["router_input"])} |
| parameters | {description["parameters"]:,} in {description["dtype"]} |

{_training_section(training) if training else ""}## Use

{_USE_OF_THE_CHECKPOINT if is_whole else _USE_OF_THE_ROUTERS.format(base=base)}
"""


_TESTED = f"with transformers {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
_USE_OF_THE_CHECKPOINT = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
```

This folder carries its code, which is tested {_TESTED}. The subfolder `routers` holds the routers alone.

{ENGINES}"""
_USE_OF_THE_ROUTERS = f"""\
From a checkout of the Dr.LLM reproduction that made this folder:

```python
from drllm.checkpoints import join_routers

model = join_routers("path/to/this/folder", base="{{base}}")
```

or, to write a checkpoint that `AutoModelForCausalLM` and lm-eval load with `trust_remote_code=True`:

```
python -m drllm.router_checkpoint join path/to/this/folder --output_dir checkpoints/joined
```

That checkpoint carries its code, which is tested {_TESTED}.

{ENGINES}

Any other base model is refused: routers only work with the hidden states they were trained on."""


def _reads(router_input: str) -> str:
    return "the embeddings" if router_input == "embeddings" else "the output of the previous block"


def _training_section(training: dict) -> str:
    config = training["config"]
    sets = ", ".join(f"{name} {count}" for name, count in sorted(training["questions_per_set"].items()))
    held_out = f"{training['held_out_examples']} held-out paths" if training["held_out_examples"] else "training paths"
    metrics = "\n".join(f"| {name} | {training['metrics'][name]:.4g} |" for name in SHOWN_METRICS)
    return f"""\
## Training

Labels: {training["train_examples"]} paths to train on ({sets} questions, held-out ones included). \
Loss {config["loss"]}, {config["num_epochs"]} epochs, effective batch {config["gradient_accumulation"]}, \
AdamW at {config["learning_rate"]:g} with weight decay {config["weight_decay"]:g}, seed {config["seed"]}.

| metric on {held_out} | value |
| --- | --- |
{metrics}

"""


def check_record(training: dict[str, Any], path: Path, fix: str) -> None:
    """Raises UserError when a training record, read from `path`, lacks what the card needs."""
    check_fields(training, RECORD, path, fix)
    check_fields(training["metrics"], dict.fromkeys(SHOWN_METRICS, NUMBER), f"{path}, metrics", fix)
    check_fields(training["config"], SETTINGS, f"{path}, config", fix)
