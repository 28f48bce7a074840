"""What transformers' layers meet in our forwards: a cache layer that stores rows, and an attention function.

Extra keyword arguments do not reach attention in every family: the forward in flight is a context variable.
Knows tensors as layers hand them over ([B, heads, N, D]); it knows no architecture.
Dimension legend: B requests, H query heads, K key-value heads, N rows, D head size.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from specdec.attention.protocol import Rows, TreeAttention
from specdec.cache import KVCache
from specdec.errors import UnsupportedError

NAME = "specdec_tree"
"""Of our attention in transformers' registry. No mask function bears it, so no masks are built for it."""


@dataclass(frozen=True, slots=True)
class Call:
    """What an attention layer asks for besides its tensors."""

    scale: float
    window: int | None
    softcap: float | None


class InFlight(Protocol):
    """A forward in flight."""

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the new rows [B, K, N, D] of a layer."""
        ...

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """query [B, H, N, D], and the rows a layer stored -> [B, N, H, D of values]."""
        ...


_IN_FLIGHT: ContextVar[InFlight] = ContextVar("specdec_in_flight")


@contextlib.contextmanager
def flying(forward: InFlight) -> Iterator[None]:
    """Layers called inside see `forward`."""
    token = _IN_FLIGHT.set(forward)
    try:
        yield
    finally:
        _IN_FLIGHT.reset(token)


class Pass:
    """A real forward: rows go to the cache, queries read it."""

    def __init__(self, rows: Rows, cache: KVCache, attention: TreeAttention) -> None:
        self.rows, self.cache, self.attention = rows, cache, attention
        self._plans: dict[int | None, Any] = {}
        self._layer = 0
        self._owner: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that an id is not given twice within the forward

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._layer = self._owner[id(keys)] = layer
        self._alive.append(keys)
        width = max(keys.shape[-1], values.shape[-1])
        device = self.cache.kv.device
        k, v = (_wide(x, width).transpose(1, 2).to(device) for x in (keys, values))
        self._view(keys.shape[1], width).write(layer, self.rows.index, k, v)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        # layers that share an earlier layer's keys pass the very tensor that layer stored; keys made of what was
        # stored, as by latent attention, are what later rows must see
        layer = self._owner.get(id(keys))
        if layer is None:
            layer = self._layer
            self.store(layer, keys, values)
        if call.window not in self._plans:
            self._plans[call.window] = self.attention.plan(self.rows, self.cache, call.window)
        width = max(keys.shape[-1], values.shape[-1])
        view = self._view(keys.shape[1], width)
        asked = _wide(query, width).transpose(1, 2).to(view.kv.device)
        seen = self.attention.attend(asked, view, layer, self._plans[call.window], call.scale, call.softcap)
        return seen[..., : values.shape[-1]].to(query.device)

    def _view(self, heads: int, width: int) -> KVCache:
        """The cache as a layer of fewer or smaller heads sees it."""
        if (heads, width) == (self.cache.shape.kv_heads, self.cache.shape.head_dim):
            return self.cache
        view = copy.copy(self.cache)
        view.kv = self.cache.kv[:, :, :, :heads, :, :width]
        return view


def _wide(x: Tensor, width: int) -> Tensor:
    """Zeros up to `width`: they add nothing to a product."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


@dataclass(slots=True)
class Probe:
    """A forward that only looks: how many heads of which size rows have at most, and what attention asks for."""

    heads: int = 0
    width: int = 0
    stored: bool = False
    calls: list[Call] = field(default_factory=list)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.stored = True
        self._see(keys, values)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        self.calls.append(call)
        self._see(keys, values)  # larger, it may be, than what the layer gave its cache
        b, h, n, _ = query.shape
        return query.new_zeros(b, n, h, values.shape[-1])

    def _see(self, keys: Tensor, values: Tensor) -> None:
        self.heads = max(self.heads, keys.shape[1])
        self.width = max(self.width, keys.shape[-1], values.shape[-1])


class SpecLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers
    """One layer of a transformers cache that keeps nothing: rows go to the forward in flight."""

    is_compileable = False
    is_sliding = False

    def __init__(self, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers
        self.layer = layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new rows; they are handed back as they came, attention reads the cache."""
        _IN_FLIGHT.get().store(self.layer, key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is built from it."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Positions are always given, so nothing is derived from it."""
        return 0

    def get_max_length(self) -> int:
        """The engine minds the length."""
        return -1


def spec_cache(layers: int) -> Cache:
    """A stateless transformers cache of that many layers."""
    return Cache(layers=[SpecLayer(layer) for layer in range(layers)])


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: transformers 5.24 renamed `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def register() -> None:
    """Make `NAME` known to transformers; again and again does no harm."""
    AttentionInterface.register(NAME, attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. Raises UnsupportedError for attention sinks."""
    if extra.get("s_aux") is not None:
        raise UnsupportedError("attention sinks are not supported", field=type(module).__name__)
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    forward = _IN_FLIGHT.get()
    return forward.attend(query, key, value, Call(scale, sliding_window, softcap)), None
