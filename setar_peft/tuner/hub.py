"""Pushing to the Hub: the card that is uploaded is the adapter's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peft import PeftModel

from setar_peft.tuner.card import write_model_card
from setar_peft.tuner.config import SeTARConfig


def push_adapter_card() -> None:
    """Have `PeftModel.push_to_hub` upload the card of a SeTAR adapter; other methods' adapters are pushed as before.

    transformers, which `push_to_hub` comes from, writes its own template over the README.md that saving has just
    written (or over what the repository has), and calls no method in between that an adapter could define: the last
    step of a push is wrapped, once.
    """
    upload = PeftModel._upload_modified_files
    if hasattr(upload, "__wrapped__"):
        return

    @functools.wraps(upload)
    def upload_with_card(self: PeftModel, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get("default")
        if isinstance(config, SeTARConfig):
            base = type(self.get_base_model())
            mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
            write_model_card(working_dir, config, mapping)
        return upload(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = upload_with_card
