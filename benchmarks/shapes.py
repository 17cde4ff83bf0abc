"""Shapes for random weights: two small ones, and those of the paper's backbones."""

from transformers import LlamaConfig, Qwen2Config

LLAMA_3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072}
SHAPES = {
    "small": LlamaConfig(
        num_hidden_layers=12, hidden_size=256, intermediate_size=1024, num_attention_heads=8, vocab_size=1024
    ),
    "d1024": LlamaConfig(
        num_hidden_layers=12, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, vocab_size=4096
    ),
    "d1024x28": LlamaConfig(
        num_hidden_layers=28,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": LlamaConfig(
        num_hidden_layers=28,
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        tie_word_embeddings=True,
        **LLAMA_3,
    ),
    "llama-3.1-8b": LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, **LLAMA_3
    ),
    "qwen2.5-3b": Qwen2Config(
        num_hidden_layers=36,
        hidden_size=2048,
        intermediate_size=11008,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        num_hidden_layers=28, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
    ),
}
