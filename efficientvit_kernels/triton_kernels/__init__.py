"""Triton kernels, one module per op, imported at an op's first call. `ops/_python_ops.py` registers them with torch."""
