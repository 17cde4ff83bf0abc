"""Step 2: labels -> routed checkpoint.

    python train.py --data data/ --run_name drllm

Trains one router per block on the paths that data_generation.py found and writes checkpoints/{run_name}/, which
`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` and lm-eval load.
"""

from __future__ import annotations

from drllm.errors import main_guard, require_packages

require_packages("torch", "transformers", "accelerate")

from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from drllm.arguments import HelpFormatter
from drllm.training.config import RouterTrainingConfig
from drllm.training.trainer import quiet_libraries, train_routers


def _switch(value: str) -> bool:
    """on and off, beside the spellings of true and false."""
    return string_to_bool({"on": "true", "off": "false"}.get(str(value).lower(), value))


def parser() -> HfArgumentParser:
    """The arguments: the fields of `RouterTrainingConfig`."""
    arguments = HfArgumentParser(
        RouterTrainingConfig, description=__doc__.split("\n")[0], formatter_class=HelpFormatter
    )
    arguments.register("type", string_to_bool, _switch)
    return arguments


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and train."""
    config = RouterTrainingConfig(**vars(parser().parse_args(argv)))
    quiet_libraries()
    train_routers(config)
    PartialState().destroy_process_group()  # does nothing for a single process


if __name__ == "__main__":
    raise SystemExit(main())
