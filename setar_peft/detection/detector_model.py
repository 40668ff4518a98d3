"""The model of a saved detector: its one adapter, or all of it, with the digests by which it is known again."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from setar_peft.backbones import base_of, model_classes
from setar_peft.backbones.loading import load_base
from setar_peft.detection.adapters import active_adapters
from setar_peft.hub.card import CARD_NAME
from setar_peft.hub.detector_files import DETECTOR_NAME, DetectorFiles
from setar_peft.hub.digests import adapter_digest, base_tensors, model_digest, tensors_digest
from setar_peft.tuner.adapter_file import file_digest

# What may be asked of transformers for others; it downloads code for other names.
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
_WEIGHTS = ("adapter_model.*", "model.safetensors", "model-*.safetensors", "pytorch_model*.bin")


class ModelFacts(NamedTuple):
    """What tells a detector's model from others; fields of `DetectorFiles`."""

    model_type: str
    model_class: str
    dtype: str
    attention: str
    base_sha256: str
    adapter_sha256: str | None

    @classmethod
    def of(cls, model: nn.Module) -> ModelFacts:
        """The facts of a model with one active adapter or without any.

        Raises:
            ValueError: If an adapter is merged or switched off, or several are active.
        """
        base, adapter = base_of(model), active_adapter(model)
        tensors = base_tensors(model)
        return cls(
            base.config.model_type,
            _class_of(base),
            _dtype_of(tensors),
            _attention_of(base),
            tensors_digest(tensors),
            None if adapter is None else adapter_digest(model, adapter),
        )


