"""One look at a prompt: the answer, what each router decided and how sure it was, and the layers used.

python -m drllm.look checkpoints/drllm "Question: ..."
echo "Question: ..." | python -m drllm.look checkpoints/drllm
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from drllm.checkpoints import load_routed_checkpoint, load_tokenizer
from drllm.errors import UserError, main_guard
from drllm.evaluation.comparison import uses_chat_template
from drllm.questions.prompts import adds_special_tokens, apply_template

ACTIONS = ("skip", "execute", "repeat")


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: Any, text: str, max_new_tokens: int, add_special_tokens: bool) -> dict:
    """What the model makes of one prompt.

    Returns a dict with: response, path (L actions), probabilities [L][3] of the pure routers, and, summed over all
    forward passes, blocks and passes.
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
    """The text that the command prints."""
    lines = ["block  decision  skip   execute  repeat"]
    for block, (action, (skip, execute, repeat)) in enumerate(
        zip(routed["path"], routed["probabilities"], strict=True)
    ):
        mark = " " if action == 1 else "*"
        lines.append(f"{block:5d} {mark}{ACTIONS[action]:<8}  {skip:5.3f}  {execute:7.3f}  {repeat:6.3f}")
    blocks = len(routed["path"])
    for name, found in (("base", base), ("routed", routed)):
        lines.append(
            f"{name + ':':8s}{found['response'].strip()!r}   {sum(found['path'])} of {blocks} layers a pass, "
            f"{found['blocks']} in {found['passes']} passes"
        )
    change = 100 * (sum(routed["path"]) / blocks - 1)
    lines.append(f"layers a pass against base: {change:+.1f}%")
    return "\n".join(lines)


@main_guard
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m drllm.look", description="What a routed model does with a prompt.")
    parser.add_argument("checkpoint", help="a routed checkpoint of train.py")
    parser.add_argument("prompt", nargs="?", help="default: standard input")
    parser.add_argument("--max_new_tokens", type=int, default=15)
    parser.add_argument("--routing_control", type=float, help="the knob p in [-1, 1]; default: the checkpoint's")
    parser.add_argument(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        help="the prompt is a user's turn; default: as with the checkpoint's labels",
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device")
    args = parser.parse_args()
    prompt = sys.stdin.read().rstrip("\n") if args.prompt is None else args.prompt.replace("\\n", "\n")
    model = load_routed_checkpoint(args.checkpoint, args.dtype, args.device)
    tokenizer = load_tokenizer(args.checkpoint)
    chat = args.chat_template
    if chat is None:
        chat = uses_chat_template("auto", Path(args.checkpoint))
    text = apply_template(prompt, tokenizer, chat)
    try:
        if args.routing_control is not None:
            model.model.routing_control = args.routing_control
    except ValueError as error:
        raise UserError(f"--{error}") from None
    special = adds_special_tokens(text, tokenizer)
    routed = answer(model, tokenizer, text, args.max_new_tokens, special)
    model.model.is_static_routing = True
    base = answer(model, tokenizer, text, args.max_new_tokens, special)
    print(report(routed, base))


if __name__ == "__main__":
    raise SystemExit(main())
