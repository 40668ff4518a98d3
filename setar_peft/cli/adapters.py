"""Saved adapters by name, for the commands that take one."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import typer
from peft import PeftModel

from setar_peft.backbones.loading import load_base
from setar_peft.tuner.config import SeTARConfig

AdapterName: TypeAlias = Annotated[str, typer.Argument(help="Folder or Hub name of the adapter.")]
BaseName: TypeAlias = Annotated[str | None, typer.Option(help="Base model.", show_default="the one the adapter names")]


def adapter_config(adapter: str) -> SeTARConfig:
    """The config of a saved adapter.

    Args:
        adapter: Folder or Hub name.

    Raises:
        ValueError: If there is no SeTAR adapter, or its files are damaged.
    """
    config = SeTARConfig.from_pretrained(adapter)
    if not isinstance(config, SeTARConfig):
        raise ValueError(f"{adapter} is an adapter of another method ({config.peft_type}); give a SeTAR adapter.")
    return config


def load_adapter(adapter: str, base: str | None, dtype: Any = "auto") -> PeftModel:
    """A saved adapter on its base.

    Args:
        adapter: Folder or Hub name.
        base: Folder or Hub name of the base model; by default the one that the adapter's config names.
        dtype: Of the base's weights; by default the one that they are saved in.

    Raises:
        ValueError: If the adapter or its base cannot be loaded or do not belong together.
    """
    config = adapter_config(adapter)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"The config of {adapter} names no base model; give it with --base.")
    config.strict_base = True
    # The config alone knows the base's class.
    mapping = config.auto_mapping or {}
    library, kind = mapping.get("parent_library", ""), mapping.get("base_model_class", "")
    if not isinstance(library, str) or not library.startswith("transformers.models."):
        raise ValueError(
            f"The config of {adapter} does not name a transformers model as its base; load it in Python, with "
            "PeftModel.from_pretrained."
        )
    whose = f"The config of {adapter}"
    model = load_base(name, str(kind), whose, dtype=dtype, revision=None if base else config.revision)
    return PeftModel.from_pretrained(model, adapter, config=config)
