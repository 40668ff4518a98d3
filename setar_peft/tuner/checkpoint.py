"""Checks of a saved adapter: that its file is whole, agrees with its config, and came from this base."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.warning import PeftWarning
from safetensors import SafetensorError, safe_open
from torch import Tensor

from setar_peft.decomposition import Residual, base_agreement, residual_rank

if TYPE_CHECKING:
    from setar_peft.tuner.layer import SeTARLayer

_PREFIX = "base_model.model."
_FROZEN = ("setar_A0", "setar_B0", "setar_ratio")
_TRAINED = ("setar_A", "setar_B")
# A rounded base (bfloat16, 8-bit) moves the agreement by a few thousandths; another base moves it to about 0.
_BASE_TOLERANCE = 0.05


def check_adapter_folder(
    folder: str | Path, rank_ratios: Mapping[str, float], *, finetune: bool
) -> dict[str, tuple[int, int]]:
    """Read the adapter file in a folder and check it against the ratios in its config.

    Args:
        folder: The folder that holds adapter_model.safetensors; where it holds none, nothing is checked.
        rank_ratios: The config's map of module names to ratios.
        finetune: Whether the config speaks of a fine-tuned adapter.

    Returns:
        The shape (m, n) of the weight that each adapted module had when the adapter was made.

    Raises:
        ValueError: If the file cannot be read, tensors are missing, or shapes, dtypes or values contradict the
            config. The message names the file and what is wrong in it.
    """
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). Copy or download the adapter again; nothing was loaded."
        ) from error
    try:
        return check_adapter_tensors(tensors, rank_ratios, finetune=finetune)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


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
    kinds = (*_FROZEN, *_TRAINED) if finetune else _FROZEN
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    expected = {f"{module}.{kind}" for module in rank_ratios for kind in kinds}
    found = {name for name in tensors if name.rpartition(".")[2].startswith("setar_")}
    _check_names(expected, found)
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
        if finetune:
            for kind, like in (("setar_B", b0), ("setar_A", a0)):
                trained = tensors[f"{module}.{kind}"]
                if trained.shape != like.shape:
                    raise ValueError(f"{module}.{kind} has shape {tuple(trained.shape)}; expected {tuple(like.shape)}.")
        for kind in kinds:
            tensor = tensors[f"{module}.{kind}"]
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{module}.{kind} ({tensor.dtype}) does not hold finite floating-point values. "
                    "The file is damaged: copy or download the adapter again."
                )
        shapes[module] = shape
    return shapes


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


def _check_names(expected: set[str], found: set[str]) -> None:
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"missing {', '.join(missing)}")
    if unexpected:
        parts.append(f"unexpected {', '.join(unexpected)}")
    raise ValueError(
        f"the tensors do not match adapter_config.json: {'; '.join(parts)}. Save the adapter again, or load the two "
        "files that were saved together."
    )
