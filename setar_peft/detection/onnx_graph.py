"""A model, a score and a threshold as one module that torch.export can follow."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from setar_peft.backbones import Backbone, ClassWeights, backbone_of, base_of, named_inputs
from setar_peft.detection.scoring import Score


class GraphOutputs(NamedTuple):
    """What a graph gives.

    Attributes:
        score: (n,) float32.
        is_id: (n,) bool: whether the score is at least the threshold.
        label: (n,) int64: the class of the largest logit.
        logits: (n, classes) float32.
    """

    score: Tensor
    is_id: Tensor
    label: Tensor
    logits: Tensor


# What one file can hold, a protocol buffer, with room for the graph itself.
LARGEST_FILE = 2**31 - 2**26


class DetectorGraph(nn.Module):
    """Inputs, by position, to `GraphOutputs`; with a copy of the model, in float32 on the CPU.

    Args:
        model: A stock model of a known family, or one with adapters.
        classes: The map from its features to logits.
        score: The score.
        settings: All its settings.
        threshold: An input with a score of at least this is in-distribution.
        example: Inputs by name, one or more, as the model's processor makes them; pixel values may be alone.

    Attributes:
        backbone: Of the copy.
        example: The inputs, checked.
        settings: The score's settings as plain values.
        threshold: As the smallest float32 that is not below it, so that float32 scores compare with it as with the
            number itself.

    Raises:
        ValueError: If the model cannot be copied or exported, or does not take the example.

    Warns:
        UserWarning: If the model does not compute in float32.
    """

    threshold: Tensor

    def __init__(
        self,
        model: nn.Module,
        classes: ClassWeights,
        score: Score,
        settings: Mapping[str, Any],
        threshold: float,
        example: Tensor | Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.model: Any = _twin(model)
        self.score = score
        self.backbone: Backbone = backbone_of(self.model)
        self.example = self.backbone.on_device(named_inputs(example))
        if "spatial_shapes" in self.example:
            raise ValueError(
                f"{type(self.model).__name__} resizes its positions image by image, each to its own height and width, "
                "which one graph for batches of any size cannot do. Take a SigLIP with images of one size: SiglipModel."
            )
        held = (part.detach().cpu() if isinstance(part, Tensor) else part for part in classes)
        self.classes = ClassWeights(*held)  # type: ignore[arg-type] # field by field
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in settings.items()}
        self.settings: dict[str, Any] = plain
        nearest = np.float32(threshold)
        # As Python's number, for numpy would compare with it in float32.
        exact = nearest if float(nearest) >= threshold else np.nextafter(nearest, np.float32(np.inf))
        self.register_buffer("threshold", torch.tensor(exact))

    def forward(self, *values: Tensor) -> GraphOutputs:
        """GraphOutputs of inputs in the order of the example's."""
        dtype = next(self.model.parameters()).dtype
        inputs = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in zip(self.example, values, strict=True)
        }
        features = self.backbone.embedded(self.backbone.image_features(inputs, layers=self.score.needs_layers))
        logits = self.classes.logits_of(features, local=self.score.needs_local)
        score = self.score(logits, features, **self.settings)
        return GraphOutputs(score, score >= self.threshold, logits.pooled.argmax(-1), logits.pooled)

    def merge(self, dtype: torch.dtype) -> None:
        """Merge the active adapters, in float32, and have the model compute in the dtype.

        Raises:
            ValueError: If an adapter cannot be merged.
        """
        for layer in self.model.modules():
            if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
                continue
            if set(layer.active_adapters) - set(layer.merged_adapters):
                layer.merge(safe_merge=True)
        self.model.to(dtype)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the graph; weights past `LARGEST_FILE` go to `<path>.data`.

        Args:
            path: The file.
            metadata: What the graph carries, name -> text.

        Raises:
            ValueError: If torch cannot follow the model, the score, or a custom layer.
        """
        # Sizes of 0 and 1 would be constants to torch.
        values = [value[torch.arange(2) % len(value)] for value in self.example.values()]
        axes: dict[int, Any] = {0: torch.export.Dim("batch")}
        if self.backbone.kind == "text":
            values = [value[:, torch.arange(max(4, value.shape[1])) % value.shape[1]] for value in values]
            axes[1] = torch.export.Dim("length", min=3, max=self.backbone.longest_text)  # type: ignore[attr-defined]
        names = {axis: str(size.__name__) for axis, size in axes.items()}
        try:
            with torch.no_grad(), _quiet():
                program = torch.export.export(
                    self.eval(), tuple(values), dynamic_shapes=(tuple(axes for _ in values),), strict=False
                )
                exported: Any = torch.onnx.export(
                    program,
                    input_names=list(self.example),
                    output_names=list(GraphOutputs._fields),
                    dynamic_shapes=(tuple(names for _ in values),),
                    dynamo=True,
                    verbose=False,
                )
        except Exception as error:
            name = type(self.model).__name__
            raise ValueError(
                f"torch {torch.__version__} cannot follow {name} with the score {self.score.name}, so that nothing was "
                f"written: {_root_of(error)}. (A score's function reads sizes off tensor.shape: to torch.export what "
                "len() or .item() gives is a constant.)"
            ) from error
        for part in exported.model.graph.all_nodes():
            part.metadata_props.clear()  # stack traces, with the paths of this machine
        exported.model.metadata_props.update(metadata)
        weights = sum(value.const_value.nbytes for value in exported.model.graph.initializers.values())
        exported.save(path, external_data=weights > LARGEST_FILE)


def _root_of(error: BaseException) -> str:
    """What went wrong first, in a line or two."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return " ".join(str(error).split("\n\n")[0].split()).rstrip(".")[:500] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch has to say about itself while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the model beneath its PEFT wrapper, frozen, in evaluation mode and float32, on the CPU."""
    base: nn.Module = base_of(model)
    parameters = list(base.parameters())
    if getattr(base, "is_quantized", False):
        raise ValueError(
            f"This {type(base).__name__} is quantised, and a graph cannot hold its weights as they are. Put the "
            "adapter on the base model in float32 or bfloat16, and export that."
        )
    if any(parameter.is_meta for parameter in parameters) or len({parameter.device for parameter in parameters}) > 1:
        raise ValueError(
            f"This {type(base).__name__} is offloaded or spread over several devices. Load it on one to export it, "
            "without device_map."
        )
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters} - {"float32"}
    if dtypes:
        warnings.warn(
            f"This {type(base).__name__} computes in {', '.join(sorted(dtypes))}, and the graph does not: its scores "
            "differ from those that the threshold was found on by that rounding. Fit the detector with the model in "
            "float32, and export that.",
            UserWarning,
            stacklevel=4,
        )
    backbone_of(base)  # before the memory is spent
    twin = copy.deepcopy(base)
    return twin.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
