"""Checks of an adapter's tensors: that they agree with its config, fit this model, and came from this base."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
from peft.utils import ModulesToSaveWrapper
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from setar_peft.decomposition import Residual, base_agreement, is_rounding_noise, residual_rank
from setar_peft.tuner.loading import plain_name

_PREFIX = "base_model.model."
_FROZEN = ("setar_A0", "setar_B0", "setar_ratio")
_TRAINED = ("setar_A", "setar_B")
# A rounded base (bfloat16, 8-bit) moves the agreement by a few thousandths; another base moves it to about 0.
_BASE_TOLERANCE = 0.05
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_T = TypeVar("_T")


class TensorFacts(NamedTuple):
    """What is to be known of a tensor before it is loaded.

    Attributes:
        shape: Its shape.
        dtype: Its dtype; one that no factor can have may be named as in its file.
        is_finite: Whether all its values are finite.
        scalar: Its value, where it has one element.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    is_finite: bool = True
    scalar: float | None = None

    @classmethod
    def of(cls, tensor: Tensor) -> TensorFacts:
        """The facts of a tensor."""
        known = tensor.dtype in _FLOATS
        scalar = float(tensor) if known and tensor.numel() == 1 else None
        return cls(tuple(tensor.shape), tensor.dtype, not known or all_finite(tensor), scalar)


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity; many times faster than `torch.isfinite`."""
    if tensor.numel() == 0:
        return True
    return all(math.isfinite(value) for value in torch.stack(torch.aminmax(tensor.detach())).tolist())


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
    if not suffixes and not others:
        return
    expected: dict[str, tuple[int, ...]] = {}
    for full_name, module in model.named_modules():
        name = plain_name(full_name)
        if name.endswith(suffixes) and ".original_module" not in name and ".modules_to_save" not in name:
            if name != full_name:
                raise ValueError(
                    f"{full_name} is to be trained in full and stands in a compiled or sharded model, where PEFT does "
                    "not find its tensors. Load the adapter before the model is compiled or sharded."
                )
            original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            expected |= {f"{name}.{key}": tuple(value.shape) for key, value in original.state_dict().items()}
    allowed = expected | _embedding_shapes(model)
    found = {name for name in others if name in expected or name not in allowed}
    _check_names(set(expected), found)
    for name, shape in others.items():
        if shape != allowed[name]:
            raise ValueError(
                f"{name} has shape {shape} in the adapter's file, and {allowed[name]} in this model. Load the base "
                "model that the adapter was made from."
            )


def check_adapter_tensors(
    tensors: Mapping[str, TensorFacts], rank_ratios: Mapping[str, float], *, finetune: bool
) -> dict[str, tuple[int, int]]:
    """Check the tensors of an adapter, named as in its file, against the ratios in its config.

    Args:
        tensors: Name -> what is known of the tensor.
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
        b0, a0 = tensors[f"{module}.setar_B0"].shape, tensors[f"{module}.setar_A0"].shape
        if len(b0) != 2 or len(a0) != 2 or b0[1] != a0[0]:
            raise ValueError(
                f"the factors of {module} have shapes {b0} and {a0}; they must be (m, r) and (r, n). The file is "
                "damaged: copy or download the adapter again."
            )
        shape = (b0[0], a0[1])
        rank = residual_rank(shape, ratio)
        if b0[1] != rank:
            raise ValueError(
                f"the factors of {module} have rank {b0[1]}, but ratio {ratio} of a weight {shape} removes {rank} "
                "components. adapter_config.json and adapter_model.safetensors do not belong together."
            )
        stored = tensors[f"{module}.setar_ratio"].scalar
        if stored is None or not math.isclose(stored, ratio, abs_tol=5e-3):
            raise ValueError(
                f"the file gives {module} the ratio {stored}, adapter_config.json gives {ratio}. The two files do not "
                "belong together."
            )
        if kinds[module] != _FROZEN:
            for kind, like in (("setar_B", b0), ("setar_A", a0)):
                trained = tensors[f"{module}.{kind}"].shape
                if trained != like:
                    raise ValueError(
                        f"{module}.{kind} has shape {trained}; expected {like}. The file is damaged: copy or download "
                        "the adapter again."
                    )
        for kind in kinds[module]:
            facts = tensors[f"{module}.{kind}"]
            if facts.dtype not in _FLOATS:
                raise ValueError(
                    f"{module}.{kind} has dtype {facts.dtype}; factors are float64, float32, float16 or bfloat16. Save "
                    "the adapter again in one of these, or copy or download it again if it is damaged."
                )
            if not facts.is_finite:
                raise ValueError(
                    f"{module}.{kind} does not hold finite values. The file is damaged: copy or download the adapter "
                    "again."
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


def check_shapes(saved: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Check that factors fit the layers that they are meant for.

    Args:
        saved: Module name -> (m, n) of the weight that the factors were made for.
        shapes: Module name -> (m, n) of the weight in this model.

    Raises:
        ValueError: If a layer has no factors, or they are made for another shape.
    """
    bare = sorted(set(shapes) - set(saved))
    if bare:
        raise ValueError(
            f"The saved adapter has no factors for {', '.join(bare)}. Load the base model that it was made from, and "
            "its adapter_config.json as it was saved."
        )
    for name, shape in saved.items():
        if name in shapes and shapes[name] != shape:
            raise ValueError(
                f"The adapter's factors for {name} are made for a weight {shape}, this model's is {shapes[name]}. "
                "Load the base model that the adapter was made from."
            )


def check_base(layers: Iterable[tuple[str, Tensor | None, Residual]], *, strict: bool) -> None:
    """Check that residuals came from the base weights they are about to be subtracted from.

    <B0 A0, W> / ||B0 A0||^2, over the strongest components, is 1 for the weight that the factors came from and near 0
    for another. Factors that are empty or rounding noise are passed over: they change nothing.

    Args:
        layers: (module name, its weight (m, n) or `None` where it cannot be read, the residual to be loaded into it).
        strict: Raise instead of warning.

    Raises:
        ValueError: If `strict` and a residual does not fit, or cannot be compared with its weight.
    """
    misfits, unknown = [], []
    for name, weight, residual in layers:
        if residual.rank == 0:
            continue
        if weight is None:
            unknown.append(f"{name}: its weight is not here")
            continue
        agreement = base_agreement(weight, residual)
        if abs(agreement - 1) <= _BASE_TOLERANCE or is_rounding_noise(weight, residual):
            continue
        if math.isfinite(agreement):
            misfits.append(f"{name}: {agreement:.3f}")
        else:
            unknown.append(f"{name}: its weight or factors are not finite")
    parts = []
    if misfits:
        parts.append(
            "The adapter was made from another base model: <B0 A0, W> / ||B0 A0||^2 should be 1 and is "
            f"{_some(misfits, separator='; ')}. Load the base model that the adapter's config names."
        )
    if unknown:
        parts.append(
            f"Nothing says whether the adapter was made from this base model ({_some(unknown, separator='; ')}). Load "
            "the base with its weights in memory and whole, or the adapter without strict_base."
        )
    if parts and strict:
        raise ValueError(" ".join(parts))
    if parts:
        warnings.warn(" ".join(parts), PeftWarning, stacklevel=2)


def unprefixed(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Tensors, or facts of them, by the base model's names, without the prefix that PEFT saves them with."""
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def _has_components(tensors: Mapping[str, TensorFacts], module: str) -> bool:
    b0 = tensors.get(f"{module}.setar_B0")
    return b0 is not None and len(b0.shape) == 2 and b0.shape[1] > 0


def is_factor(name: str) -> bool:
    """Whether a tensor is one of SeTAR's own."""
    return name.rpartition(".")[2].startswith("setar_")


def _embedding_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that PEFT's `save_embedding_layers` adds to a file."""
    embeddings: list[nn.Module] = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        # Some models have the method and no embeddings.
        with contextlib.suppress(NotImplementedError, AttributeError):
            embeddings.append(getattr(model, getter)())
    return {
        f"{plain_name(name)}.{key}": tuple(value.shape)
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


def _some(names: list[str], limit: int = 8, separator: str = ", ") -> str:
    shown = separator.join(name[:200] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown}{separator}... ({len(names)} in all)"
