"""Triton kernels, one module per op, imported at an op's first call. `ops/_triton.py` registers them with torch."""
