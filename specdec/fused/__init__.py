"""Triton kernels that do in one launch what torch does in many; imported lazily."""
