"""What one weight's decomposition takes and how exact it is: an SVD in float32, and its Gram matrix in float64.

The first is the greedy search's on a CPU, the second that of a screened one and of every search on a GPU. Beside the
decomposition itself: what a search asks of it, for one ratio. How exact it is, the kept part says beside the one that
LAPACK computes in float64.

    python -m benchmarks.decompositions                            # W_up of CLIP-B, 3072 x 768, on a GPU
    python -m benchmarks.decompositions --device cpu --threads 1   # the same on one core
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import described, median_seconds
from setar_peft.decomposition import decompose

ROUTES = {"svd_float32": False, "gram_float64": True}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="of the model; W_up has four times as many rows")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of components removed")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the processor")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; install a CUDA build of torch, or give --device cpu.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weight = torch.randn(4 * options.width, options.width)
    exact = decompose(weight.double()).kept(options.ratio)
    weight, gradient = weight.to(options.device), torch.randn_like(weight).to(options.device)
    gram = weight.double().T @ weight.double()
    seconds: dict[str, dict[str, float]] = {}
    distances: dict[str, float] = {}
    for name, by_gram in ROUTES.items():
        found = decompose(weight, by_gram=by_gram)
        work: dict[str, Callable[[], object]] = {
            "decompose": lambda by_gram=by_gram: decompose(weight, by_gram=by_gram),  # type: ignore[misc]
            "kept": lambda found=found: found.kept(options.ratio),  # type: ignore[misc]
            "residual": lambda found=found: found.residual(options.ratio),  # type: ignore[misc]
            "contributions": lambda found=found: found.contributions(gradient),  # type: ignore[misc]
        }
        seconds[name] = {what: median_seconds(options.device, call) for what, call in work.items()}
        kept = found.kept(options.ratio).cpu().double()
        distances[name] = float(torch.linalg.vector_norm(kept - exact) / torch.linalg.vector_norm(exact))
    seconds["gram_float64"]["of_it_eigenvectors"] = median_seconds(options.device, lambda: torch.linalg.eigh(gram))
    for name, of_route in seconds.items():
        taken = ", ".join(f"{what} {1e3 * value:.2f} ms" for what, value in of_route.items())
        print(f"{name}: {taken}; kept part within {distances[name]:.1e} of the exact one", flush=True)
    svd, by_gram = seconds["svd_float32"], seconds["gram_float64"]
    ratios = {what: svd[what] / by_gram[what] for what in svd}
    nearer = distances["svd_float32"] / distances["gram_float64"]
    listed = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
    print(f"svd_float32 / gram_float64: {listed}; distance {nearer:.1f}")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        figures = {
            "settings": settings,
            "machine": described(options.device),
            "seconds": seconds,
            "ratios": ratios,
            "distance_from_float64": distances,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
