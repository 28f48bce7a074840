"""Where a transformers model keeps its parts: layers, final norm, embeddings, and what happens to its logits.

Every family names them differently; shapes and order tell them apart. Knows no attention and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from specdec.errors import UnsupportedError

RECURRENT = ("linear", "conv", "mamba", "hybrid", "recurrent")
OTHERS = {"chunked": "chunked attention", "indexed": "sparse attention", "compressed": "compressed attention"}
FORWARD_WIDE = ("longrope", "dynamic")  # rope types that choose frequencies for a whole forward
EPS_NAMES = ("eps", "variance_epsilon", "epsilon")


def _as_it_is(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True, slots=True)
class Readout:
    """What a family does to the product of final state and LM head: `scaled`, then bent to stay within `cap`."""

    scaled: Callable[[Tensor], Tensor] = _as_it_is
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        return self.bent(self.scaled(logits))

    def bent(self, logits: Tensor) -> Tensor:
        """Scaled logits within the cap."""
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the language model, also of one that sees or hears."""
    return model.config.get_text_config(decoder=True)


def architecture(model: PreTrainedModel) -> str:
    return type(model).__name__


def refuse_known(model: PreTrainedModel) -> None:
    """Raises UnsupportedError naming the architecture and what keeps it from trees, as far as it tells."""
    lacks = _shortcoming(model)
    if lacks:
        raise UnsupportedError(f"cannot verify trees: {lacks}", field=architecture(model),
                               remedy="Use a model whose every layer is softmax attention.")  # fmt: skip


def _shortcoming(model: PreTrainedModel) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    kinds = sorted(set(getattr(text_config(model), "layer_types", None) or ()))
    recurrent = [kind for kind in kinds if any(word in kind for word in RECURRENT)]
    if recurrent or model._is_stateful:
        named = ", ".join(recurrent) or "stateful"
        return f"it has recurrent layers ({named}), whose state cannot be rolled back"
    for word, meaning in OTHERS.items():
        if any(word in kind for kind in kinds):
            return f"it uses {meaning}"
    if not model._can_set_attn_implementation():
        return "its code does not go through the attention interface of transformers"
    return None


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that owns the decoder layers, and the layers: the outermost list of the right length."""
    count = int(text_config(model).num_hidden_layers)
    base: nn.Module = model.base_model
    found = [name for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise UnsupportedError("no list of decoder layers found", field=architecture(model),
                               allowed=f"{count} layers")  # fmt: skip
    name = min(found, key=lambda path: path.count("."))
    owner, layers = base.get_submodule(name.rpartition(".")[0]), base.get_submodule(name)
    assert isinstance(layers, nn.ModuleList)
    return owner, layers


def final_norm_weight(model: PreTrainedModel) -> Tensor | None:
    """Of the norm before the LM head, as it is stored; None where there is none to be found."""
    norm = _final_norm(model)
    weight = None if norm is None else norm.weight
    return weight if isinstance(weight, Tensor) else None


def _final_norm(model: PreTrainedModel) -> nn.Module | None:
    owner, layers = decoder_layers(model)
    hidden = int(text_config(model).hidden_size)
    norms = [m for m in owner.children() if m is not layers and _is_norm(m, hidden)]
    return norms[-1] if norms else None


def final_norm(model: PreTrainedModel) -> tuple[Tensor, float]:
    """Effective weight [H] (Gemma stores it less one) and eps of the norm before the LM head.

    Raises:
        UnsupportedError: when there is none to be found.
    """
    norm = _final_norm(model)
    if norm is None:
        raise UnsupportedError("no final norm found", field=architecture(model))
    eps = next((float(getattr(norm, name)) for name in EPS_NAMES if hasattr(norm, name)), 1e-6)
    assert isinstance(norm.weight, Tensor)
    if isinstance(norm, nn.LayerNorm):
        return norm.weight.detach(), eps
    ones = torch.ones(1, len(norm.weight), dtype=norm.weight.dtype, device=norm.weight.device)
    with torch.inference_mode():
        weight = norm(ones)[0] * (1 + eps) ** 0.5
    return weight.clone(), eps


def _is_norm(module: nn.Module, hidden: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and tuple(weight.shape) == (hidden,)


def steady_length(config: PretrainedConfig) -> int:
    """Positions up to which a row's rotary angles are its own.

    LongRoPE and dynamic scalings look at the longest position of a forward: past their first length a neighbour or a
    guess that is never accepted would change everybody's angles.
    """
    longest = int(getattr(config, "max_position_embeddings", 2048))
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    for each in [
        rope,
        *(part for part in rope.values() if isinstance(part, Mapping)),
    ]:  # some differ by layer type
        if each.get("rope_type") in FORWARD_WIDE:
            longest = min(longest, int(each.get("original_max_position_embeddings") or longest))
    return longest


def readouts(config: PretrainedConfig) -> Mapping[str, Readout]:
    """Candidates for what a family does to its logits, by the config fields that ask for it."""
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return {"final_logit_softcapping": Readout(cap=cap)}
    found = {"plain": Readout()}
    scale = getattr(config, "logit_scale", None)
    if scale:
        found["logit_scale"] = Readout(lambda logits: logits * scale)
    factor = getattr(config, "logits_scaling", None)
    if factor:  # Granite divides, HyperCLOVA X multiplies
        found |= {
            "/ logits_scaling": Readout(lambda x: x / factor),
            "* logits_scaling": Readout(lambda x: x * factor),
        }
    multiplier = getattr(config, "lm_head_multiplier", None)
    if multiplier:
        found["lm_head_multiplier"] = Readout(lambda logits: logits * multiplier)
    return found


def layer_windows(config: PretrainedConfig, layers: int) -> list[bool] | None:
    """Which layers slide, by the config; None when it does not say."""
    kinds: list[Any] | None = getattr(config, "layer_types", None)
    return None if kinds is None else [kind == "sliding_attention" for kind in kinds[:layers]]
