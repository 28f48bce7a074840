"""A short name for one target's weights: sizes and a sample of its output embedding, hashed.

A head stores the fingerprint of the target it was trained on. The sample is rounded to bfloat16 first: the
same model loaded in another dtype keeps its name.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SAMPLES = 4096


def fingerprint(output_embedding: Tensor, layers: int) -> str:
    """sha256 in hex over (vocab, hidden, layers) and a strided sample of the LM head's matrix [V, H]."""
    vocab, hidden = output_embedding.shape
    flat = output_embedding.detach().reshape(-1)
    stride = max(flat.numel() // SAMPLES, 1) | 1  # odd, so that it walks across columns
    sample = flat[::stride].to(device="cpu", dtype=torch.bfloat16).contiguous()
    digest = hashlib.sha256(f"{vocab},{hidden},{layers};".encode())
    digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
