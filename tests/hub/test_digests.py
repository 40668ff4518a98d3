"""Digests of weights: the same for the same base whatever is around it, and another for anything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from setar_peft import SeTARConfig
from setar_peft.hub.digests import adapter_digest, facts_digest, model_digest, tensors_digest
from setar_peft.tuner.checkpoint import unprefixed

RATIOS = {"vision_model.encoder.layers.0.mlp.fc1": 0.25, "text_model.encoder.layers.1.mlp.fc1": 0.5}


def test_adapters_are_left_out(load_clip: Callable[..., Any]) -> None:
    digest = model_digest(load_clip())
    assert len(digest) == 64
    model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=RATIOS, finetune=True))
    assert model_digest(model) == model_digest(model.get_base_model()) == digest
    model.add_adapter("other", SeTARConfig(rank_ratios=0.3))
    assert model_digest(model) == digest
    lora = LoraConfig(target_modules=["fc1"], modules_to_save=["visual_projection"])
    assert model_digest(get_peft_model(load_clip(), lora)) == digest
    injected = load_clip()
    injected.add_adapter(LoraConfig(target_modules=["fc2"]))
    assert model_digest(injected) == digest


def test_the_base_s_own_layers_may_be_called_as_peft_calls_its_own() -> None:
    model = nn.ModuleDict({"base_layer": nn.Linear(2, 2), "x": nn.Linear(2, 2)})
    changed = nn.ModuleDict({"base_layer": nn.Linear(2, 2), "x": model["x"]})
    assert model_digest(model) != model_digest(changed)


def test_any_change_of_the_base_is_another_digest(load_clip: Callable[..., Any]) -> None:
    digests = {model_digest(load_clip()), model_digest(load_clip(dtype=torch.bfloat16))}
    for name in ("logit_scale", "vision_model.encoder.layers.1.mlp.fc1.bias"):
        model = load_clip()
        with torch.no_grad():
            weight = dict(model.named_parameters())[name].view(-1)
            weight[-1] = torch.nextafter(weight[-1], torch.tensor(9.0))
        digests.add(model_digest(model))
    assert len(digests) == 4


def test_a_merged_base_is_not_told(load_clip: Callable[..., Any]) -> None:
    model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=RATIOS))
    digest = model_digest(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"An adapter is merged into .*fc1.*unmerge_adapter\(\) first"):
        model_digest(model)
    model.unmerge_adapter()
    assert model_digest(model) == digest


def test_an_adapter_is_what_is_in_its_file(load_clip: Callable[..., Any], tmp_path: Any) -> None:
    model = get_peft_model(load_clip(), SeTARConfig(rank_ratios=RATIOS))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = tensors_digest(unprefixed(load_file(tmp_path / "adapter_model.safetensors")))
    assert adapter_digest(model, "default") == saved
    # transformers puts it into the model itself, where its tensors have other names.
    injected = load_clip()
    injected.load_adapter(tmp_path)
    assert adapter_digest(injected, "default") == saved
    other = get_peft_model(
        load_clip(), SeTARConfig(rank_ratios={**RATIOS, "vision_model.encoder.layers.0.mlp.fc1": 0.3})
    )
    assert adapter_digest(other, "default") != saved


def test_names_dtypes_shapes_and_values_count_and_the_order_does_not() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    assert tensors_digest(one) == tensors_digest(dict(reversed(one.items())))
    others: list[dict[str, torch.Tensor]] = [
        {**one, "a": torch.zeros(3, 2)},
        {**one, "a": torch.zeros(2, 3, dtype=torch.float64)},
        {**one, "a": torch.full((2, 3), -0.0)},
        {**one, "b": torch.ones(4, dtype=torch.bfloat16)},
        {"a": one["a"]},
        {"a": one["a"], "c": one["b"]},
    ]
    assert len({tensors_digest(tensors) for tensors in (one, *others)}) == 7
    assert tensors_digest({"a": torch.arange(6.0).view(2, 3).T}) == tensors_digest(
        {"a": torch.arange(6.0).view(2, 3).T.contiguous()}
    )
    with pytest.raises(ValueError, match="a is not in memory"):
        tensors_digest({"a": torch.zeros(2, device="meta")})


def test_large_tensors_are_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = {"a": torch.arange(1000.0)}
    whole = tensors_digest(tensor)
    monkeypatch.setattr("setar_peft.hub.digests._BLOCK", 7)
    assert tensors_digest(tensor) == whole


def test_a_key_is_the_same_in_every_process() -> None:
    """Neither addresses nor the order of sets, which Python changes from process to process, are in it."""
    assert facts_digest(modules={"b", "a"}, objective=object()) == facts_digest(modules=["a", "b"], objective=object())
    assert facts_digest(modules={"b"}) != facts_digest(modules={"a"})
