"""python fault_call.py LIBRARY KERNEL BLOCKS THREADS SHARED A B: one launch on memory from malloc, without torch.

A sanitizer sees the ends of such memory, and needs a process of its own for each fault that it reports.
"""

from __future__ import annotations

import ctypes
import sys


def main() -> None:
    library, kernel = sys.argv[1:3]
    blocks, threads, shared, a, b = map(int, sys.argv[3:])
    memory = [(ctypes.c_float * 900)(), ctypes.c_size_t(900), (ctypes.c_float * 900)(), ctypes.c_size_t(900)]
    run = getattr(ctypes.CDLL(library), f"run_{kernel}")
    run.restype = ctypes.c_char_p
    words = run((ctypes.c_uint * 6)(blocks, 1, 1, threads, 1, 1), ctypes.c_size_t(shared), *memory, a, b)
    print(words.decode() if words else "no error")


if __name__ == "__main__":
    main()
