"""Attention of tree rows over a slot cache: one protocol, several backends."""
