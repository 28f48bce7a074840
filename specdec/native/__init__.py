"""Kernels in C for decoding on CPUs, compiled on the machine they run on."""
