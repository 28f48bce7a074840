"""Counters by which programs that share a piece of work find out who of them is done last."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

COUNTERS = 2**14  # of one launch; far more pieces than are worth sharing on any device


@functools.cache
def turns(device: torch.device) -> Tensor:
    """int32 [COUNTERS], zeros: launches leave them so, and no two of a device run at once.

    Never freed: captured launches hold its address.
    """
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
