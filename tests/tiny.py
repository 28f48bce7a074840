"""Tiny random transformers models of the architectures we promise, with their traps switched on.

`build("mistral")` is a model in float32, evaluation mode; `save("mistral", tmp_path)` the same as a
checkpoint directory, with a tokenizer of ASCII characters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB, HIDDEN, LAYERS, WINDOW = 128, 48, 8, 16
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # large enough for logits that differ visibly
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LEAN = ("llama", "mistral", "qwen2", "qwen3")
CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
ADAPTER_ONLY = ("gemma2", "gpt2", "granite")


def config(arch: str) -> PretrainedConfig:
    """The config of one of `LEAN` and `ADAPTER_ONLY`."""
    if arch == "llama":  # tied, as SmolLM is, with Llama-3.1's rope
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
        return LlamaConfig(**COMMON, tie_word_embeddings=True, rope_parameters=rope)
    if arch == "mistral":
        return MistralConfig(**COMMON, sliding_window=WINDOW)
    if arch == "qwen2":
        return Qwen2Config(**{k: v for k, v in COMMON.items() if k != "head_dim"})
    if arch == "qwen3":
        return Qwen3Config(**COMMON)
    if arch == "gemma2":
        return Gemma2Config(**COMMON, sliding_window=WINDOW, query_pre_attn_scalar=8,
                            attn_logit_softcapping=5.0, final_logit_softcapping=3.0)  # fmt: skip
    if arch == "granite":
        return GraniteConfig(**{k: v for k, v in COMMON.items() if k != "head_dim"}, logits_scaling=4.0,
                             embedding_multiplier=3.0, residual_multiplier=0.5)  # fmt: skip
    if arch == "gpt2":
        return GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=6, n_positions=512,
                          initializer_range=0.15, bos_token_id=1, eos_token_id=2)  # fmt: skip
    raise KeyError(arch)


def build(arch: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights; biases and norm weights are random too: none can be forgotten unseen."""
    torch.manual_seed(seed)
    # eager: SDPA leaves out Gemma's soft cap in some versions of transformers
    model: PreTrainedModel = Auto.from_config(config(arch), dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def save(arch: str, directory: Path, seed: int = 0) -> Path:
    """A checkpoint directory under `directory`, with the tokenizer; returns its path."""
    path = directory / arch
    build(arch, seed).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per printable ASCII character, after <pad>, <s>, </s>, <unk>; a chat template of one line."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, "\n", *map(chr, range(32, 127))]
    words += [f"<extra{i}>" for i in range(VOCAB - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    made.chat_template = CHAT
    return made
