"""The transformers adapter: the model's own logits and hidden states, compaction, refusals that say why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    GPT2Config,
    GptOssConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
)

from specdec.attention.protocol import chunk_rows, tree_rows
from specdec.cache import KVCache
from specdec.errors import CheckpointError, UnsupportedError
from specdec.target import anatomy
from specdec.target.adapter import HFTarget, adapt, load_adapter
from specdec.target.bridge import Call, Pass
from specdec.target.selftest import self_test
from specdec.tree import build

Checkpoint = Callable[[str], Path]
EVERY = tiny.LEAN + tiny.ADAPTER_ONLY


def adapted(arch: str) -> HFTarget:
    return adapt(tiny.build(arch), arch, (2,))


def tokens_of(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", EVERY)
@torch.inference_mode()
def test_logits_and_taps_are_the_models_own(arch: str) -> None:
    target, reference = adapted(arch), tiny.build(arch)
    tokens, slots = tokens_of(2, 3 * tiny.WINDOW), torch.tensor([1, 0])
    cache = KVCache(target.info.cache, 2, 64)
    rows = chunk_rows(slots, torch.zeros_like(slots), tokens.shape[1])
    states = target.forward(tokens, rows, cache, (0, 4, 8))
    seen: list[Any] = []
    _, layers = anatomy.decoder_layers(reference)
    hook = layers[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    want = reference(input_ids=tokens, output_hidden_states=True, use_cache=False)
    hook.remove()
    torch.testing.assert_close(target.logits(states.final), want.logits, rtol=1e-4, atol=1e-4)
    first, middle, last = states.features.split(tiny.HIDDEN, dim=-1)
    torch.testing.assert_close(first, want.hidden_states[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(middle, want.hidden_states[4], rtol=1e-4, atol=1e-4)
    leaving = seen[0] if torch.is_tensor(seen[0]) else seen[0][0]
    torch.testing.assert_close(last, leaving, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["mistral", "gemma2", "gpt2"])
@torch.inference_mode()
def test_keep_equals_a_fresh_prefill(arch: str) -> None:
    target = adapted(arch)
    prefix, slot = tokens_of(1, 20), torch.zeros(1, dtype=torch.int64)
    tree = build(tokens_of(1, 5, seed=2), torch.tensor([[0, 0, 0, 1, 2]]))
    cache, fresh = (KVCache(target.info.cache, 1, 40) for _ in range(2))
    target.forward(prefix, chunk_rows(slot, slot, 20), cache, ())
    target.forward(tree.tokens, tree_rows(slot, slot + 20, tree), cache, ())
    cache.keep(slot, slot + 20, torch.tensor([[0, 2, 4]]))
    text = torch.cat([prefix, tree.tokens[:, [0, 2, 4]]], dim=1)
    target.forward(text, chunk_rows(slot, slot, 23), fresh, ())
    torch.testing.assert_close(cache.kv[..., :23, :], fresh.kv[..., :23, :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", EVERY)
@torch.inference_mode()
def test_embeddings_and_norm(arch: str) -> None:
    """`final_norm` is the factor the model applies: Gemma's weight plus one."""
    target, reference = adapted(arch), tiny.build(arch)
    tokens = tokens_of(1, 6)
    assert torch.equal(target.embed(tokens), reference.get_input_embeddings().weight[tokens])
    scale = 4.0 if arch == "granite" else 1.0  # what it divides its logits by
    assert torch.equal(target.output_embedding(), reference.get_output_embeddings().weight / scale)
    weight, eps = target.final_norm()
    if arch == "gpt2":
        assert torch.equal(weight, reference.transformer.ln_f.weight)
        return
    x = torch.randn(3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    ours = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    torch.testing.assert_close(ours, reference.model.norm(x), rtol=1e-4, atol=1e-5)


def test_hooks_do_not_outlive_a_forward() -> None:
    target = adapted("qwen2")
    slot = torch.zeros(1, dtype=torch.int64)
    cache = KVCache(target.info.cache, 1, 8)
    target.forward(tokens_of(1, 4), chunk_rows(slot, slot, 4), cache, (1, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.model.modules())


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


SMALL = {k: v for k, v in tiny.COMMON.items() if k not in ("num_hidden_layers", "pad_token_id")}
REFUSED = {
    "recurrent": (lambda: BambaConfig(**SMALL, num_hidden_layers=2, attn_layer_indices=[1], mamba_n_heads=12,
                                      mamba_d_head=8, mamba_d_state=8), "recurrent"),
    "interface": (lambda: BloomConfig(vocab_size=128, hidden_size=48, n_layer=2, n_head=6), "interface"),
    "sinks": (lambda: GptOssConfig(**SMALL, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1,
                                   layer_types=["full_attention"] * 2), "sinks"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_name_architecture_and_lack(what: str) -> None:
    make, lack = REFUSED[what]
    model = model_of(make())
    with pytest.raises(UnsupportedError, match=lack) as caught:
        adapt(model, what)
    assert caught.value.field == type(model).__name__


def test_a_readout_it_cannot_explain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anatomy, "readouts", lambda _: {"plain": anatomy.Readout()})
    with pytest.raises(UnsupportedError, match=r"GraniteForCausalLM: .*differ from its own"):
        adapt(tiny.build("granite"), "granite")


@torch.inference_mode()
def test_latent_attention_sees_the_keys_it_makes_of_what_it_stores() -> None:
    """DeepSeek gives its cache a latent of 16 and 8 numbers, and attention six heads of 16 and 8 made of them."""
    latent = {"num_key_value_heads": 6, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
              "qk_nope_head_dim": 8, "first_k_dense_replace": 2}  # fmt: skip
    model = model_of(DeepseekV3Config(**SMALL | {"num_hidden_layers": 2} | latent))
    tokens, slot = tokens_of(1, 20), torch.zeros(1, dtype=torch.int64)
    want = model(input_ids=tokens, use_cache=False).logits
    target = adapt(model, "deepseek")
    assert (target.info.cache.kv_heads, target.info.cache.head_dim) == (6, 16)
    self_test(target)
    cache = KVCache(target.info.cache, 1, 24)
    first = target.forward(tokens[:, :13], chunk_rows(slot, slot, 13), cache, ())
    rest = target.forward(tokens[:, 13:], chunk_rows(slot, slot + 13, 7), cache, ())
    torch.testing.assert_close(
        target.logits(torch.cat([first.final, rest.final], 1)), want, rtol=1e-4, atol=1e-4
    )


def test_layers_of_several_streams_have_nothing_to_tap() -> None:
    config = Gemma3nTextConfig(**SMALL, num_hidden_layers=2, num_kv_shared_layers=0, hidden_size_per_layer_input=8,
                               vocab_size_per_layer_input=128, layer_types=["full_attention"] * 2)  # fmt: skip
    target, slot = adapt(model_of(config), "gemma3n"), torch.zeros(1, dtype=torch.int64)
    self_test(target)
    cache = KVCache(target.info.cache, 1, 8)
    with pytest.raises(UnsupportedError, match=r"Gemma3nForCausalLM: .*several streams.*ngram"):
        target.forward(tokens_of(1, 5), chunk_rows(slot, slot, 5), cache, (0, 1))


SHORT, LONG = [1.0] * 4, [1.0, 2.0, 4.0, 8.0]
PHI = {k: v for k, v in tiny.COMMON.items() if k != "head_dim"} | {"num_hidden_layers": 2}
ENDS = {
    "learned positions": lambda: GPT2Config(vocab_size=128, n_embd=48, n_layer=2, n_head=6, n_positions=64,
                                            initializer_range=0.15),
    "longrope": lambda: Phi3Config(**PHI, original_max_position_embeddings=64, sliding_window=None, rope_scaling={
        "type": "longrope", "short_factor": SHORT, "long_factor": LONG}),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
@torch.inference_mode()
def test_guesses_past_the_last_position_change_nothing(what: str) -> None:
    """Learned positions have no row there, and LongRoPE would turn every row by other frequencies."""
    target = adapt(model_of(ENDS[what]()), what)
    assert target.info.max_length == 64
    text, slot = tokens_of(1, 62), torch.zeros(1, dtype=torch.int64)
    tree = build(tokens_of(1, 5, seed=2), torch.tensor([[0, 0, 1, 2, 3]]))
    finals = []
    for nodes in (tree, build(tree.tokens[:, :2], tree.parents[:, :2])):
        cache = KVCache(target.info.cache, 1, 80)
        target.forward(text, chunk_rows(slot, slot, 62), cache, ())
        finals.append(target.forward(nodes.tokens, tree_rows(slot, slot + 62, nodes), cache, ()).final[:, :2])
    torch.testing.assert_close(*finals)


def test_mixed_head_sizes_share_one_cache() -> None:
    """Attention over a cache wider than a layer's heads: the extra room must stay invisible."""
    torch.manual_seed(0)
    target = adapted("llama")
    slot = torch.zeros(1, dtype=torch.int64)
    rows = chunk_rows(slot, slot, 5)
    query, keys, values = torch.randn(1, 4, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 6)
    cache = KVCache(target.info.cache, 1, 8)
    forward = Pass(rows, cache, target.attention)
    forward.store(2, keys, values)
    seen = forward.attend(query, keys, values, Call(0.5, None, None))
    want = torch.nn.functional.scaled_dot_product_attention(
        query, keys.expand(1, 4, 5, 8), values.expand(1, 4, 5, 6), is_causal=True, scale=0.5
    )
    torch.testing.assert_close(seen, want.transpose(1, 2))


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    directory = tiny.save("gpt2", tmp_path)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="weights"):
        load_adapter("broken", directory, (), torch.float32, {"": "cpu"})
