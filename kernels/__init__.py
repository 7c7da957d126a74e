"""Kernels: the packed cross-encoder, its attention, and the ranking losses."""
