"""Devices: which one is current, how much memory it has left, and byte counts as people read them.

Asks the device or the operating system; knows nothing of what the memory is for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from pathlib import Path

import torch

GIB = 2**30
PROC = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make it this thread's current device: Triton's kernels, streams and graphs go there whatever tensors they are
    given."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, what torch holds unused included; None where nobody says.

    On a CPU that is the memory available without swapping, within the limit of the control group.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    known = [amount for amount in (_available(PROC), _left_in_group(GROUP)) if amount is not None]
    return min(known, default=None)


def _available(path: Path) -> int | None:
    """MemAvailable of Linux, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_group(folder: Path) -> int | None:
    """What a version 2 control group still allows; None without a limit. Files that the system keeps in memory count as
    used there until somebody needs the room, and a model that was just read fills a group with them: those that no
    process has mapped are as good as free."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((folder / "memory.max").read_text())  # "max" is no number: no limit
        used = int((folder / "memory.current").read_text())
        return max(0, limit - used + _reclaimable(folder / "memory.stat"))
    return None


def _reclaimable(path: Path) -> int:
    """Bytes of unmapped files in a group's memory, by its statistics."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        stat = {name: int(amount) for name, amount in map(str.split, path.read_text().splitlines())}
        return max(0, stat["active_file"] + stat["inactive_file"] - stat["file_mapped"])
    return 0


def tensor_bytes(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> int:
    """Bytes of tensors of these shapes in one dtype.

    >>> tensor_bytes([(2, 3), (4,)], torch.bfloat16)
    20
    """
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def gib(amount: float) -> str:
    """
    >>> gib(3 * 2**29)
    '1.50 GiB'
    """
    return f"{amount / GIB:.2f} GiB" if amount < 10 * GIB else f"{amount / GIB:.1f} GiB"
