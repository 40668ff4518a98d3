"""What `setar merge`, `setar export-lora` and `setar info` do with a saved adapter."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from setar_peft.decomposition import residual_rank
from setar_peft.loading import torch_device
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.export import export_lora, whole_folder


def merge_adapter(adapter: str, output: Path, *, base: str | None = None, device: str | None = None) -> Path:
    """Merge an adapter into its base, and write the stock model that this gives.

    Args:
        adapter: Folder or Hub name of the adapter.
        output: A folder that does not exist yet, or is empty.
        base: Folder or Hub name of the base model; by default the one that the adapter's config names.
        device: Where to merge.

    Returns:
        The folder, which transformers loads without this package.

    Raises:
        ValueError: If the adapter or its base cannot be loaded or do not belong together, there is no such device, or
            the folder holds files.
    """
    with whole_folder(output) as folder:
        model = _load(adapter, base)
        if device is not None:
            model.to(torch_device(device))
        merged = model.merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder)
    return output


def export_adapter(adapter: str, output: Path, *, base: str | None = None) -> Path:
    """Write an adapter as the LoRA that computes the same (see `export_lora`); the arguments are `merge_adapter`'s."""
    return export_lora(_load(adapter, base), output)


def describe_adapter(adapter: str) -> str:
    """What an adapter is, in plain text, from its files alone: no base model is loaded.

    Args:
        adapter: Folder or Hub name of the adapter.

    Raises:
        ValueError: If there is no SeTAR adapter, or its files are damaged.
    """
    config = _config(adapter)
    shapes = {} if config.saved_shapes is None else config.saved_shapes.weights
    ratios = config.rank_ratios if isinstance(config.rank_ratios, dict) else {}
    truncated = {name: ratio for name, ratio in ratios.items() if ratio > 0}
    rows = [("layer", "ratio", "removed", "weight")]
    removed = 0
    for name, ratio in truncated.items():
        m, n = shapes[name]
        rank = residual_rank((m, n), ratio)
        removed += rank * (m + n)
        rows.append((name, f"{ratio:g}", f"{rank} of {min(m, n)}", f"{m} x {n}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    facts = {
        "adapter": adapter,
        "kind": "SeTAR+FT (fine-tuned)" if config.finetune else "SeTAR (training-free)",
        "base model": str(config.base_model_name_or_path or "not recorded"),
        "pruning": config.prune,
        "trained in full": ", ".join(sorted(config.modules_to_save or [])) or "nothing",
        "layers": f"{len(truncated)} of {len(ratios)} adapted layers are truncated",
        "values": f"{removed * (2 if config.finetune else 1):,} in the factors",
    }
    lines = [f"{key + ':':<17}{value}" for key, value in facts.items()]
    return "\n".join([*lines, *(["", *table] if truncated else [])])


def _config(adapter: str) -> SeTARConfig:
    config = SeTARConfig.from_pretrained(adapter)
    if not isinstance(config, SeTARConfig):
        raise ValueError(f"{adapter} is an adapter of another method ({config.peft_type}); give a SeTAR adapter.")
    return config


def _load(adapter: str, base: str | None) -> PeftModel:
    config = _config(adapter)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"The config of {adapter} names no base model; give it with --base.")
    config.strict_base = True
    # The config alone knows the base's class; as it may come from anyone, nothing but a model of transformers is built.
    mapping = config.auto_mapping or {}
    library, kind = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
    if not isinstance(library, str) or not library.startswith("transformers.models."):
        raise ValueError(
            f"The config of {adapter} does not name a transformers model as its base; load it in Python, with "
            "PeftModel.from_pretrained."
        )
    kinds: Any = importlib.import_module(library)
    model_class = getattr(kinds, str(kind), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(f"The config of {adapter} names {library}.{kind} as its base, which is no model.")
    model = getattr(kinds, kind).from_pretrained(name, dtype="auto", revision=None if base else config.revision)
    return PeftModel.from_pretrained(model, adapter, config=config)
