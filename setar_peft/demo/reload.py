"""A saved adapter in a fresh process: `python -m setar_peft.demo.reload` computes logits with it, to be compared.

The process gets the base, the adapter and a file of inputs, and writes a file of logits; it shares no state with the
one that made the adapter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from setar_peft.objectives.base import evaluation_mode

_PIXELS = "pixel_values"


def fixed_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Global and local logits of fixed inputs.

    Args:
        model: A stock model or a PEFT model.
        inputs: "pixel_values" (images, channels, height, width), and the class prompts' tokens by name,
            each (classes, tokens).

    Returns:
        "pooled" (images, classes) and "local" (images, patches, classes), float32, on the CPU.
    """
    tokens = {name: value for name, value in inputs.items() if name != _PIXELS}
    with evaluation_mode(model) as (backbone, _):
        classes = backbone.class_weights(backbone.text_features(tokens))
        features = backbone.embedded(backbone.image_features(inputs[_PIXELS]))
        logits = {"pooled": classes.logits(features.pooled), "local": classes.logits(features.local)}
    return {name: value.cpu().contiguous() for name, value in logits.items()}


def logits_in_a_fresh_process(
    base: str, adapter: Path, inputs: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Load base and adapter in another process, and return its logits; see `fixed_logits`.

    Args:
        base: Folder or Hub name of the base model.
        adapter: Folder of the saved adapter.
        inputs: As in `fixed_logits`.
        device: Where the process computes.

    Raises:
        ValueError: If the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs_file, logits_file = Path(folder, "inputs.safetensors"), Path(folder, "logits.safetensors")
        save_file({name: value.cpu().contiguous() for name, value in inputs.items()}, inputs_file)
        options = {
            "base": base,
            "adapter": adapter,
            "inputs": inputs_file,
            "logits": logits_file,
            "device": device,
            # The number of threads decides how sums are cut, and so their last bits.
            "threads": torch.get_num_threads(),
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        process = subprocess.run(
            [sys.executable, "-m", "setar_peft.demo.reload", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["it said nothing"]
            raise ValueError(f"The fresh process that loads {adapter} failed: {lines[-1]}")
        return dict(load_file(logits_file))


def main(arguments: Sequence[str] | None = None) -> None:
    """Load base and adapter, compute the logits of the inputs, and write them to a file."""
    parser = argparse.ArgumentParser(prog="python -m setar_peft.demo.reload", description=main.__doc__)
    for name, meaning in (
        ("base", "folder or Hub name of the base model"),
        ("adapter", "folder of the saved adapter"),
        ("inputs", "safetensors file: pixel values and class tokens"),
        ("logits", "safetensors file to write"),
        ("device", "where to compute"),
    ):
        parser.add_argument(f"--{name}", required=True, help=meaning)
    parser.add_argument("--threads", type=int, required=True, help="torch's number of threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = CLIPModel.from_pretrained(options.base).to(options.device)
    model = PeftModel.from_pretrained(base, options.adapter)
    save_file(fixed_logits(model, load_file(options.inputs)), options.logits)


if __name__ == "__main__":
    main()
