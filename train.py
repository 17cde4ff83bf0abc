"""Step 2: labels -> routed checkpoint.

    python train.py --data data/ --run_name drllm

Trains one router a block on the paths that data_generation.py found and writes checkpoints/{run_name}/, which
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` and lm-eval load.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from accelerate import PartialState

from drllm.errors import main_guard
from drllm.training.losses import LOSSES
from drllm.training.trainer import RouterTrainingConfig, quiet_libraries, train_routers


def parser() -> argparse.ArgumentParser:
    """The arguments; defaults are those of `RouterTrainingConfig`, which are the published ones."""
    default = {field.name: field.default for field in fields(RouterTrainingConfig)}
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(group, name: str, text: str, **kwargs) -> None:
        if "action" not in kwargs:
            text += "" if default[name] is None else " (default: %(default)s)"
        group.add_argument(f"--{name}", default=default[name], help=text, **kwargs)

    def on_off(value: str) -> bool:
        if value not in ("on", "off"):
            raise argparse.ArgumentTypeError(f"{value!r} is neither on nor off")
        return value == "on"

    g = p.add_argument_group("data")
    g.add_argument("--data", nargs="+", default=["data"], help="folders of labels (default: data)")
    add(g, "with_squad", "use labels of squadv2 too", action="store_true")
    add(g, "with_commonsense", "use labels of commonsense too", action="store_true")
    add(g, "paths", "train on the best path of a question or on all good ones", choices=("best", "all"))
    add(g, "eval_fraction", "share of the questions held out to choose the best epoch", type=float)

    g = p.add_argument_group("model")
    add(g, "model_id", "base model, folder or Hub name (default: the one the labels name)")
    add(g, "dtype", "dtype of the base model (default: the labels'; another one is refused)")
    add(g, "num_windows", "pooling windows a prompt, 1..32", type=int)
    add(g, "router_width", "width of a router", type=int)
    add(g, "router_depth", "linear layers of a router", type=int)
    add(g, "router_input", "what routers read", choices=("previous_layer", "embeddings"))
    add(g, "bias_init", "routers' output bias at the start", choices=("zero", "frequency"))

    g = p.add_argument_group("training")
    add(g, "run_name", "the checkpoint goes to {output_dir}/{run_name}")
    add(g, "output_dir", "folder of checkpoints")
    add(g, "num_epochs", "passes over the labels", type=int)
    add(g, "learning_rate", "peak, after the warm-up", type=float)
    add(g, "weight_decay", "AdamW's, on weights and not on biases", type=float)
    add(g, "warmup_steps", "linear warm-up; then cosine to 0", type=int)
    add(g, "gradient_accumulation", "effective batch: examples an optimiser step, over all processes", type=int)
    add(
        g,
        "micro_batch_size",
        "examples a forward pass and process; doesn't change the result (default: the effective batch from stored "
        "features, 1 with the full model)",
        type=int,
    )
    add(g, "loss", "training loss", choices=LOSSES)
    add(g, "gamma", "focusing exponent of the focal loss", type=float)
    add(g, "beta", "of the effective number of samples, in the class weights", type=float)
    add(
        g,
        "teacher_forcing",
        "off: hidden states follow the routers' own decisions, and the full model runs at every step (slow) "
        "(default: on)",
        type=on_off,
        metavar="on|off",
        action="store",
    )
    add(
        g,
        "stored_features",
        "off: run the full model at every step instead of once (slow, same result) (default: on)",
        type=on_off,
        metavar="on|off",
        action="store",
    )
    add(g, "features_dir", "where router inputs are stored (default: {data}/features)")
    add(g, "feature_batch_size", "prompts a forward pass of the full model", type=int)
    add(
        g,
        "bf16",
        "train the routers in bf16 mixed precision (default: when the labels are in bfloat16)",
        action=argparse.BooleanOptionalAction,
    )
    add(g, "seed", "of the routers' weights, the held-out split and the order of the data", type=int)
    add(g, "report_to", "where the Trainer logs", choices=("none", "wandb", "tensorboard"))
    add(g, "overwrite", "train again although {run_name} exists", action="store_true")
    return p


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and train."""
    args = vars(parser().parse_args(argv))
    quiet_libraries()
    train_routers(RouterTrainingConfig(**args | {"data": tuple(args["data"])}))
    PartialState().destroy_process_group()  # a no-op for a single process


if __name__ == "__main__":
    raise SystemExit(main())
