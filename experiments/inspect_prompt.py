"""Shows what a routed model does with one prompt: the answer, each router's decision and probabilities, and the layers.

python -m experiments.inspect_prompt checkpoints/drllm "Question: ..."
echo "Question: ..." | python -m experiments.inspect_prompt checkpoints/drllm
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from drllm.arguments import A_GPU, add_shared, check_device, check_ranges
from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.evaluation.protocol import uses_chat_template
from drllm.questions.prompts import adds_special_tokens, apply_template

ACTIONS = ("skip", "execute", "repeat")


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: Any, text: str, max_new_tokens: int, add_special_tokens: bool) -> dict:
    """The model's greedy response to one prompt.

    Returns:
        A dict with the response, the path (L actions), the probabilities [L][3] of the pure routers, and, summed over
        all forward passes, blocks and passes.

    Raises:
        UserError: the prompt has no tokens.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt").to(model.device)
    tokens, mask = encoded["input_ids"], encoded["attention_mask"]
    if tokens.shape[1] == 0:
        raise UserError("the prompt is empty")
    output = model(input_ids=tokens, attention_mask=mask, output_router_logits=True, use_cache=False, logits_to_keep=1)
    generated = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return {
        "response": tokenizer.decode(generated[0, tokens.shape[1] :], skip_special_tokens=True),
        "path": output.paths[0].tolist(),
        "probabilities": output.router_logits[0].softmax(-1).tolist(),
        "blocks": int(model.block_applications[0]),
        "passes": generated.shape[1] - tokens.shape[1],
    }


def report(routed: dict, base: dict) -> str:
    """The text that the command prints, for two results of `answer`."""
    lines = ["block  decision  skip   execute  repeat"]
    for block, (action, (skip, execute, repeat)) in enumerate(
        zip(routed["path"], routed["probabilities"], strict=True)
    ):
        mark = " " if action == 1 else "*"
        lines.append(f"{block:5d} {mark}{ACTIONS[action]:<8}  {skip:5.3f}  {execute:7.3f}  {repeat:6.3f}")
    blocks = len(routed["path"])
    for name, result in (("base", base), ("routed", routed)):
        lines.append(
            f"{name + ':':8s}{result['response'].strip()!r}   {sum(result['path'])} of {blocks} layers per pass, "
            f"{result['blocks']} in {result['passes']} passes"
        )
    change = 100 * (sum(routed["path"]) / blocks - 1)
    lines.append(f"layers per pass against base: {change:+.1f}%")
    return "\n".join(lines)


@main_guard
def main(argv: list[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.inspect_prompt", description="Shows what a routed model does with one prompt."
    )
    add = parser.add_argument
    add("checkpoint", help="a routed checkpoint of train.py")
    add("prompt", nargs="?", help="the question (default: standard input)")
    add("--max_new_tokens", type=int, default=15, help="tokens of the response (default: %(default)s)")
    add("--routing_control", type=float, help="the knob p in [-1, 1]; default: the checkpoint's")
    add(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        help="whether the prompt is a user's turn; default: as with the checkpoint's labels",
    )
    add_shared(parser, "dtype", "auto", "that of the checkpoint")
    add_shared(parser, "device", says=A_GPU)
    arguments = parser.parse_args(argv)
    check_ranges(arguments, max_new_tokens=(1, math.inf), routing_control=(-1, 1))
    check_device(arguments.device)
    model = load_routed_checkpoint(arguments.checkpoint, arguments.dtype, arguments.device)
    tokenizer = load_tokenizer(arguments.checkpoint)
    chat = arguments.chat_template
    if chat is None:
        chat = uses_chat_template("auto", Path(arguments.checkpoint))
    prompt = sys.stdin.read().rstrip("\n") if arguments.prompt is None else arguments.prompt.replace("\\n", "\n")
    text = apply_template(prompt, tokenizer, chat)
    if arguments.routing_control is not None:
        model.model.routing_control = arguments.routing_control
    special = adds_special_tokens(text, tokenizer)
    routed = answer(model, tokenizer, text, arguments.max_new_tokens, special)
    model.model.is_static_routing = True
    base = answer(model, tokenizer, text, arguments.max_new_tokens, special)
    print(report(routed, base))


if __name__ == "__main__":
    raise SystemExit(main())
