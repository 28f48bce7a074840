"""Whether our Triton kernels may stand in for torch's operations on a tensor.

They are for decoding on CUDA. Without triton, with gradients, or under SPECDEC_FUSED=0, torch does the work.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

SWITCH = "SPECDEC_FUSED"  # "0" leaves the kernels out
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def installed() -> bool:
    """Is triton there, and nobody against it?"""
    return os.environ.get(SWITCH, "1") != "0" and importlib.util.find_spec("triton") is not None


def applies(x: Tensor) -> bool:
    """May kernels take this tensor?"""
    return x.is_cuda and x.dtype in DTYPES and not torch.is_grad_enabled() and installed()
