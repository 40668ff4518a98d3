"""The weights file of a saved adapter: where it is, whether it is whole, and whether it is its config's."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from setar_peft.tuner.checkpoint import check_adapter_tensors, is_factor, unprefixed


class SavedShapes(NamedTuple):
    """The shapes in an adapter's file.

    Attributes:
        weights: Module name -> (m, n) of the weight that it had when the adapter was made.
        others: Name -> shape of the tensors that are no factors: modules trained in full, and embeddings.
    """

    weights: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, ...]]


def find_adapter_file(name_or_path: str | Path, subfolder: str | None, **hub_settings: Any) -> Path | None:
    """The weights file of an adapter in a folder or on the Hub, from where it is downloaded; `None` if it has none."""
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    folder = Path(name_or_path, subfolder or "")
    if folder.is_dir():
        return next((folder / name for name in names if (folder / name).is_file()), None)
    for name in names:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(str(name_or_path), name, subfolder=subfolder, **hub_settings))
    return None


def check_adapter_file(
    path: Path, rank_ratios: Mapping[str, float], *, finetune: bool, digest: str | None = None
) -> SavedShapes:
    """Read an adapter's file and check it against the ratios in its config.

    Args:
        path: A safetensors file, or one of `torch.save`, of which nothing but tensors is read.
        rank_ratios: The config's map of module names to ratios.
        finetune: Whether the config speaks of a fine-tuned adapter.
        digest: SHA-256 of the file by the config, if it says.

    Raises:
        ValueError: If the file cannot be read, tensors are missing, or shapes, dtypes or values contradict the
            config. The message names the file and what is wrong in it.
    """
    try:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise ValueError(
            f"{path} is not a whole file of tensors ({reason}). Copy or download the adapter again; nothing was loaded."
        ) from error
    try:
        shapes = SavedShapes(
            check_adapter_tensors(tensors, rank_ratios, finetune=finetune),
            {name: tuple(tensor.shape) for name, tensor in unprefixed(tensors).items() if not is_factor(name)},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if digest is not None and digest != file_digest(path):
        raise ValueError(
            f"{path} is not the file that was saved with its adapter_config.json: its SHA-256 is another one. Copy or "
            "download the adapter again; if you changed the file on purpose, remove weights_sha256 from the config."
        )
    return shapes


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping


def _read_pickle(path: Path) -> dict[str, Tensor]:
    # PEFT loads this format likewise. Nothing in it can run: weights_only admits tensors and plain containers.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols that this loader knows in part: it fails, or it does not
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise ValueError("it holds other things than named tensors")
    return tensors
