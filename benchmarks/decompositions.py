"""What one weight's decomposition takes: an SVD, the route over its Gram matrix, and its eigenvectors alone.

python -m benchmarks.decompositions               # W_up of CLIP-B, 3072 x 768, on a GPU
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.machine import described, median_seconds
from setar_peft.decomposition import gram_eigenvectors


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the model; W_up has four times as many rows")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    matrix = torch.randn(4 * options.width, options.width, device=options.device)
    gram = matrix.double().T @ matrix.double()
    batch = gram.expand(4, -1, -1).contiguous()
    work = {
        "svd_float32": lambda: torch.linalg.svd(matrix, full_matrices=False),
        "gram_eigenvectors": lambda: gram_eigenvectors(matrix),
        "eigh_float64": lambda: torch.linalg.eigh(gram),
        "eigh_float64_of_a_batch_of_4": lambda: torch.linalg.eigh(batch),
    }
    seconds = {name: median_seconds(options.device, call) for name, call in work.items()}
    for name, value in seconds.items():
        print(f"{name:>28}: {1e3 * value:8.2f} ms", flush=True)
    if options.json:
        settings = {"width": options.width, "device": options.device}
        figures = {"settings": settings, "machine": described(options.device), "seconds": seconds}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
