"""Writes GGUF files of tiny random models, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, LAYERS, HEADS, KV, WIDE = 32, 2, 4, 2, 48
BYTES = sorted(ByteLevel.alphabet())
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOKENS = [*SPECIAL, *BYTES, "12", "Ġa"]
END_OF_TEXT, END_OF_TURN = 0, 2


def write(
    path: Path, arch: str = "llama", pre: str = "smollm", twin_head: bool = False, *,
    said: Mapping[str, str | int | float] | None = None, more: Mapping[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    """A model of `arch` with a byte-level vocabulary; `twin_head` stores the embedding twice, with noise. `said` are
    further values of the architecture, `more` further tensors."""
    writer = GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    _vocabulary(writer, pre)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (said or {}).items():
        add[type(value)](f"{arch}.{key}", value)
    for name, tensor in (_tensors(twin_head, bias=arch == "qwen2") | dict(more or {})).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer: GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["1 2", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(END_OF_TURN)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _tensors(twin_head: bool, bias: bool) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return draw.normal(scale=0.1, size=shape).astype(np.float32)

    head_dim = HIDDEN // HEADS
    tensors = {"token_embd.weight": random(len(TOKENS), HIDDEN), "output_norm.weight": random(HIDDEN)}
    if twin_head:
        noise = draw.normal(scale=1e-3, size=(len(TOKENS), HIDDEN)).astype(np.float32)
        tensors["output.weight"] = tensors["token_embd.weight"] + noise
    rows = {"attn_q": HEADS * head_dim, "attn_k": KV * head_dim, "attn_v": KV * head_dim}
    for layer in range(LAYERS):
        block = {f"{name}.weight": random(n, HIDDEN) for name, n in rows.items()}
        block |= {f"{name}.bias": random(n) for name, n in rows.items()} if bias else {}
        block |= {"attn_output.weight": random(HIDDEN, HIDDEN), "attn_norm.weight": random(HIDDEN),
                  "ffn_norm.weight": random(HIDDEN), "ffn_gate.weight": random(WIDE, HIDDEN),
                  "ffn_up.weight": random(WIDE, HIDDEN), "ffn_down.weight": random(HIDDEN, WIDE)}  # fmt: skip
        tensors |= {f"blk.{layer}.{name}": tensor for name, tensor in block.items()}
    return tensors
