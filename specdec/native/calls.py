"""What the C kernels are called with: the structures of kernels.h, growth.c and layers.c, field by field."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from torch import Tensor

_POINTER, _WHOLE = ctypes.c_void_p, ctypes.c_long


class AttentionCall(ctypes.Structure):
    """`Attention`."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "keys", "values", "out", "slots", "lengths", "ancestors", "positions",
                                        "tree")),
        *((name, _WHOLE) for name in ("batch", "rows", "heads", "kv_heads", "size", "capacity", "slot_step",
                                      "query_step", "request_step", "tree_rows", "offset", "window")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("kind", ctypes.c_int),
    )  # fmt: skip


class PlacingCall(ctypes.Structure):
    """`Placing`."""

    _fields_ = (
        *((name, _POINTER) for name in ("heads", "cos", "sin", "keys", "values", "slots", "indices")),
        *((name, _WHOLE) for name in ("batch", "rows", "heads_count", "kv_heads", "size", "capacity")),
        ("type", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


class GradingCall(ctypes.Structure):
    """`Grading`."""

    _fields_ = (
        *((name, _POINTER) for name in ("logits", "probs", "index", "weights", "loss", "overlap", "hit")),
        *((name, _WHOLE) for name in ("rows", "width")),
        ("rate", ctypes.c_float),
        ("type", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


class LevelCall(ctypes.Structure):
    """`Level`."""

    _fields_ = (
        *((name, _POINTER) for name in ("logits", "ids", "y", "scores", "at", "bits", "tokens", "parents", "paths",
                                        "next_tokens", "next_at", "next_bits", "next_scores", "next_y")),
        *((name, _WHOLE) for name in ("batch", "rows", "vocab", "width", "room", "count", "rows_before", "y_bytes",
                                      "likely")),
        ("floor", ctypes.c_double),
        ("type", ctypes.c_int),
        ("threads", ctypes.c_int),
    )  # fmt: skip


class ChoosingCall(ctypes.Structure):
    """`Choosing`."""

    _fields_ = (
        *((name, _POINTER) for name in ("roots", "tokens", "parents", "paths", "next_tokens", "next_parents", "depths",
                                        "ancestors", "scores")),
        *((name, _WHOLE) for name in ("batch", "room", "count", "nodes")),
    )  # fmt: skip


class MatrixCall(ctypes.Structure):
    """`Matrix`."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("inputs", _WHOLE), ("outputs", _WHOLE))


class LayerCall(ctypes.Structure):
    """`Layer`."""

    _fields_ = (
        *((name, _POINTER) for name in ("input_norm", "embedded_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, MatrixCall) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _WHOLE) for name in ("hidden", "intermediate")),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int),
        ("tiles", ctypes.c_int),
    )  # fmt: skip


class ForwardCall(ctypes.Structure):
    """`Forward`."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "embedded", "y", "attentions")),
        ("placing", PlacingCall),
        ("scale", ctypes.c_float),
        *((name, _WHOLE) for name in ("rows", "plane")),
        *((name, _POINTER) for name in ("taps", "features")),
        ("tap_count", _WHOLE),
    )


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What the attention of all layers of one forward shares; the tensors live as long as their addresses are used."""

    call: AttentionCall
    tensors: tuple[Tensor, ...]
