"""Loads a checkpoint with plain transformers and, where it has a tokenizer, with lm-eval's `hf`; prints what they say.

usage: decode.py CHECKPOINT  (run by test_releases.py under several releases of transformers)
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

NUM_TOKENS = 61


def decoded(checkpoint: str) -> dict:
    """Paths, logits and tokens of random prompts, one of them left-padded, in each kind of decoding."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    input_ids = torch.randint(2, NUM_TOKENS, (3, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    mask[1, :7] = 0
    output = model(input_ids, attention_mask=mask)
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    kinds = {
        "cache": {},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
        "beams": {"num_beams": 3},
        "given paths": {"layer_indices": [[0, 1, 1, 3], [0, 2, 3, 5, 5], [1, 2, 3, 4, 5]]},
    }
    tokens = {kind: model.generate(input_ids, **case, **arguments).tolist() for kind, case in kinds.items()}
    graphs = sys.modules[type(model).__module__.rpartition(".")[0] + ".graphs"]  # the checkpoint's own code
    model.model.graphs = graphs.DecodingGraphs(model.model, capture=lambda function: function)
    for kind in ("cache", "static cache", "given paths"):
        assert model.generate(input_ids, **kinds[kind], **arguments).tolist() == tokens[kind], f"graphs, {kind}"
    model.decode_with_graphs(False)
    repeated = input_ids[:1].repeat(1, 2)  # so that the lookup finds something
    lookup = {
        "attention_mask": torch.ones_like(repeated),
        "prompt_lookup_num_tokens": 2,
        "eos_token_id": NUM_TOKENS - 1,
    }
    tokens["prompt lookup"] = model.generate(repeated, **arguments | lookup).tolist()
    return {"paths": output.paths.tolist(), "logits": output.logits[:, -1].tolist(), "tokens": tokens}


def evaluated(checkpoint: str) -> dict:
    """lm-eval's own `hf` on the checkpoint: log-likelihoods and greedy answers."""
    import lm_eval.models  # noqa: F401, the import registers `hf`
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    settings = {"pretrained": checkpoint, "trust_remote_code": True, "device": "cpu", "dtype": "float32"}
    model = get_model("hf")(**settings, batch_size=2)
    choices = [("Question: 3 + 4 =", " 7"), ("Question: 3 + 4 =", " 8"), ("Answer:", " 12")]
    scores = model.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in choices])
    until = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["Question: 3 + 4 =", "Question: which of these is red?"]
    answers = model.generate_until([Instance("generate_until", {}, (prompt, until), 0) for prompt in prompts])
    return {"scores": [score for score, _ in scores], "answers": answers}


def main() -> None:
    torch.set_num_threads(1)  # as in the tests, for the same sums
    checkpoint = sys.argv[1]
    report = {"transformers": transformers.__version__, **decoded(checkpoint)}
    if (Path(checkpoint) / "tokenizer.json").exists():
        report |= evaluated(checkpoint)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
