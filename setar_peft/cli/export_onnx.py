"""Write a detector as one ONNX graph, for onnxruntime without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from setar_peft.detection.detector import OODDetector
from setar_peft.detection.onnx import OnnxDtype, check_packages, export_detector


def export_onnx(
    detector: Annotated[str, typer.Argument(help="Folder or Hub name of the detector.")],
    output: Annotated[Path, typer.Argument(help="New folder for model.onnx and detector.json.")],
    dtype: Annotated[OnnxDtype, typer.Option(help="What the model computes in.")] = "float32",
) -> None:
    """Write a detector as one ONNX graph, for onnxruntime without PyTorch.

    The graph holds the model with its adapter merged, the classes, the score and the threshold. It is written only if
    onnxruntime gives with it what the model gives, on pictures or texts and on noise. `docs/onnx.md` says how to use
    it.

    **Examples**

    ```
    setar export-onnx street-detector street-onnx
    setar export-onnx you/street-detector street-onnx --dtype float16
    ```
    """
    check_packages()
    typer.echo(export_detector(OODDetector.from_pretrained(detector), output, dtype))
