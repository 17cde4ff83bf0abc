"""Work whose shapes change runs without cuDNN's attention, and leaves torch's settings as they were."""

import pytest
import torch

from drllm.attention import kernels_without_plans
from drllm.checkpoints import load_routed, load_tokenizer
from drllm.labels import Example
from drllm.questions.sets import load_questions
from drllm.rollouts.engine import Request
from drllm.rollouts.rewards import reward_named
from drllm.rollouts.routed_paths import routed_paths, router_windows
from tests import search_toys

cuda = torch.backends.cuda


def test_only_cudnn_is_off_and_only_within():
    with kernels_without_plans():
        assert not cuda.cudnn_sdp_enabled()
        assert cuda.flash_sdp_enabled()
        assert cuda.mem_efficient_sdp_enabled()
        assert cuda.math_sdp_enabled()
    assert cuda.cudnn_sdp_enabled()
    cuda.enable_flash_sdp(False)
    try:
        with pytest.raises(ZeroDivisionError), kernels_without_plans():
            raise ZeroDivisionError
        assert not cuda.flash_sdp_enabled(), "what the process had chosen"
    finally:
        cuda.enable_flash_sdp(True)


@pytest.mark.parametrize("name", ["generation", "likelihood", "paths", "windows"])
def test_the_engines_and_the_pass_that_pools_windows_choose_it(name, tmp_path, stock_model, monkeypatch):
    base = search_toys.make_model(tmp_path / "model", stock_model)
    data = search_toys.make_data(tmp_path / "data", 4, seed=5)
    model, tokenizer = load_routed(str(base), torch.float32, None, {}).eval(), load_tokenizer(str(base))
    seen = []
    block = model.model.layers[0]
    block.register_forward_pre_hook(lambda *_: seen.append(cuda.cudnn_sdp_enabled()))
    reward = reward_named("likelihood" if name == "likelihood" else "generation")
    prompts = [reward.prompt_of(question, tokenizer) for question in load_questions("arc_easy", "train", data)]
    if name == "paths":
        routed_paths(model, prompts)
    elif name == "windows":
        router_windows(model, [Example(p.question.id, p.input_ids, (1,) * 6) for p in prompts], 2)
    else:
        reward.engine(model, tokenizer, 4).score([Request(prompt, (1,) * 6) for prompt in prompts])
    assert seen, "a block has run"
    assert not any(seen)
    assert cuda.cudnn_sdp_enabled()
