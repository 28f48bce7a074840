"""Loads a draft head from a raw EAGLE-3 or a speculators directory, strictly.

Every tensor must be expected, present, of the right shape and finite. Embeddings are the target's: a file may
carry `embed_tokens` (its shape is checked), but it is not used, as in SGLang; `LoadedHead.has_embedding`
records it. Knows nothing of targets beyond the numbers it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdec.errors import CheckpointError, UnsupportedError
from specdec.head.config import HeadConfig
from specdec.head.files import HeadFiles, read_files
from specdec.head.layout import (
    EMBEDDING,
    MASK,
    OFFSETS,
    Layout,
    absolute_ids,
    canonical,
    check_finite,
    fill,
    shapes,
)
from specdec.head.model import DraftHead
from specdec.head.settings import head_config, own


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """A head and what its files said beside the weights.

    Attributes:
        head: the module.
        layout: "raw" or "speculators".
        weights: file the tensors came from.
        has_embedding: the file carries its own embeddings; engines that use them (vLLM) may draft
            differently.
        target: name of the target the file gives, None when it does not.
    """

    head: DraftHead
    layout: Layout
    weights: str
    has_embedding: bool
    target: str | None


def load_head(
    path: Path | str,
    *,
    taps: tuple[int, ...] | None = None,
    target_layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> DraftHead:
    """The head in a directory; see `open_head`."""
    return open_head(path, taps=taps, target_layers=target_layers, dtype=dtype, device=device).head


def open_head(
    path: Path | str,
    *,
    taps: tuple[int, ...] | None = None,
    target_layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LoadedHead:
    """Load a head and tell what its files said.

    Args:
        path: a raw EAGLE-3 or speculators directory.
        taps: layer-input ids, for files that do not name them.
        target_layers: of the target, to check the taps against.
        dtype: of the head; the file's own when None.
        device: where it goes; the CPU when None.

    Raises:
        CheckpointError: files, keys or tensors that are missing, unexpected, mis-shaped or not finite.
        MismatchError: tap ids are missing, contradict each other, or lie beyond the target.
        UnsupportedError: a head this build does not compute.
    """
    files = read_files(Path(path))
    _refuse_older(files)
    config = head_config(files.config, files.layout, taps, target_layers)
    _refuse_narrow(config)
    tensors = _renamed(files)
    has_embedding = _take_embedding(tensors, config)
    ids = _take_ids(tensors, config)
    _check_weights(tensors, config)
    head = DraftHead(config).to(dtype or tensors["fc.weight"].dtype)
    fill(head, tensors, ids)
    target = own(files.config, "target") or _verifier(files)
    return LoadedHead(head.to(device or "cpu"), files.layout, files.weights, has_embedding, target)


def _refuse_older(files: HeadFiles) -> None:
    if "fc.weight" in files.tensors and not any(
        "midlayer." in n or "hidden_norm" in n for n in files.tensors
    ):
        raise UnsupportedError(
            "has no feature norm: this looks like an EAGLE-1 or EAGLE-2 head",
            field=str(files.path),
            allowed="EAGLE-3 heads, raw or speculators",
        )


def _refuse_narrow(config: HeadConfig) -> None:
    if config.hidden != config.target_hidden:
        raise UnsupportedError(
            "a head of another width than its target needs embeddings of its own",
            field="config.json: target_hidden_size",
            value=config.target_hidden,
            allowed=str(config.hidden),
        )


def _renamed(files: HeadFiles) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in files.tensors.items():
        if canonical(name) in tensors:
            raise CheckpointError(
                "the tensor is there twice, under two names", field=name, value=files.weights
            )
        tensors[canonical(name)] = tensor
    return tensors


def _take_embedding(tensors: dict[str, Tensor], config: HeadConfig) -> bool:
    embedding = tensors.pop(EMBEDDING, None)
    if embedding is None:
        return False
    _check_shape(EMBEDDING, embedding, (config.vocab, config.hidden))
    return True


def _take_ids(tensors: dict[str, Tensor], config: HeadConfig) -> Tensor:
    """Absolute draft-vocabulary ids [Vd]; `t2d`, where present, must be their mask."""
    offsets, mask = tensors.pop(OFFSETS, None), tensors.pop(MASK, None)
    if offsets is None:
        if config.draft_vocab < config.vocab:
            raise CheckpointError(
                "the tensor is missing", field=OFFSETS, allowed=f"int64 [{config.draft_vocab}]"
            )
        offsets = torch.zeros(config.vocab, dtype=torch.int64)
    _check_shape(OFFSETS, offsets, (config.draft_vocab,))
    if offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise CheckpointError("must hold whole numbers", field=OFFSETS, value=str(offsets.dtype))
    ids = absolute_ids(offsets, config.vocab)
    if mask is not None:
        _check_shape(MASK, mask, (config.vocab,))
        if int(mask.bool().sum()) != config.draft_vocab or not bool(mask.bool()[ids].all()):
            raise CheckpointError(
                "does not mark the same tokens as d2t",
                field=MASK,
                value=int(mask.bool().sum()),
                allowed=f"{config.draft_vocab} set",
            )
    return ids


def _check_weights(tensors: dict[str, Tensor], config: HeadConfig) -> None:
    expected = shapes(config)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise CheckpointError(
            "the tensor is missing",
            field=", ".join(missing),
            remedy="The file is incomplete, or config.json promises what it lacks.",
        )
    if extra:
        raise CheckpointError(
            "the tensor is not part of this head",
            field=", ".join(extra),
            remedy="config.json may lack a switch (fc_norm, norm_before_fc).",
        )
    for name, shape in expected.items():
        _check_shape(name, tensors[name], shape)
        if not tensors[name].is_floating_point():
            raise CheckpointError("must be floating point", field=name, value=str(tensors[name].dtype))
        check_finite(name, tensors[name])


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            "has the wrong shape for its config.json",
            field=name,
            value=list(tensor.shape),
            allowed=str(list(shape)),
        )


def _verifier(files: HeadFiles) -> str | None:
    block = files.config.get("speculators_config")
    verifier = block.get("verifier") if isinstance(block, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) else None
