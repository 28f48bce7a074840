"""From a checkpoint's tensors to the lean decoder's packed parameters: strict, one by one, in one dtype.

Knows tensor names and shapes. It does not know files: it asks for one tensor at a time and lets go of it as
soon as it is cast, so that memory peaks near the size of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from specdec.attention.protocol import TreeAttention
from specdec.errors import CheckpointError
from specdec.layers.linear import Projection
from specdec.target.lean import LeanConfig, LeanDecoder

Take = Callable[[str], Tensor]
"""Hands out a checkpoint's tensor by name, once."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DERIVED = ("rotary_emb.inv_freq",)  # buffers old checkpoints carry; they follow from the config
GATED = ("gate", "up")
SHOWN = 4  # names an error message lists


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]


Layout = dict[str, tuple[Piece, ...]]
"""Our parameter -> the checkpoint tensors stacked into it, in order."""


def layout(config: LeanConfig) -> Layout:
    """What the decoder is made of. A tied LM head has no entry: it is the embedding."""
    c = config
    wanted: Layout = {"embedding": (Piece(EMBEDDING, (c.vocab, c.hidden)),)}
    for layer in range(c.layers):
        wanted |= _layer(c, layer)
    wanted["norm.weight"] = (Piece("model.norm.weight", (c.hidden,)),)
    if not c.tied:
        wanted["head.weight"] = (Piece(HEAD, (c.vocab, c.hidden)),)
    return wanted


def _layer(c: LeanConfig, layer: int) -> Layout:
    old, new = f"model.layers.{layer}.", f"blocks.{layer}."
    attn, mlp = old + "self_attn.", old + "mlp."
    rows = {"q": c.heads * c.head_dim, "k": c.kv_heads * c.head_dim, "v": c.kv_heads * c.head_dim}
    wanted: Layout = {
        "input_norm.weight": (Piece(old + "input_layernorm.weight", (c.hidden,)),),
        "qkv.weight": tuple(Piece(f"{attn}{p}_proj.weight", (n, c.hidden)) for p, n in rows.items()),
        "out.weight": (Piece(attn + "o_proj.weight", (c.hidden, rows["q"])),),
        "mlp_norm.weight": (Piece(old + "post_attention_layernorm.weight", (c.hidden,)),),
        "gate_up.weight": tuple(Piece(f"{mlp}{p}_proj.weight", (c.intermediate, c.hidden)) for p in GATED),
        "down.weight": (Piece(mlp + "down_proj.weight", (c.hidden, c.intermediate)),),
    }
    if c.qkv_bias:
        wanted["qkv.bias"] = tuple(Piece(f"{attn}{p}_proj.bias", (n,)) for p, n in rows.items())
    if c.out_bias:
        wanted["out.bias"] = (Piece(attn + "o_proj.bias", (c.hidden,)),)
    if c.qk_norm:
        for p in "qk":
            wanted[f"{p}_norm.weight"] = (Piece(f"{attn}{p}_norm.weight", (c.head_dim,)),)
    return {new + name: pieces for name, pieces in wanted.items()}


def lean_shapes(config: LeanConfig) -> list[tuple[int, ...]]:
    """Shapes of all tensors that the decoder is made of."""
    return [piece.shape for pieces in layout(config).values() for piece in pieces]


def check_names(shapes: Mapping[str, tuple[int, ...]], config: LeanConfig) -> None:
    """Exactly the tensors of `layout`, each of its shape.

    Raises:
        CheckpointError: naming what is missing, unexpected or mis-shaped.
    """
    pieces = {piece.name: piece.shape for parts in layout(config).values() for piece in parts}
    optional = {HEAD: (config.vocab, config.hidden)} if config.tied else {}
    missing = [name for name in pieces if name not in shapes]
    known = pieces.keys() | optional.keys()
    extra = [name for name in shapes if name not in known and not name.endswith(DERIVED)]
    if missing:
        raise CheckpointError("the checkpoint lacks tensors its config asks for", field="weights",
                              value=_listed(missing), remedy="Is the download complete?")  # fmt: skip
    if extra:
        raise CheckpointError("the checkpoint holds tensors its config has no place for", field="weights",
                              value=_listed(extra), remedy="Is config.json of this model?")  # fmt: skip
    for name, shape in (pieces | optional).items():
        if shapes.get(name, shape) != shape:
            raise CheckpointError("has another shape than the config says", field=name, value=shapes[name],
                                  allowed=str(shape))  # fmt: skip


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError when a tensor holds NaN or infinities."""
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise CheckpointError("holds NaN or infinite values", field=name, remedy="Fetch the weights again.")


def assemble(
    config: LeanConfig, take: Take, attention: TreeAttention, dtype: torch.dtype, device: torch.device
) -> LeanDecoder:
    """A frozen decoder out of tensors that passed `check_names`.

    Parameters are made on the meta device and replaced one by one; each projection is packed as soon as it is
    whole, so the peak is the result plus one projection.

    Raises:
        CheckpointError: naming the tensor that holds NaN or infinities.
    """
    with torch.device("meta"):
        decoder = LeanDecoder(config, attention)
    for name, pieces in layout(config).items():
        whole = _stacked([_cast(take(piece.name), piece, dtype, device) for piece in pieces])
        _place(decoder, name, whole)
    if config.tied:
        decoder.head.weight = decoder.embedding
    decoder.freeze()
    return decoder


def _cast(tensor: Tensor, piece: Piece, dtype: torch.dtype, device: torch.device) -> Tensor:
    check_finite(piece.name, tensor)
    # a copy even where nothing changes: a view of a mapped file would keep the whole file resident
    return tensor.to(device=device, dtype=dtype, copy=True)


def _stacked(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _place(decoder: LeanDecoder, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = decoder.get_submodule(path)
    setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if isinstance(module, Projection) and not any(p.is_meta for p in module.parameters()):
        module.pack()
