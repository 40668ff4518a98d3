"""The weights file of a saved adapter: where it is, whether it is whole, and whether it is its config's."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from setar_peft.decomposition import CHECKED_COMPONENTS, Residual
from setar_peft.tuner.checkpoint import TensorFacts, all_finite, check_adapter_tensors, is_factor, unprefixed

_BLOCK = 1 << 18
_FROZEN_FACTORS = (".setar_B0", ".setar_A0")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SavedShapes(NamedTuple):
    """The shapes in an adapter's file.

    Attributes:
        weights: Module name -> (m, n) of the weight that it had when the adapter was made.
        others: Name -> shape of the tensors that are no factors: modules trained in full, and embeddings.
    """

    weights: dict[str, tuple[int, int]]
    others: dict[str, tuple[int, ...]]


def find_adapter_file(name_or_path: str | Path, subfolder: str | None, **hub_settings: Any) -> Path:
    """The weights file of an adapter in a folder or on the Hub, from where it is downloaded.

    Raises:
        ValueError: If there is none, or the Hub could not be asked.
    """
    names = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    folder = Path(name_or_path, subfolder or "")
    unreachable: EntryNotFoundError | None = None
    for name in names:
        if folder.is_dir():
            found = folder / name if (folder / name).is_file() else None
        else:
            found = _download(str(name_or_path), name, subfolder=subfolder, **hub_settings)
        if isinstance(found, Path):
            return found
        if isinstance(found, LocalEntryNotFoundError):
            unreachable = unreachable or found
    if unreachable is not None:
        raise ValueError(
            f"{SAFETENSORS_WEIGHTS_NAME} of {name_or_path} is not in the local cache, and the Hub could not be asked "
            f"for it ({str(unreachable).splitlines()[0]}). Check the network, or HF_HUB_OFFLINE, and load again."
        ) from unreachable
    raise ValueError(
        f"{name_or_path} has an adapter_config.json of a saved adapter, but no {SAFETENSORS_WEIGHTS_NAME}. Copy or "
        "download the adapter again, with both files."
    )


def _download(repo: str, name: str, **hub_settings: Any) -> Path | EntryNotFoundError:
    try:
        return Path(hf_hub_download(repo, name, **hub_settings))
    except EntryNotFoundError as error:  # also where it is not in the cache, and the Hub does not answer
        return error


def check_adapter_file(
    path: Path, rank_ratios: Mapping[str, float], *, finetune: bool, digest: str | None = None
) -> tuple[SavedShapes, dict[str, Residual]]:
    """Read an adapter's file once, a block at a time, and check it against its config.

    Args:
        path: A safetensors file, or one of `torch.save`, of which nothing but tensors is read.
        rank_ratios: The config's map of module names to ratios.
        finetune: Whether the config speaks of a fine-tuned adapter.
        digest: SHA-256 of the file by the config, if it says.

    Returns:
        The shapes in the file; and module name -> the strongest of the components that it removes, `CHECKED_COMPONENTS`
        at most, by which `check_base` knows the base.

    Raises:
        ValueError: If the file cannot be read, tensors are missing, or shapes, dtypes or values contradict the
            config. The message names the file and what is wrong in it.
    """
    found = None
    try:
        if path.suffix == ".safetensors":
            tensors, strongest, found = _scan_safetensors(path, with_digest=digest is not None)
        else:
            values = _read_pickle(path)
            tensors = {name: TensorFacts.of(tensor) for name, tensor in values.items()}
            strongest = {
                name: _strongest(name, tensor).clone()
                for name, tensor in values.items()
                if name.endswith(_FROZEN_FACTORS) and tensor.dim() == 2
            }
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        raise ValueError(
            f"{path} is not a whole file of tensors ({reason}). Copy or download the adapter again; nothing was loaded."
        ) from error
    try:
        shapes = SavedShapes(
            check_adapter_tensors(tensors, rank_ratios, finetune=finetune),
            {name: facts.shape for name, facts in unprefixed(tensors).items() if not is_factor(name)},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if digest is not None and digest != found:
        raise ValueError(
            f"{path} is not the file that was saved with its adapter_config.json: its SHA-256 is another one. Copy or "
            "download the adapter again; if you changed the file on purpose, remove weights_sha256 from the config."
        )
    strongest = unprefixed(strongest)
    return shapes, {
        name: Residual(strongest[f"{name}.setar_B0"], strongest[f"{name}.setar_A0"]) for name in shapes.weights
    }


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _scan_safetensors(path: Path, *, with_digest: bool) -> tuple[dict[str, TensorFacts], dict[str, Tensor], str | None]:
    """What is in a file, the strongest components of its factors, and its SHA-256.

    No more than a block of it, or a row of a factor, is in memory at a time: what is read of the tensors that PEFT maps
    into memory stays there.
    """
    with safe_open(path, "pt") as opened:  # checks the header, and that the tensors fill the file without a gap
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no mapping
    digest = hashlib.sha256()
    tensors, strongest = {}, {}
    block = memoryview(bytearray(_BLOCK))
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        entries = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
            shape = shapes[key]
            has_rows = dtype is not None and key.endswith(_FROZEN_FACTORS) and len(shape) == 2
            row = (end - begin) // shape[0] if has_rows and end > begin else 1
            step = max(_BLOCK // row, 1) * row
            if step > len(block):
                block = memoryview(bytearray(step))
            finite, scalar, parts = True, None, []
            while begin < end:
                read = file.readinto(block[: min(step, end - begin)])
                if read < min(step, end - begin):
                    raise ValueError("it ends early")
                begin += read
                if with_digest:
                    digest.update(block[:read])
                if dtype is not None and is_factor(key):
                    values = torch.frombuffer(block, dtype=dtype, count=read // dtype.itemsize)
                    finite = finite and all_finite(values)
                    scalar = float(values[0]) if shape in ((), (1,)) else None
                    if has_rows:
                        parts.append(_strongest(key, values.view(-1, shape[1])).clone())
            tensors[key] = TensorFacts(shape, dtype or entry["dtype"], finite, scalar)
            if has_rows:
                strongest[key] = _strongest(key, torch.cat(parts) if parts else torch.empty(shape, dtype=dtype))
    return tensors, strongest, digest.hexdigest() if with_digest else None


def _strongest(name: str, factor: Tensor) -> Tensor:
    """Of a factor (m, r) or (r, n), what belongs to the strongest components."""
    return factor[:, :CHECKED_COMPONENTS] if name.endswith("setar_B0") else factor[:CHECKED_COMPONENTS]


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
