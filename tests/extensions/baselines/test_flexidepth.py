"""FlexiDepth on toys whose right gates are known, and its forward pass against the plain model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from drllm.provenance import fingerprint
from drllm.questions.likelihood import LikelihoodPrompt
from drllm.questions.prompts import Prompt
from drllm.questions.sets import Question
from drllm.rollouts.engine import Request, RolloutEngine
from drllm.rollouts.likelihood import LikelihoodEngine
from extensions.baselines.flexidepth import FlexiDepth, GatedModel, TokenGates
from extensions.baselines.gated_blocks import GateTraining
from extensions.baselines.interface import Answered
from tests import search_toys
from tests.baseline_toys import NO_PROGRESS, toy_bench
from train_models import retrofit


def gates_of(routed, logit: float | None = None, every_block: bool = False) -> TokenGates:
    """Gates with random routers, or all at `logit`; adapters that change hidden states."""
    torch.manual_seed(0)
    gates = TokenGates(routed.config, 0 if every_block else routed.config.num_hidden_layers // 2)
    for module in gates.modules_of_blocks:
        nn.init.normal_(module.down_proj.weight)
        nn.init.zeros_(module.router[-1].bias)
        nn.init.normal_(module.router[-1].weight, std=3)
        if logit is not None:
            nn.init.zeros_(module.router[-1].weight)
            nn.init.constant_(module.router[-1].bias, logit)
    return gates


def fitted(routed, gates):
    baseline = FlexiDepth(every_block=gates.first == 0)
    return GatedModel(routed, baseline.trained_gates(routed, gates.state_dict()))


def likelihood_prompts(count: int) -> list[LikelihoodPrompt]:
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for number in range(count):
        context = tuple(torch.randint(2, 61, (3 + 2 * number,), generator=generator).tolist())
        options = [tuple(torch.randint(2, 61, (1 + n,), generator=generator).tolist()) for n in range(3)]
        rows = tuple(context + option for option in options)
        question = Question("arc_easy", f"p{number}", "", ("a", "b", "c"), ("A", "B", "C"), "A")
        prompts.append(LikelihoodPrompt(question, "", context, rows, (1, 2, 3), (1, 1, 1), 0))
    return prompts


@pytest.mark.parametrize(("logit", "path"), [(40.0, (1, 1, 1, 1, 1, 1)), (-40.0, (1, 1, 1, 0, 0, 0))])
def test_open_gates_are_the_base_model_and_closed_ones_skip_the_upper_half(routed, logit, path):
    gates = gates_of(routed, logit)
    for module in gates.modules_of_blocks:
        nn.init.zeros_(module.down_proj.weight)  # adapters that change nothing
    prompts = likelihood_prompts(4)
    results = fitted(routed, gates).score(prompts, 4)
    expected = LikelihoodEngine(routed, None, 4).score([Request(prompt, path) for prompt in prompts])
    for (scores, layers), reference in zip(results, expected, strict=True):
        assert scores == pytest.approx(reference, abs=1e-3)
        assert layers == sum(path)


def test_a_row_depends_neither_on_its_batch_mates_nor_on_padding_and_tokens_differ(routed):
    prompts = likelihood_prompts(5)
    rival = fitted(routed, gates_of(routed))
    together, alone = rival.score(prompts, 5), rival.score(prompts, 1)
    for (scores, layers), (expected, expected_layers) in zip(together, alone, strict=True):
        assert scores == pytest.approx(expected, abs=1e-3)
        assert layers == pytest.approx(expected_layers)
    assert any(layers != round(layers) for _, layers in together), "tokens of one prompt take different blocks"


def test_skipped_tokens_leave_keys_and_values(routed):
    """Decoding with a cache equals one forward pass over everything, token by token."""
    gates = gates_of(routed)
    tokens = torch.randint(2, 61, (1, 12), generator=torch.Generator().manual_seed(1))
    every_block = list(range(6))
    with torch.no_grad(), gates.attached(routed):
        expected = routed(tokens, layer_indices=every_block, use_cache=False).logits
        output = routed(tokens[:, :5], layer_indices=every_block, use_cache=True)
        logits = [output.logits]
        for place in range(5, 12):
            output = routed(tokens[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits)
    assert output.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-3)


def test_generation_counts_the_tokens_of_prompt_and_response(tmp_path, stock_model):
    base = search_toys.make_model(tmp_path / "model", stock_model)
    data = search_toys.make_data(tmp_path / "data", 4)
    _, tokenizer = search_toys.load(base)
    routed = retrofit(str(base), dtype=torch.float32).eval()
    prompts = search_toys.prompts(data, tokenizer)
    engine = RolloutEngine(routed, tokenizer, 4, reuse_default_states=False)
    expected = engine.respond([Request(prompt, (1,) * 6) for prompt in prompts])
    results = fitted(routed, gates_of(routed, 40.0)).answer(prompts, tokenizer, 4)
    assert [scores for scores, _ in results] == [rollout.scores for rollout in expected]
    assert {layers for _, layers in results} == {6.0}
    assert {layers for _, layers in fitted(routed, gates_of(routed, -40.0)).answer(prompts, tokenizer, 4)} == {3.0}


def test_a_block_that_returns_its_input_is_the_one_to_be_skipped(routed_with_idle_blocks):
    routed = routed_with_idle_blocks
    generator = torch.Generator().manual_seed(0)
    questions = []
    for number in range(16):
        tokens = torch.randint(4, 61, (5,), generator=generator).tolist()
        with torch.no_grad():
            for _ in range(6):
                tokens.append(int(routed(torch.tensor([tokens]), layer_indices=list(range(6))).logits[0, -1].argmax()))
        question = Question("dart-1", f"q{number}", "", (), (), "0")
        questions.append(Answered(Prompt(question, "", tuple(tokens[:5]), 5), tuple(tokens[5:])))
    before = fingerprint(routed)
    training = GateTraining(epochs=60, batch_size=8, learning_rate=3e-3, gain=10.0)
    tensors, cost = FlexiDepth(training).fit(toy_bench(routed, questions), 1, 0, NO_PROGRESS)
    assert fingerprint(routed) == before
    gates = FlexiDepth(training).trained_gates(routed, tensors)
    with torch.no_grad(), gates.attached(routed):
        rows = [[*question.prompt.input_ids, *question.answer_ids] for question in questions]
        gates.run(routed, rows, [5] * len(rows))
        shares = [(gate >= 0.5).float().mean().item() for gate in gates._gates]
    assert shares[1] < 0.4 < 0.6 < min(shares[0], shares[2]), "only block 4 returns its input"
    parameters = 3 * ((32 * 8 + 8) + (8 + 1) + 3 * 32 * 8)
    assert cost.parameters == parameters


REPEAT, COMPUTE, FIRST_SYMBOL, SYMBOLS = 2, 3, 4, 20


def text(repeats: bool, generator: torch.Generator) -> list[int]:
    """An instruction and 15 symbols: one symbol again and again, or each computed from the two before it."""
    first, second = torch.randint(FIRST_SYMBOL, FIRST_SYMBOL + SYMBOLS, (2,), generator=generator).tolist()
    tokens = [REPEAT, first, first] if repeats else [COMPUTE, first, second]
    while len(tokens) < 16:
        tokens.append(first if repeats else FIRST_SYMBOL + (3 * tokens[-1] + 5 * tokens[-2]) % SYMBOLS)
    return tokens


def texts(count: int, seed: int) -> list[list[int]]:
    """`count` texts, the repeated ones at even indices."""
    generator = torch.Generator().manual_seed(seed)
    return [text(index % 2 == 0, generator) for index in range(count)]


@pytest.fixture(scope="module")
def base_that_repeats_and_computes(tmp_path_factory):
    """Four blocks, pre-trained on both kinds of text: one block suffices to repeat, all four are needed to compute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=FIRST_SYMBOL + SYMBOLS, num_hidden_layers=4, tie_word_embeddings=True, eos_token_id=None, **sizes
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(400):
        tokens = torch.tensor(texts(32, seed=1000 + step))
        loss = F.cross_entropy(model(tokens).logits[:, 2:-1].flatten(0, 1), tokens[:, 3:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return retrofit(str(folder), dtype=torch.float32).eval()


@pytest.mark.slow
def test_fewer_blocks_run_on_repeated_text(base_that_repeats_and_computes):
    """The paper reports fewer blocks for copying than for arithmetic."""
    routed = base_that_repeats_and_computes
    unseen = torch.tensor(texts(200, seed=2))
    for path in ([0], [0, 1]):
        with torch.no_grad():
            logits = routed(unseen, layer_indices=path, use_cache=False).logits
        right = (logits[:, 3:-1].argmax(-1) == unseen[:, 4:]).float().mean(1)
        assert right[::2].mean() > 0.95, "few blocks suffice to repeat"
        assert right[1::2].mean() < 0.7, "and not to compute"
    questions = []
    for number, tokens in enumerate(texts(200, seed=1)):
        question = Question("dart-1", f"q{number}", "", (), (), "0")
        questions.append(Answered(Prompt(question, "", tuple(tokens[:6]), 5), tuple(tokens[6:])))
    training = GateTraining(epochs=20, batch_size=16, learning_rate=3e-3, gain=5.0)
    rival = FlexiDepth(training, every_block=True)
    gates = rival.trained_gates(routed, rival.fit(toy_bench(routed, questions), 2, 0, NO_PROGRESS)[0])
    rows = unseen.tolist()
    with torch.no_grad(), gates.attached(routed):
        gates.run(routed, rows, [len(row) for row in rows])
        executed = gates.executed()[:, 3:].float().mean(1)
    repeated, computed = executed[::2], executed[1::2]
    error = (repeated.var() / len(repeated) + computed.var() / len(computed)).sqrt()
    assert repeated.mean() < computed.mean() - 3 * error
