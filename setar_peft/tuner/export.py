"""A SeTAR adapter as the LoRA that computes the same: files that stock PEFT loads without this package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from setar_peft.decomposition import Residual
from setar_peft.tuner.config import SeTARConfig
from setar_peft.tuner.layer import SeTARLayer
from setar_peft.writing import whole_folder

_PREFIX = "base_model.model."


def export_lora(peft_model: PeftModel, path: str | Path, adapter_name: str = "default") -> Path:
    """Write an adapter as the LoRA with the same output, exactly: no approximation, and no SVD.

    A training-free adapter of rank r becomes a LoRA of rank r (B = -B0, A = A0), a fine-tuned one a LoRA of rank 2 r
    (B = [B, -B0], A = [A; A0]; paper, Eq. 6 to 8). Every layer's scaling is 1, layers of rank 0 are left out, and
    modules that were trained in full go along. The files appear whole or not at all.

    Args:
        peft_model: What `get_peft_model` or `PeftModel.from_pretrained` returned; the base may be quantised.
        path: A folder that does not exist yet, or is empty.
        adapter_name: Which adapter.

    Returns:
        The folder.

    Raises:
        TypeError: If the model is no `PeftModel`.
        ValueError: If it has no SeTAR adapter of that name, an adapter is merged, no layer is truncated, a factor is
            not finite, or the folder holds files.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(
            f"export_lora got a {type(peft_model).__name__}; give the PeftModel that get_peft_model or "
            "PeftModel.from_pretrained returned."
        )
    config = peft_model.peft_config.get(adapter_name)
    if not isinstance(config, SeTARConfig):
        have = [name for name, other in peft_model.peft_config.items() if isinstance(other, SeTARConfig)]
        raise ValueError(
            f"The model has no SeTAR adapter named {adapter_name!r}; it has {', '.join(map(repr, have)) or 'none'}."
        )
    base = peft_model.get_base_model()
    factors = _lora_factors(base, adapter_name)
    tensors = {}
    for name, (b, a) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    tensors.update(_trained_in_full(peft_model, adapter_name))
    modules = {name: module for name, module in base.named_modules() if name}
    lora = _lora_config(config, {name: b.shape[1] for name, (b, _) in factors.items()}, modules)
    lora["base_model_name_or_path"] = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    if config.task_type is None:
        lora["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    with whole_folder(Path(path)) as folder:
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(lora, indent=2, sort_keys=True), encoding="utf-8")
    return Path(path)


def _lora_factors(base: nn.Module, adapter_name: str) -> dict[str, Residual]:
    factors = {}
    for name, layer in base.named_modules():
        if not isinstance(layer, SeTARLayer) or adapter_name not in layer.setar_ratio:
            continue
        if layer.merged:
            raise ValueError(
                f"An adapter is merged into {name}, so its factors no longer stand beside the base weight. "
                "Call unmerge_adapter() first, then export."
            )
        b0, a0 = layer.residual(adapter_name)
        if b0.shape[1] == 0:
            continue
        b, a = -b0, a0
        if layer.is_finetuned(adapter_name):
            b = torch.cat([layer.setar_B[adapter_name].to(b0.dtype), b], dim=1)
            a = torch.cat([layer.setar_A[adapter_name].to(a0.dtype), a], dim=0)
        if not (torch.isfinite(b).all() and torch.isfinite(a).all()):
            raise ValueError(
                f"The factors of {name} hold NaN or infinity; nothing was written. Load the adapter again."
            )
        factors[name] = Residual(b, a)
    if not factors:
        raise ValueError(
            f"The adapter {adapter_name!r} truncates no layer (every rank ratio is 0), so there is no LoRA to write: "
            "the base model computes the same."
        )
    return factors


def _trained_in_full(peft_model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name, save_embedding_layers=False)
    return {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in state.items()
        if not name.rpartition(".")[2].startswith("setar_")
    }


def _lora_config(config: SeTARConfig, ranks: Mapping[str, int], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    rank = max(ranks.values())
    # PEFT searches these keys as regular expressions at the end of a module's name; `^` makes them full names.
    pattern = {f"^{re.escape(name)}": layer_rank for name, layer_rank in ranks.items() if layer_rank != rank}
    fan_in_fan_out = all(isinstance(_base_layer(modules[name]), Conv1D) for name in ranks)
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(list(ranks), modules),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=sorted(config.modules_to_save) if config.modules_to_save else None,
        task_type=config.task_type,
        revision=config.revision,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in lora.items()}


def _targets(names: list[str], modules: Iterable[str]) -> list[str] | str:
    """The exact names; as one regular expression if, as suffixes, they would hit other modules as well."""
    suffixes = tuple(f".{name}" for name in names)
    if any(module.endswith(suffixes) for module in modules if module not in set(names)):
        return "|".join(re.escape(name) for name in names)
    return names


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, SeTARLayer) else module
