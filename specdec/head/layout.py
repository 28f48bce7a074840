"""The names and shapes of a head's tensors on disk, both ways between files and `DraftHead`.

Raw EAGLE-3 says `midlayer.`, speculators says `layers.0.`; all else is equal. Files keep q, k, v, gate and up
apart and write the draft vocabulary as offsets (`d2t`: id = i + d2t[i]); in memory they are packed and
absolute. Knows nothing of config.json nor of how files are read.
Dimension legend: H hidden, Ht target hidden, A taps, I MLP width, Vd draft vocabulary, V target vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from specdec.errors import CheckpointError
from specdec.head.config import HeadConfig
from specdec.head.model import DraftHead

Layout = Literal["raw", "speculators"]
LAYER: dict[Layout, str] = {"raw": "midlayer.", "speculators": "layers.0."}
OFFSETS, MASK, EMBEDDING = "d2t", "t2d", "embed_tokens.weight"

_OLD_NORMS = ("low", "mid", "high")  # EAGLE-3.1 drafts before fc_norm.{i}
_PLAIN = {  # parameter of DraftHead -> tensor after the layer prefix ("" = outside the layer)
    "fc.weight": ("", "fc.weight"),
    "input_norm.weight": ("L", "input_layernorm.weight"),
    "hidden_norm.weight": ("L", "hidden_norm.weight"),
    "out.weight": ("L", "self_attn.o_proj.weight"),
    "mlp_norm.weight": ("L", "post_attention_layernorm.weight"),
    "down.weight": ("L", "mlp.down_proj.weight"),
    "norm.weight": ("", "norm.weight"),
    "lm_head.weight": ("", "lm_head.weight"),
}
_QKV = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
_GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")


def parts(config: HeadConfig, layout: Layout = "raw") -> dict[str, tuple[str, ...]]:
    """Parameter of DraftHead -> the tensors that, stacked by rows, make it."""
    layer = LAYER[layout]
    table: dict[str, tuple[str, ...]] = {
        ours: ((layer if where else "") + name,) for ours, (where, name) in _PLAIN.items()
    }
    table["qkv.weight"] = tuple(layer + name for name in _QKV)
    table["gate_up.weight"] = tuple(layer + name for name in _GATE_UP)
    if config.fc_norm:
        table |= {f"fc_norm.{i}.weight": (f"fc_norm.{i}.weight",) for i in range(len(config.taps))}
    if config.norm_before_fc:
        table["tap_norm.weight"] = ("input_norm.weight",)
    return table


def shapes(config: HeadConfig, layout: Layout = "raw") -> dict[str, tuple[int, ...]]:
    """Shape of every weight a file of this config must hold; `d2t`, `t2d` and embeddings apart."""
    c, layer = config, LAYER[layout]
    query, key = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table: dict[str, tuple[int, ...]] = {
        "fc.weight": (c.hidden, len(c.taps) * c.target_hidden),
        **{layer + name: (rows, 2 * c.hidden) for name, rows in zip(_QKV, (query, key, key), strict=True)},
        layer + "self_attn.o_proj.weight": (c.hidden, query),
        **{layer + name: (c.intermediate, c.hidden) for name in _GATE_UP},
        layer + "mlp.down_proj.weight": (c.hidden, c.intermediate),
        **{
            layer + f"{norm}.weight": (c.hidden,)
            for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
        "norm.weight": (c.hidden,),
        "lm_head.weight": (c.draft_vocab, c.hidden),
    }
    if c.fc_norm:
        table |= {f"fc_norm.{i}.weight": (c.target_hidden,) for i in range(len(c.taps))}
    if c.norm_before_fc:
        table["input_norm.weight"] = (len(c.taps) * c.target_hidden,)
    return table


def canonical(name: str) -> str:
    """A tensor's raw name: either layer prefix and the old EAGLE-3.1 norm names are understood."""
    if name.startswith(LAYER["speculators"]):
        return LAYER["raw"] + name.removeprefix(LAYER["speculators"])
    for i, level in enumerate(_OLD_NORMS):
        if name == f"aux_norm_{level}.weight":
            return f"fc_norm.{i}.weight"
    return name


def absolute_ids(offsets: Tensor, vocab: int) -> Tensor:
    """`d2t` offsets int64 [Vd] -> target ids [Vd].

    >>> absolute_ids(torch.tensor([0, 2, 2]), 8).tolist()
    [0, 3, 4]

    Raises:
        CheckpointError: an id outside the vocabulary, or ids that do not rise (absolute ids stored by mistake
            repeat or fall after the sum, or leave the vocabulary).
    """
    ids = offsets.to(torch.int64) + torch.arange(offsets.shape[0])
    outside = ((ids < 0) | (ids >= vocab)).nonzero()
    if outside.numel():
        at = int(outside[0])
        raise CheckpointError(
            f"entry {at} points outside the target's vocabulary",
            field=OFFSETS,
            value=int(ids[at]),
            allowed=f"i + d2t[i] in 0..{vocab - 1}",
            remedy="d2t holds offsets, not ids.",
        )
    falls = (ids.diff() <= 0).nonzero()
    if falls.numel():
        at = int(falls[0])
        raise CheckpointError(
            f"ids do not rise at entry {at + 1}",
            field=OFFSETS,
            value=[int(ids[at]), int(ids[at + 1])],
            allowed="i + d2t[i] strictly increasing",
            remedy="d2t holds offsets of sorted ids, not ids.",
        )
    return ids


def fill(head: DraftHead, tensors: Mapping[str, Tensor], ids: Tensor) -> None:
    """Put checked tensors (raw names) and absolute ids into a head, in the head's dtype."""
    state = {
        ours: torch.cat([tensors[name] for name in names]) if len(names) > 1 else tensors[names[0]]
        for ours, names in parts(head.config).items()
    }
    head.load_state_dict(state | {"ids": ids})


def tensors_of(head: DraftHead, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights in `dtype`, `d2t` int64 [Vd] offsets, `t2d` bool [V].

    Raises:
        CheckpointError: a head that was packed for decoding, was never filled, or has NaN or infinite
            weights.
    """
    state, expected = head.state_dict(), shapes(head.config, layout)
    out: dict[str, Tensor] = {}
    for ours, names in parts(head.config, layout).items():
        packed = state[ours].detach().to("cpu", dtype)
        if packed.shape[0] != sum(expected[name][0] for name in names):
            raise CheckpointError(
                "was packed for decoding and no longer holds its weight",
                field=ours,
                remedy="Save the head before freeze(), or load it again.",
            )
        for name, part in zip(names, packed.split([expected[name][0] for name in names]), strict=True):
            out[name] = part.clone(memory_format=torch.contiguous_format)
    for name, tensor in out.items():
        check_finite(name, tensor)
    ids = head.ids.cpu()
    offsets = ids - torch.arange(ids.shape[0])
    absolute_ids(offsets, head.config.vocab)
    out[OFFSETS] = offsets
    out[MASK] = torch.zeros(head.config.vocab, dtype=torch.bool).index_fill_(0, ids, True)
    return out


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError naming the tensor when it holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{bad} of {tensor.numel()} weights are NaN or infinite",
            field=name,
            remedy="The file is damaged, or its training diverged.",
        )
