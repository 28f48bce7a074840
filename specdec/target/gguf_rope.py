"""What a GGUF file says of rotary positions and transformers' reader drops, written into the model's config.

The reader takes the base and nothing else: a Llama 3.1 would turn as a Llama 3, and answer worse without a word. What
has no counterpart here is refused. Knows keys and tensors by llama.cpp's names; not how either is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from specdec.errors import UnsupportedError
from specdec.layers.rope import frequencies

FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that are no weights: divisors of the frequencies."""

SCALING = "rope.scaling."
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1, 3.2 and 3.3 alike; a file keeps only what they come to."""

NEUTRAL = {"finetuned": None, "alpha": 0.0, "attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0,
           "yarn_log_multiplier": 0.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}  # fmt: skip
"""Further keys of a scaling, and the value with which each changes nothing; None for any."""


def state_rope(config: PretrainedConfig, said: Mapping[str, Any], factors: Mapping[str, Tensor]) -> None:
    """Set `rope_parameters` of a config to what the file says.

    Args:
        config: as transformers read it.
        said: values of the file by key, without the architecture before it, such as "rope.scaling.factor".
        factors: those of `FACTORS` that the file holds, float32 [rotary dims / 2].

    Raises:
        UnsupportedError: for a scaling that transformers' rotary embeddings do not have, or that we do not know.
    """
    every: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    if every is None:  # learned positions
        return
    rope = every.get("full_attention", every)  # Gemma scales those layers only
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    width = int(said.get("rope.dimension_count", head_dim))
    if width != int(head_dim * rope.get("partial_rotary_factor", 1.0)):
        rope["partial_rotary_factor"] = width / head_dim
    rope["rope_theta"] = float(said.get("rope.freq_base", rope["rope_theta"]))
    rope |= _scaling(said, factors, frequencies(width, rope["rope_theta"]), rope["rope_theta"])
    config.rope_parameters = every


def _scaling(
    said: Mapping[str, Any], factors: Mapping[str, Tensor], plain: Tensor, theta: float
) -> dict[str, Any]:
    """Entries of `rope_parameters` beside the base; none without a scaling."""
    single, short, long = (factors.get(name) for name in FACTORS)
    trained = said.get(SCALING + "original_context_length")
    if short is not None and long is not None:
        found = {"rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(),
                 "original_max_position_embeddings": trained}  # fmt: skip
        attention = said.get(SCALING + "attn_factor")
        return found if attention is None else found | {"attention_factor": float(attention)}
    if single is not None and not torch.allclose(single, torch.ones_like(single)):
        return _llama3(single, plain, theta)
    factor = float(said.get(SCALING + "factor") or said.get("rope.scale_linear") or 1.0)
    kind = said.get(SCALING + "type", "linear")  # llama.cpp's default
    if kind == "none" or factor == 1.0:
        return {}
    _refuse_others(kind, said)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained}


def _llama3(divisors: Tensor, plain: Tensor, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3.1 that divides the frequencies `plain` so."""
    found = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    ours = frequencies(2 * len(plain), theta, found)
    if plain.shape != divisors.shape or not torch.allclose(ours, plain / divisors, rtol=1e-3):
        raise UnsupportedError("scales rotary positions by factors that are not Llama 3's", field=FACTORS[0],
                               remedy="Take its safetensors instead.")  # fmt: skip
    return found


def _refuse_others(kind: str, said: Mapping[str, Any]) -> None:
    if kind not in ("linear", "yarn"):
        raise UnsupportedError("unknown", field=SCALING + "type", value=kind, allowed="none, linear, yarn",
                               remedy="Take its safetensors instead.")  # fmt: skip
    for key, neutral in NEUTRAL.items():
        value = said.get(SCALING + key, neutral)
        if value != neutral and neutral is not None:
            raise UnsupportedError("is not carried over", field=SCALING + key, value=value,
                                   remedy="Take its safetensors instead.")  # fmt: skip