def active_adapter(model: Any) -> str | None:
    """The name of the one active adapter; None for a model without adapters.

    Raises:
        ValueError: If several are active, or they are switched off.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        return None
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "The model's adapters are switched off, so that it is not said whether the detector has one. Save or load "
            "it outside of disable_adapter(), or take the adapters out: model.unload()."
        )
    names = sorted(active_adapters(model))
    if len(names) != 1:
        raise ValueError(
            f"The model has the active adapters {', '.join(names) or '(none)'}, and a detector is saved with one. "
            f"Choose it, model.set_adapter(name), and make the detector with that."
        )
    return names[0]


def save_detector_model(model: Any, folder: Path) -> None:
    """Write a model's active adapter, or the model where it has none, into a folder, with the adapter's card.

    A card that is there is brought up to date.
    """
    adapter = active_adapter(model)
    if adapter is not None and not base_of(model).name_or_path:
        warnings.warn(
            "The base model does not say where it came from (its name_or_path is empty), so that the detector can only "
            "be loaded with the base given: OODDetector.from_pretrained(folder, model=base).",
            UserWarning,
            stacklevel=5,
        )
    if not isinstance(model, PeftModel):  # transformers writes the adapter alone, where there is one
        model.save_pretrained(folder)
        return
    assert adapter is not None
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as work:
        # PEFT puts every adapter but the one called "default" into a folder of its own.
        top = Path(work)
        place = top if adapter == "default" else top / adapter
        place.mkdir(exist_ok=True)
        for target in {top, place}:
            if (folder / CARD_NAME).is_file():
                shutil.copy(folder / CARD_NAME, target)
        # Its default asks the Hub whether the base's vocabulary was changed; no tokens are added to a detector's.
        model.save_pretrained(work, selected_adapters=[adapter], save_embedding_layers=False)
        for source in (top, place):
            for path in source.iterdir():
                if path.is_file():
                    path.replace(folder / path.name)


def load_detector_model(files: DetectorFiles, folder: Path, model: Any = None, device: Any = None) -> Any:
    """The model that a detector was made with.

    Args:
        files: The detector's.
        folder: Its folder.
        model: The base, or the base with the detector's adapter; by default what the folder holds or its adapter names.
        device: Where to put it; by default where it is.

    Raises:
        ValueError: If it is another model, or one with another adapter, or cannot be loaded.
    """
    if files.model_class not in model_classes(files.model_type):
        raise ValueError(
            f"{folder} was made with a {files.model_class} (model type {files.model_type!r}), which is no known "
            "backbone. Update setar_peft, or copy or download the detector again."
        )
    config: Any = None
    if files.adapter_sha256 is not None:
        config = PeftConfig.from_pretrained(str(folder))
    if model is None:
        name = str(folder) if config is None else config.base_model_name_or_path
        if not name:
            raise ValueError(f"The adapter in {folder} names no base model; give it, model=...")
        settings = {"dtype": getattr(torch, files.dtype)}
        if files.attention in _ATTENTIONS:
            settings["attn_implementation"] = files.attention
        if config is not None and config.revision:
            settings["revision"] = config.revision
        model = load_base(name, files.model_class, f"The detector in {folder}", **settings)
    adapter = active_adapter(model)
    _check_base(files, model, folder)
    if config is not None and adapter is None:
        model = _with_adapter(model, folder, getattr(torch, files.dtype))
        adapter = active_adapter(model)
    found = None if adapter is None else adapter_digest(model, adapter)
    if found != files.adapter_sha256:
        what = "no adapter" if found is None else f"another adapter ({adapter!r})"
        wanted = "the adapter in its folder" if files.adapter_sha256 else "no adapter"
        raise ValueError(
            f"The model has {what}, and the detector in {folder} was fitted with {wanted}, so that its threshold does "
            "not hold. Give the base model, or leave model out."
        )
    return model if device is None else model.to(device)


def _with_adapter(base: Any, folder: Path, dtype: torch.dtype) -> PeftModel:
    model = PeftModel.from_pretrained(base, str(folder))
    # PEFT makes factors float32; in a model that was made half precision as a whole they were not.
    dtypes = {tensor.dtype for tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).values()}
    return model.to(dtype) if dtypes == {dtype} else model


def check_nothing_is_lost(folder: Path, unfinished: Path) -> None:
    """Check that saving into a folder replaces no weights but those of an older detector.

    Raises:
        ValueError: If the folder holds a model or adapter of its own that is not the one to be saved.
    """
    if (folder / DETECTOR_NAME).is_file():
        return
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        new = unfinished / path.name
        if not new.is_file() or file_digest(new) != file_digest(path):
            raise ValueError(
                f"{folder} holds a model or adapter that is not this detector's ({path.name}); give another folder, or "
                "empty this one."
            )


def _check_base(files: DetectorFiles, model: Any, folder: Path) -> None:
    base = base_of(model)
    if getattr(base.config, "model_type", None) != files.model_type or _class_of(base) != files.model_class:
        raise ValueError(
            f"The model is a {type(base).__name__}, and the detector in {folder} was made with a {files.model_class}. "
            "Give that, or leave model out."
        )
    dtype = _dtype_of(base_tensors(model))
    if dtype != files.dtype:
        raise ValueError(
            f"The model's weights are {dtype}, and the detector in {folder} was made in {files.dtype}, in which its "
            f"scores are others. Load the model with dtype=torch.{files.dtype}, or leave model out."
        )
    if model_digest(model) != files.base_sha256:
        raise ValueError(
            f"The model is not the one that the detector in {folder} was made with: the digest of its weights is "
            "another one, so that neither text bank nor threshold are the model's. Load the base that its adapter "
            "names, or leave model out."
        )
    if _attention_of(base) != files.attention:
        warnings.warn(
            f"The model computes its attention by {_attention_of(base)!r}, and the detector in {folder} was made with "
            f"{files.attention!r}: its scores may differ in their last digits.",
            UserWarning,
            stacklevel=4,
        )


def _class_of(base: Any) -> str:
    """The class of a known family that a model is of."""
    known = model_classes(base.config.model_type)
    return next((kind.__name__ for kind in type(base).__mro__ if kind.__name__ in known), type(base).__name__)


def _attention_of(base: Any) -> str:
    return str(getattr(base.config, "_attn_implementation", None) or "eager")


def _dtype_of(tensors: dict[str, torch.Tensor]) -> str:
    first = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    return str(first).removeprefix("torch.")
