"""LoRA and prompt tuning on a routed model; run by test_peft.py in a Python that sees PEFT.

usage: python adapter.py PLAIN_CHECKPOINT FOLDER
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model

from train_models import RoutedLlamaForCausalLM, retrofit
from train_models.cache import CACHE_NAME

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])
MODULES = ["q_proj", "v_proj"]


def refusal(action) -> str:
    """The message of the exception that `action` ends with."""
    try:
        action()
    except (OSError, ValueError) as error:
        return str(error)
    raise SystemExit("it was not refused")


def main() -> None:
    base, folder = sys.argv[1], Path(sys.argv[2])
    # An adapter on a model that no folder holds cannot be loaded without its routers.
    fresh = retrofit(base, dtype=torch.float32)
    get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM", target_modules=MODULES)).save_pretrained(folder / "lost")
    message = refusal(lambda: AutoPeftModelForCausalLM.from_pretrained(folder / "lost"))
    assert "unsaved routed model on" in message, message
    # PEFT does not know the family.
    assert "target_modules" in refusal(lambda: get_peft_model(fresh, LoraConfig(task_type="CAUSAL_LM")))

    model = retrofit(base, dtype=torch.float32)
    with torch.no_grad():
        for number, router in enumerate(model.model.routers):
            router.layers[-1].bias[number % 3] = 100.0  # skip, execute, repeat, skip, ...
    model.save_pretrained(folder / "routed")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=MODULES))
    before = adapted(TOKENS).logits
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    expected = adapted(TOKENS)
    assert expected.paths.unique().tolist() == [0, 1, 2]
    assert not torch.allclose(before, expected.logits), "the adapter learned nothing"
    adapted.save_pretrained(folder / "adapter")

    loaded = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", trust_remote_code=True).eval()
    assert type(loaded.base_model.model).__name__ == "RoutedLlamaForCausalLM"
    actual = loaded(TOKENS)
    assert torch.equal(actual.paths, expected.paths)
    torch.testing.assert_close(actual.logits, expected.logits)

    everywhere = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    for options, wraps_routers in (({}, True), ({"exclude_modules": r".*routers.*"}, False)):
        wrapped = get_peft_model(
            RoutedLlamaForCausalLM.from_pretrained(folder / "routed"), LoraConfig(**everywhere, **options)
        )
        assert any("routers" in name for name, _ in wrapped.named_parameters() if "lora" in name) == wraps_routers
    check_prompt_tuning(RoutedLlamaForCausalLM.from_pretrained(folder / "routed"))
    print("done")


def check_prompt_tuning(model) -> None:
    """`generate` gives the tokens of one forward pass per token along the path of the first."""
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    path = tuned(TOKENS).paths
    indices = [block for block, visits in enumerate(path[0].tolist()) for _ in range(visits)]
    expected = TOKENS
    for _ in range(4):
        logits = tuned(expected, attention_mask=torch.ones_like(expected), layer_indices=indices).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
    # Under transformers 5.24 this PEFT looks for the cache under its older name, with stock models, too.
    for use_cache in (False,) if CACHE_NAME == "cache" else (False, True):
        arguments = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
        assert torch.equal(tuned.generate(input_ids=TOKENS, **arguments), expected), use_cache


if __name__ == "__main__":
    main()
