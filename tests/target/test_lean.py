"""The lean decoder against transformers: logits, taps, trees, compaction; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from specdec.attention.protocol import chunk_rows, tree_rows
from specdec.attention.reference import ReferenceAttention
from specdec.cache import KVCache
from specdec.errors import UnsupportedError
from specdec.layers.linear import Projection
from specdec.target.lean import LeanConfig, LeanDecoder
from specdec.target.source import Source
from specdec.target.weights import assemble, check_names
from specdec.tree import build

Checkpoint = Callable[[str], Path]
TAPS = (0, 3, 8)


def decoder_of(directory: Path, dtype: torch.dtype = torch.float32) -> LeanDecoder:
    config = LeanConfig.read(json.loads((directory / "config.json").read_text()))
    source = Source(directory)
    check_names(source.shapes, config)
    return assemble(config, source.take, ReferenceAttention(), dtype, torch.device("cpu"))


def tokens_of(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(tiny.VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", tiny.LEAN)
@torch.inference_mode()
def test_logits_and_taps_equal_transformers(arch: str, checkpoint: Checkpoint) -> None:
    decoder, reference = decoder_of(checkpoint(arch)), tiny.build(arch)
    tokens, slots = tokens_of(2, 3 * tiny.WINDOW), torch.tensor([1, 0])
    cache = KVCache(decoder.cache_shape(), 2, 64)
    rows = chunk_rows(slots, torch.zeros_like(slots), tokens.shape[1])
    states = decoder(tokens, rows, cache, TAPS)
    seen: list[torch.Tensor] = []
    hook = reference.base_model.layers[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    want = reference(input_ids=tokens, output_hidden_states=True, use_cache=False)
    hook.remove()
    torch.testing.assert_close(decoder.head(states.final), want.logits, rtol=1e-4, atol=1e-4)
    first, middle, last = states.features.split(tiny.HIDDEN, dim=-1)
    torch.testing.assert_close(first, want.hidden_states[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(middle, want.hidden_states[3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, seen[0], rtol=1e-4, atol=1e-4)  # before the final norm


@pytest.mark.parametrize("arch", tiny.LEAN)
@torch.inference_mode()
def test_chunked_prefill_equals_one_chunk(arch: str, checkpoint: Checkpoint) -> None:
    decoder = decoder_of(checkpoint(arch))
    tokens, slot = tokens_of(1, 40), torch.zeros(1, dtype=torch.int64)
    whole, parts = (KVCache(decoder.cache_shape(), 1, 48) for _ in range(2))
    want = decoder(tokens, chunk_rows(slot, slot, 40), whole, ()).final
    done, finals = 0, []
    for size in (1, 17, 22):
        chunk = tokens[:, done : done + size]
        finals.append(decoder(chunk, chunk_rows(slot, slot + done, size), parts, ()).final)
        done += size
    torch.testing.assert_close(torch.cat(finals, dim=1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", tiny.LEAN)
@torch.inference_mode()
def test_keep_equals_a_fresh_prefill(arch: str, checkpoint: Checkpoint) -> None:
    """After a tree, keeping the path 0 -> 2 -> 4 leaves the rows a prefill of that text writes."""
    decoder = decoder_of(checkpoint(arch))
    prefix, slot = tokens_of(1, 20), torch.zeros(1, dtype=torch.int64)
    tree = build(tokens_of(1, 5, seed=2), torch.tensor([[0, 0, 0, 1, 2]]))
    cache, fresh = (KVCache(decoder.cache_shape(), 1, 40) for _ in range(2))
    decoder(prefix, chunk_rows(slot, slot, 20), cache, ())
    decoder(tree.tokens, tree_rows(slot, slot + 20, tree), cache, ())
    cache.keep(slot, slot + 20, torch.tensor([[0, 2, 4]]))
    text = torch.cat([prefix, tree.tokens[:, [0, 2, 4]]], dim=1)
    decoder(text, chunk_rows(slot, slot, 23), fresh, ())
    torch.testing.assert_close(cache.kv[..., :23, :], fresh.kv[..., :23, :], rtol=1e-4, atol=1e-4)


def test_freezing_packs_every_projection(checkpoint: Checkpoint) -> None:
    decoder = decoder_of(checkpoint("llama"))
    projections = [m for m in decoder.modules() if isinstance(m, Projection)]
    assert len(projections) == 4 * tiny.LAYERS + 1
    if torch.backends.mkldnn.is_available():
        assert all(p.packed is not None and p.weight.numel() == 0 for p in projections)
    assert decoder.embedding.shape == (tiny.VOCAB, tiny.HIDDEN)  # the embedding stays readable


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_refusals_name_the_field(change: dict[str, object], named: str) -> None:
    config = tiny.config("llama").to_dict() | change
    with pytest.raises(UnsupportedError) as caught:
        LeanConfig.read(config)
    assert caught.value.field == named


def test_windows_follow_the_config() -> None:
    assert LeanConfig.read(tiny.config("mistral").to_dict()).windows == (tiny.WINDOW,) * tiny.LAYERS
    assert LeanConfig.read(tiny.config("qwen2").to_dict()).windows == (None,) * tiny.LAYERS
    upper = {k: v for k, v in tiny.config("qwen2").to_dict().items() if k != "layer_types"}
    upper |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 6}
    assert LeanConfig.read(upper).windows == (None,) * 6 + (4, 4)


UNSAID = {"mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
          "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
          "qwen3": {"head_dim": 128}}  # fmt: skip


@pytest.mark.parametrize("arch", UNSAID)
def test_what_a_config_leaves_out_is_transformers_default(arch: str) -> None:
    said = {key: value for key, value in tiny.config(arch).to_dict().items() if key not in UNSAID[arch]}
    read = LeanConfig.read(said)
    found = {"sliding_window": read.windows[0], "num_key_value_heads": read.kv_heads, "head_dim": read.head_dim,
             "max_position_embeddings": read.max_length}  # fmt: skip
    assert found.items() >= UNSAID[arch].items()


def test_a_scaling_added_beside_the_parameters_counts() -> None:
    """As model cards say, to a config that transformers 5 wrote."""
    config = tiny.config("qwen2").to_dict() | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    read = LeanConfig.read(config)
    assert read.scaling is not None and read.scaling["factor"] == 4.0


def test_a_mistral_that_names_its_layers_slides_where_it_says() -> None:
    """transformers takes it for a Ministral."""
    kinds = ["full_attention", "sliding_attention"] * (tiny.LAYERS // 2)
    read = LeanConfig.read(tiny.config("mistral").to_dict() | {"layer_types": kinds})
    assert read.windows == (None, tiny.WINDOW) * (tiny.LAYERS // 2)


def test_llama_has_no_windows_whatever_its_config_says() -> None:
    config = tiny.config("llama").to_dict() | {"sliding_window": 4, "use_sliding_window": True}
    assert LeanConfig.read(config).windows == (None,) * tiny.LAYERS
