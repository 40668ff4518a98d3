"""Checks of an adapter's tensors: that they agree with its config, fit this model, and came from this base."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from setar_peft.decomposition import Residual, base_agreement, residual_rank

if TYPE_CHECKING:
    from setar_peft.tuner.layer import SeTARLayer

_PREFIX = "base_model.model."
_FROZEN = ("setar_A0", "setar_B0", "setar_ratio")
_TRAINED = ("setar_A", "setar_B")
# A rounded base (bfloat16, 8-bit) moves the agreement by a few thousandths; another base moves it to about 0.
_BASE_TOLERANCE = 0.05


def check_other_tensors(
    others: Mapping[str, tuple[int, ...]], modules_to_save: Iterable[str], model: nn.Module
) -> None:
    """Check the tensors of an adapter's file that are no factors: they may fill what PEFT trains in full, nothing else.

    PEFT loads whatever name it finds, so that a file could otherwise overwrite the base.

    Args:
        others: Name -> shape.
        modules_to_save: The config's suffixes of modules that are trained in full.
        model: The base model, with or without adapters.

    Raises:
        ValueError: If a tensor is missing, unexpected, or of another shape than the model's.
    """
    suffixes = tuple(modules_to_save)
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if name.endswith(suffixes) and ".original_module" not in name and ".modules_to_save" not in name:
            original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            expected |= {f"{name}.{key}": tuple(value.shape) for key, value in original.state_dict().items()}
    allowed = expected | _embedding_shapes(model)
    found = {name for name in others if name in expected or name not in allowed}
    _check_names(set(expected), found)
    for name, shape in others.items():
        if shape != allowed[name]:
            raise ValueError(f"{name} has shape {shape} in the adapter's file, and {allowed[name]} in this model.")


def check_adapter_tensors(
    tensors: Mapping[str, Tensor], rank_ratios: Mapping[str, float], *, finetune: bool
) -> dict[str, tuple[int, int]]:
    """Check the tensors of an adapter, named as in its file, against the ratios in its config.

    Args:
        tensors: Name -> tensor.
        rank_ratios: Module name -> ratio.
        finetune: Whether trained factors B, A are expected.

    Returns:
        Module name -> (m, n) of its weight.

    Raises:
        ValueError: If a tensor is missing, unexpected, of a wrong shape or dtype, or not finite.
    """
    tensors = unprefixed(tensors)
    # Where no component is removed there is nothing to train.
    kinds = {
        module: (*_FROZEN, *_TRAINED) if finetune and _has_components(tensors, module) else _FROZEN
        for module in rank_ratios
    }
    expected = {f"{module}.{kind}" for module in rank_ratios for kind in kinds[module]}
    _check_names(expected, {name for name in tensors if is_factor(name)})
    shapes = {}
    for module, ratio in rank_ratios.items():
        b0, a0 = tensors[f"{module}.setar_B0"], tensors[f"{module}.setar_A0"]
        if b0.dim() != 2 or a0.dim() != 2 or b0.shape[1] != a0.shape[0]:
            raise ValueError(
                f"the factors of {module} have shapes {tuple(b0.shape)} and {tuple(a0.shape)}; they must be (m, r) and "
                "(r, n). The file is damaged: copy or download the adapter again."
            )
        shape = (b0.shape[0], a0.shape[1])
        rank = residual_rank(shape, ratio)
        if b0.shape[1] != rank:
            raise ValueError(
                f"the factors of {module} have rank {b0.shape[1]}, but ratio {ratio} of a weight {shape} removes "
                f"{rank} components. adapter_config.json and adapter_model.safetensors do not belong together."
            )
        stored = tensors[f"{module}.setar_ratio"]
        if stored.numel() != 1 or not math.isclose(float(stored), ratio, abs_tol=5e-3):
            raise ValueError(
                f"the file gives {module} the ratio {stored.tolist()}, adapter_config.json gives {ratio}. "
                "The two files do not belong together."
            )
        if kinds[module] != _FROZEN:
            for kind, like in (("setar_B", b0), ("setar_A", a0)):
                trained = tensors[f"{module}.{kind}"]
                if trained.shape != like.shape:
                    raise ValueError(f"{module}.{kind} has shape {tuple(trained.shape)}; expected {tuple(like.shape)}.")
        for kind in kinds[module]:
            tensor = tensors[f"{module}.{kind}"]
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{module}.{kind} ({tensor.dtype}) does not hold finite floating-point values. "
                    "The file is damaged: copy or download the adapter again."
                )
        shapes[module] = shape
    return shapes


def check_names(tensors: Iterable[str], model: nn.Module) -> None:
    """Check that tensors about to be loaded into an adapted model touch nothing but adapters.

    Args:
        tensors: Their names, as PEFT is about to load them.
        model: The model with the adapter in place.

    Raises:
        ValueError: If one is neither a factor, nor of a module trained in full, nor an embedding.
    """
    embeddings = {name.removeprefix(_PREFIX) for name in _embedding_shapes(model)}
    names = {name.removeprefix(_PREFIX) for name in tensors}
    _check_names(set(), {n for n in names - embeddings if not is_factor(n) and ".modules_to_save." not in f".{n}"})


def check_shapes(saved: Mapping[str, tuple[int, int]], layers: Mapping[str, SeTARLayer]) -> None:
    """Check that factors fit the layers that they are meant for.

    Args:
        saved: Module name -> (m, n) of the weight that the factors were made for.
        layers: Module name -> layer of this model.

    Raises:
        ValueError: If a layer has no factors, or they are made for another shape.
    """
    bare = sorted(set(layers) - set(saved))
    if bare:
        raise ValueError(
            f"target_modules of the saved adapter hits {', '.join(bare)}, for which it has no factors. Load the base "
            "model that the adapter was made from, and its adapter_config.json as it was saved."
        )
    for name, shape in saved.items():
        if name in layers and layers[name].shape != shape:
            raise ValueError(
                f"The adapter's factors for {name} are made for a weight {shape}, this model's is "
                f"{layers[name].shape}. Load the base model that the adapter was made from."
            )


def check_base(layers: Iterable[tuple[str, SeTARLayer, Residual]], *, strict: bool) -> None:
    """Check that residuals came from the base weights they are about to be subtracted from.

    <B0 A0, W> / ||B0 A0||^2 is 1 for the weight that the factors came from and near 0 for another.

    Args:
        layers: (module name, its layer, the residual to be loaded into it).
        strict: Raise instead of warning.

    Raises:
        ValueError: If `strict` and a residual does not fit.
    """
    misfits = []
    for name, layer, residual in layers:
        if layer.weight.is_meta or (layer.quantization_backend and not layer.quantization_backend.supports_merge):
            continue
        weight = layer.base_matrix()
        agreement = base_agreement(weight, Residual(residual.b0.to(weight.device), residual.a0.to(weight.device)))
        if not math.isnan(agreement) and abs(agreement - 1) > _BASE_TOLERANCE:
            misfits.append(f"{name}: {agreement:.3f}")
    if not misfits:
        return
    message = (
        "The adapter was made from another base model: <B0 A0, W> / ||B0 A0||^2 should be 1 and is "
        f"{'; '.join(misfits)}. Load the base model that the adapter's config names."
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, PeftWarning, stacklevel=2)


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of the base model's modules, without the prefix that PEFT saves them with."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _has_components(tensors: Mapping[str, Tensor], module: str) -> bool:
    b0 = tensors.get(f"{module}.setar_B0")
    return b0 is not None and b0.dim() == 2 and b0.shape[1] > 0


def is_factor(name: str) -> bool:
    """Whether a tensor is one of SeTAR's own."""
    return name.rpartition(".")[2].startswith("setar_")


def _embedding_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT's `save_embedding_layers` adds to a file."""
    embeddings = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # Some models have the method and no embeddings.
        with contextlib.suppress(NotImplementedError, AttributeError):
            embeddings.append(getattr(model, getter)())
    return {
        f"{name}.{key}": tuple(value.shape)
        for name, module in model.named_modules()
        if any(module is embedding for embedding in embeddings)
        for key, value in module.state_dict().items()
    }


def _check_names(expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"missing {_some(missing)}")
    if unexpected:
        parts.append(f"unexpected {_some(unexpected)}")
    raise ValueError(
        f"the tensors do not match adapter_config.json: {'; '.join(parts)}. Save the adapter again, or load the two "
        "files that were saved together."
    )


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(name[:200] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}, ... ({len(names)} in all)"
