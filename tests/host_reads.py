"""What counts as asking the device: a twin, on the CPU, of torch.cuda.set_sync_debug_mode("error")."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING = {
    torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.nonzero,
    torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.nonzero,
    torch.Tensor.masked_select, torch.masked_select, torch.Tensor.unique, torch.tensor, torch.Tensor.new_tensor,
}  # fmt: skip
"""Python's ways; the last two copy numbers of the host to the device, which waits as well."""

OPERATORS = {
    torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default, torch.ops.aten.equal.default,
    torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default,
}  # fmt: skip
"""What they and others become; indexing only waits where an index is a mask."""


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in READING:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            index = func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
            if not index or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
                self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class HostReads:
    """A context that lists every read of a tensor on the host."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Functions(self.found), _Operators(self.found))

    def __enter__(self) -> list[str]:
        for mode in self._modes:
            mode.__enter__()
        return self.found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)
