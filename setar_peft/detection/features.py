"""One pass of a model over inputs: features, logits and scores, of the model or of several of its adapters at once.

Scores are computed some inputs at a time, so that the local logits of a set (inputs x patches x classes) never exist as
a whole, nor those of a batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from setar_peft.backbones import Backbone, ClassWeights, ImageFeatures, Logits
from setar_peft.data.inputs import InputBatch, Inputs
from setar_peft.detection.adapters import AS_IT_IS, adapter_in_use, blocks_below_adapters, check_adapters
from setar_peft.detection.scoring import Reading, Score, ScoresInUse
from setar_peft.objectives.base import evaluation_mode
from setar_peft.objectives.class_prompts import ClassPrompts
from setar_peft.objectives.loss import LOCAL_LOGITS_CHUNK

# A model is read by one thread at a time: what runs to its first block is ended by a hook there.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class Outputs(NamedTuple):
    """What a model says of the inputs of a batch that could be read; on the CPU.

    Attributes:
        features: Features as the class weights take them, (n, d), float32.
        top: Indices of the likeliest classes, the likeliest first, (n, k), int64.
        probabilities: Softmax of the model's own logits at those, (n, k), float32.
        scores: Name of a score -> (n,) float32; higher means more in-distribution.
    """

    features: Tensor
    top: Tensor
    probabilities: Tensor
    scores: dict[str, Tensor]


class Reader:
    """Reads inputs with a model that is in evaluation mode; see `reading`.

    Attributes:
        backbone: Of the model.
        classes: By name of a variant of the model, the map from its features to logits.
    """

    def __init__(
        self, model: nn.Module, backbone: Backbone, adapters: Mapping[str, str | None], classes: Any, *, layers: bool
    ) -> None:
        self._model, self._adapters, self._layers = model, dict(adapters), layers
        self.backbone = backbone
        self._tower = backbone.towers[backbone.input_tower]
        if layers:
            self._tower.check_has_class_token()
        self._shared = blocks_below_adapters(backbone) if len(self._adapters) > 1 else 0
        self.classes: dict[str, ClassWeights] = {}
        for name, adapter in self._adapters.items():
            with adapter_in_use(model, adapter):
                weights = classes if isinstance(classes, ClassWeights) else classes.class_weights(backbone)
            self.classes[name] = weights

    def batches(self, inputs: Inputs) -> Iterator[tuple[InputBatch, dict[str, ImageFeatures]]]:
        """Batch by batch, what could be read, and by variant of the model the features as the class weights take them.

        There are no features where nothing of a batch could be read.
        """
        for batch in inputs.readable_batches():
            yield batch, self.features(batch)

    def features(self, batch: InputBatch) -> dict[str, ImageFeatures]:
        """By variant of the model the features of what could be read of a batch; empty where nothing could."""
        if batch.inputs is None:
            return {}
        state = self._tower.start(self.backbone.on_device(batch.inputs), layers=self._layers)
        state = self._tower.advance(state, self._shared)
        features = {}
        for name, adapter in self._adapters.items():
            with adapter_in_use(self._model, adapter):
                features[name] = self.backbone.embedded(self._tower.end(state))
        return features

    def readings(self, name: str, features: ImageFeatures, labels: Tensor, *, local: bool) -> Iterator[Reading]:
        """What scores read, some inputs at a time, so that local logits stay small.

        Args:
            name: Of the variant of the model.
            features: Of a batch.
            labels: Of the batch, (n,).
            local: Whether local logits are wanted.
        """
        classes = self.classes[name]
        step = len(features.pooled)
        if local:
            numel = features.local.shape[1] * len(classes.weight)
            step = max(1, LOCAL_LOGITS_CHUNK.get(features.local.device.type, 2**24) // max(1, numel))
        for start in range(0, len(features.pooled), step):
            part = features.part(slice(start, start + step))
            yield Reading(classes.logits_of(part, local=local), part, labels[start : start + step], classes)

    def settings(self, name: str, score: Score, given: Mapping[str, Any]) -> dict[str, Any]:
        """Every setting of a score, as plain values, of a variant of the model."""
        settings = score.settings(float(self.classes[name].scale), given)
        return {key: value.item() if isinstance(value, Tensor) else value for key, value in settings.items()}

    def outputs(self, name: str, features: ImageFeatures, scores: ScoresInUse, top_k: int = 1) -> Outputs:
        """Predictions and scores of the inputs of a batch.

        Args:
            name: Of the variant of the model.
            features: Of the batch.
            scores: Name -> score, and its settings in full.
            top_k: How many of the likeliest classes are wanted.

        Raises:
            ValueError: If a score reads what is not there.
        """
        local = any(score.needs_local for score, _ in scores.values())
        unlabelled = torch.full((len(features.pooled),), -1)
        top, probabilities, values = [], [], []
        for logits, part, *_ in self.readings(name, features, unlabelled, local=local):
            # Stable: between equal logits the first class is the prediction, as `argmax` has it.
            order = logits.pooled.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
            top.append(order)
            probabilities.append(logits.pooled.softmax(-1).gather(-1, order))
            computed = [score(logits, part, **settings) for score, settings in scores.values()]
            values.append(torch.stack(computed) if computed else logits.pooled.new_zeros(0, len(part.pooled)))
        by_score = torch.cat(values, dim=1).cpu()
        return Outputs(
            features.pooled.cpu(),
            torch.cat(top).cpu(),
            torch.cat(probabilities).cpu(),
            dict(zip(scores, by_score, strict=True)),
        )


@contextmanager
def reading(
    model: nn.Module,
    classes: ClassPrompts | ClassWeights,
    *,
    layers: bool = False,
    adapters: Mapping[str, str | None] | None = None,
) -> Iterator[Reader]:
    """A model in evaluation mode and without gradients, ready to read inputs; it is left as it was.

    Args:
        model: A stock model of a known family, or a PEFT model, whose active adapters compute.
        classes: The classes, whose prompts are encoded once for each variant of the model; or the map from features to
            logits that is known already, on the model's device.
        layers: Whether the features after each block are wanted.
        adapters: Variants of a PEFT model that read in one pass: name -> name of the adapter, or None for the base
            without any. Blocks below the first truncated layer are run once for all.

    Raises:
        ValueError: If the model's family is not known, an adapter is unknown or merged, or the classes are not the
            model's.
    """
    variants = {AS_IT_IS: AS_IT_IS} if adapters is None else adapters
    check_adapters(model, variants.values())
    with _LOCKS.setdefault(model, threading.RLock()), evaluation_mode(model) as (backbone, _):
        yield Reader(model, backbone, variants, classes, layers=layers)


def outputs_of(
    reader: Reader,
    batch: InputBatch,
    inputs: Inputs,
    scores: ScoresInUse,
    top_k: int,
) -> tuple[list[int], Outputs | None, dict[int, str]]:
    """What a model says of a batch whose inputs may be anything.

    Args:
        reader: The model, in one variant.
        batch: The batch.
        inputs: What the batch is of.
        scores: Name -> score, and its settings in full.
        top_k: How many of the likeliest classes are wanted.

    Returns:
        Places in `inputs` of what the model took, what it says of those, and by place why others cannot be read, are
        refused, or have a score that is not finite.
    """
    errors, outputs = dict(batch.errors), None
    batch, features = _taken(reader, batch, inputs, errors)
    for variant, read in features.items():
        outputs = reader.outputs(variant, read, scores, top_k)
        finite = torch.stack([values.isfinite() for values in outputs.scores.values()]).all(0).tolist()
        for number, is_finite in zip(batch.numbers, finite, strict=True):
            if not is_finite:
                errors[number] = (
                    f"{inputs.name(number)} has a score of NaN or infinity; look for an overflow in the model."
                )
    return batch.numbers, outputs, errors


def _taken(
    reader: Reader, batch: InputBatch, inputs: Inputs, errors: dict[int, str]
) -> tuple[InputBatch, dict[str, ImageFeatures]]:
    """What the model takes of a batch, and its features; why it refuses the others goes to `errors`."""
    try:
        return batch, reader.features(batch)
    except ValueError:
        for number in batch.numbers:
            refusal = _refusal(reader, inputs, number)
            if refusal is not None:
                errors[number] = f"{inputs.name(number)} is refused: {refusal}"
        # Read anew: texts were padded to the longest.
        batch = _batch_of(inputs, [number for number in batch.numbers if number not in errors])
        return batch, reader.features(batch)


def _batch_of(inputs: Inputs, numbers: list[int]) -> InputBatch:
    """Some inputs of a batch, as a batch of their own."""
    if not numbers:
        return InputBatch([], None, inputs.labels[:0], {})
    with closing(inputs.select(numbers).readable_batches()) as batches:
        return next(batches)._replace(numbers=numbers)


def _refusal(reader: Reader, inputs: Inputs, number: int) -> str | None:
    """Why the model does not take an input; None if it does."""
    try:
        reader.features(_batch_of(inputs, [number]))
    except ValueError as error:
        return str(error)
    return None


def image_logits(
    model: nn.Module, classes: ClassPrompts | ClassWeights | Any, inputs: Tensor | Mapping[str, Tensor]
) -> Logits:
    """Global and local logits of one batch, in evaluation mode and without gradients.

    Args:
        model: A stock model of a known family, or a PEFT model.
        classes: The classes, whose prompts are encoded anew in each call, or an `Objective`, which has them; or the map
            from features to logits.
        inputs: Pixel values (images, channels, height, width), or the model's inputs by name, as its processor gives
            them; on any device.

    Returns:
        Global logits (images, classes) and local logits (images, patches, classes), float32, on the model's device.

    Raises:
        ValueError: If the family of the model is not known, or the images do not fit it.
    """
    with reading(model, classes) as reader:
        (weights,) = reader.classes.values()
        return reader.backbone.logits(inputs, weights)
