"""What `import efficientvit_kernels` adds to `import torch`: the goal is 50 ms. python -m benchmarks.import_time"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

CODE = """
import time, torch
start = time.perf_counter()
import efficientvit_kernels
package = time.perf_counter()
from efficientvit_kernels import FusedLiteMLA, accelerate, relu_linear_attention
print(package - start, time.perf_counter() - start)
"""


def main() -> None:
    runs = []
    for _ in range(15):
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        runs.append([1e3 * float(text) for text in result.stdout.split()])
    figures = {
        "import_ms": round(statistics.median(run[0] for run in runs), 2),
        "import_with_every_public_name_ms": round(statistics.median(run[1] for run in runs), 2),
        "samples_ms": [[round(value, 2) for value in run] for run in runs],
    }
    output = Path(__file__).parent / "results" / "import_time.json"
    output.write_text(json.dumps(figures) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
