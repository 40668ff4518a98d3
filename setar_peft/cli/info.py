"""Say what an adapter is: its base, its ratios, its size."""

from __future__ import annotations

import typer

from setar_peft.cli.adapters import AdapterName, adapter_config
from setar_peft.decomposition import residual_rank
from setar_peft.tuner.config import SeTARConfig


def info(adapter: AdapterName) -> None:
    """Say what an adapter is, from its files alone: no base model is loaded.

    **Examples**

    ```
    setar info my-adapter
    ```
    """
    typer.echo(_description(adapter, adapter_config(adapter)))


def _description(adapter: str, config: SeTARConfig) -> str:
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
