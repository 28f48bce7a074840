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
OVERLAP = "SPECDEC_OVERLAP"  # "0" lets no kernel start before the last is done, "2" lets more than one
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def applies(x: Tensor) -> bool:
    """May kernels take this tensor of floats? Not where gradients are wanted."""
    return x.is_cuda and x.dtype in DTYPES and not torch.is_grad_enabled() and runs(x.device)


def runs(device: torch.device) -> bool:
    """Do the kernels serve tensors on this device? On CPUs torch does."""
    return device.type == "cuda" and _works(device)


def power(least: int, size: int) -> int:
    """`size` rounded up to a power of two that is at least `least`: what a kernel's blocks are cut in."""
    return max(least, 1 << (size - 1).bit_length())


@functools.cache
def overlaps() -> bool:
    """May a kernel start while the one before it still runs? From sm_90 on."""
    return (
        os.environ.get(OVERLAP, "1") != "0"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (9, 0)
    )


def overlaps_further() -> bool:
    """May a kernel start while the one before it still waits? Not measured yet, so only where asked for."""
    return overlaps() and os.environ.get(OVERLAP) == "2"


def launching() -> dict[str, bool]:
    """What every launch is given beside its sizes."""
    return {"enable_fp_fusion": True} | ({"launch_pdl": True} if overlaps() else {})


@functools.cache
def _works(device: torch.device) -> bool:
    """Triton needs a driver and a C compiler that take its kernels; a walk down two nodes tells."""
    if os.environ.get(SWITCH, "1") == "0" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from specdec.fused import keys
        from specdec.fused.walk import walk

        keys.settle_all()
        pair = torch.arange(2, device=device)[None]
        tree = (pair, pair * 0, pair, 2 * pair + 1, pair[0, 1:] + 1)
        return walk(*tree, pair + 1, 2)[2].tolist() == [[1, 2]]
    except Exception:  # whatever a missing or broken package does, torch still runs
        return False
