"""Writes a draft head so that other engines load it: raw EAGLE-3 (our own format) and speculators.

The raw directory carries both layer-id fields (layer inputs at the top for vLLM and llama.cpp, layer outputs
nested for SGLang), rotary positions spelled out, offsets in `d2t`, and no embeddings. Knows no target, only
its names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.head.config import HeadConfig
from specdec.head.files import write_files
from specdec.head.layout import tensors_of
from specdec.head.model import DraftHead
from specdec.head.settings import IDS, NESTED, OWN

VERSION = 1  # of our block in config.json
ON_HUB = {  # how engines that do not know our short names find the same target
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"
}
SPECULATORS = "0.9.0"  # the release whose layout save_speculators writes


@dataclass(frozen=True, slots=True)
class TargetNames:
    """What a checkpoint says of its target.

    Attributes:
        name_or_path: where engines find it.
        architectures: of its config.json.
        bos, eos: token ids, None when it has none.
        max_length: positions it serves; engines want the head's at least as large. None: the head's own.
    """

    name_or_path: str
    architectures: tuple[str, ...] = ("LlamaForCausalLM",)
    bos: int | None = None
    eos: int | tuple[int, ...] | None = None
    max_length: int | None = None


def save_raw(
    head: DraftHead, directory: Path | str, *, target: TargetNames, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write a raw EAGLE-3 directory; returns it.

    Raises:
        CheckpointError: the head is packed or not finite, or the disk refuses.
    """
    tensors = tensors_of(head, "raw", dtype)
    return write_files(Path(directory), raw_config(head.config, target, dtype), tensors)


def save_speculators(
    head: DraftHead,
    directory: Path | str,
    *,
    target: TargetNames,
    dtype: torch.dtype = torch.bfloat16,
    tokens: int = 3,
) -> Path:
    """Write a speculators directory; `tokens` is the chain length engines draft by default.

    Raises as `save_raw`.
    """
    tensors = tensors_of(head, "speculators", dtype)
    return write_files(Path(directory), speculators_config(head.config, target, dtype, tokens), tensors)


def raw_config(config: HeadConfig, target: TargetNames, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the raw layout."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_layer(config, target),
        "target_hidden_size": config.target_hidden,
        "draft_vocab_size": config.draft_vocab,
        "bos_token_id": target.bos,
        "eos_token_id": list(target.eos) if isinstance(target.eos, tuple) else target.eos,
        "torch_dtype": _name(dtype),
        **_switches(config),
        IDS: list(config.taps),
        NESTED: {"use_aux_hidden_state": True, IDS: [tap - 1 for tap in config.taps]},
        OWN: _own(config, target),
    }


def speculators_config(
    config: HeadConfig, target: TargetNames, dtype: torch.dtype, tokens: int
) -> dict[str, Any]:
    """config.json of the speculators layout, every boolean written out."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "dtype": _name(dtype),
        "tie_word_embeddings": False,
        "draft_vocab_size": config.draft_vocab,
        "target_hidden_size": None if config.target_hidden == config.hidden else config.target_hidden,
        "embed_requires_grad": False,
        **_switches(config),
        IDS: list(config.taps),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": ON_HUB.get(target.name_or_path, target.name_or_path),
                "architectures": list(target.architectures),
            },
        },
        "transformer_layer_config": {"architectures": ["LlamaForCausalLM"], **_layer(config, target)},
        OWN: _own(config, target),
    }


def _layer(config: HeadConfig, target: TargetNames) -> dict[str, Any]:
    """The one Llama layer, in Hugging Face's words."""
    scaling = dict(config.scaling) if config.scaling else None
    window: dict[str, Any] = {}
    if config.window is not None:
        window = {
            "sliding_window": config.window,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention"],
        }
    return {
        "model_type": "llama",
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "vocab_size": config.vocab,
        "max_position_embeddings": target.max_length or config.max_length,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.theta},
        "tie_word_embeddings": False,
        **window,
    }


def _switches(config: HeadConfig) -> dict[str, bool]:
    return {
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
    }


def _own(config: HeadConfig, target: TargetNames) -> dict[str, Any]:
    return {"version": VERSION, "target": target.name_or_path, "fingerprint": config.fingerprint}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
