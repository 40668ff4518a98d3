"""Small models for the tuner's tests, and what must not change in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class MLP(nn.Module):
    """Linear 12 -> 16 -> 12 -> 3."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class ConvMLP(nn.Module):
    """transformers' Conv1D, whose weight is stored as (inputs, outputs)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = Conv1D(16, 12)
        self.fc2 = Conv1D(12, 16)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.3)
            nn.init.normal_(layer.bias, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Blocks(nn.Module):
    """A list of blocks, for `layers_to_transform`: PEFT looks for its name behind another one."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 8)}) for _ in range(count)]
        self.body = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body["layers"]:
            x = x + layer["out"](torch.relu(layer["fc"](x)))
        return x


def inputs(rows: int = 5, columns: int = 12, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an error must leave alone."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "types": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {name: (id(value), value.requires_grad) for name, value in model.named_parameters()},
        "attributes": sorted(vars(model)),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for part in before:
        if part == "state":
            assert before[part].keys() == after[part].keys()
            assert all(torch.equal(value, after[part][name]) for name, value in before[part].items())
        else:
            assert after[part] == before[part], part
