"""What a machine with a GPU runs: facts, correctness, sanitizers, repeats, run-time behaviour, benchmarks.

`python -m benchmarks.gpu all` runs every part; each is a command of its own, takes less than ten minutes, keeps what it
has in one JSON and can be resumed. See docs/gpu-status.md.
"""
