"""Whatever is done to a model while it is borrowed, it is given back as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from setar_peft.backbones.untouched import attributes_put_back, left_as_it_was


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.calls = 0
        self.seen: list[Any] = ["first"]
        self.cache = {"key": torch.ones(2)}
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.norm(self.linear(inputs)) * self.scale


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Dropout(), Block())
    model[0].linear.bias.requires_grad_(False)
    model[0].linear.weight.grad = torch.ones(3, 3)
    model[0].register_forward_hook(lambda *_: None)
    model.train()
    model[2].eval()
    return model


def _state(model: nn.Module) -> list[Any]:
    """Everything that is to stay: objects by identity, tensors by their bits."""
    state: list[Any] = []
    for name, module in model.named_modules():
        state.append((name, id(module), type(module), module.training))
        for key, value in sorted(vars(module).items()):
            parts = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
            state.append((key, id(value), [(part_key, id(part)) for part_key, part in parts]))
            parts = value.values() if isinstance(value, dict) else [value]
            for part in parts:
                if isinstance(part, Tensor):
                    grad = None if not part.is_leaf or part.grad is None else (id(part.grad), part.grad.tolist())
                    state.append((part.detach().tolist(), part.dtype, part.requires_grad, part.is_leaf, grad))
    state.append((torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())))  # noqa: NPY002
    return state


def _replace_a_parameter(model: Any) -> None:
    model[0].linear.weight = nn.Parameter(torch.zeros(3, 3))


def _replace_a_module(model: Any) -> None:
    model[0].linear = nn.Identity()
    model.append(nn.ReLU())


def _rewrite_weights(model: Any) -> None:
    model[0].linear.weight.mul_(2)
    model[2].linear.weight.data.zero_()  # leaves the version counter as it is
    model[2].linear.bias.numpy(force=True)[0] = 7


def _train(model: Any) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(torch.randn(8, 3)).square().sum().backward()
    optimiser.step()


def _hooks(model: Any) -> None:
    model[0]._forward_hooks.clear()
    model[2].register_forward_pre_hook(lambda *_: None)
    model[2].register_full_backward_hook(lambda *_: None)
    model[0].forward = lambda inputs: inputs


def _state_of_their_own(model: Any) -> None:
    model[0].calls += 1
    model[0].seen.append("second")
    model[0].cache["key"].add_(1)
    model[0].cache["more"] = 1
    model[2].new = torch.zeros(1)
    del model[2].seen


def _draw(_: Any) -> None:
    torch.manual_seed(5)
    random.random()
    np.random.rand()  # noqa: NPY002


def _requires_grad(model: Any) -> None:
    model.requires_grad_(False)
    model[0].linear.bias.requires_grad_(True)
    with torch.enable_grad():
        model[2].scale.copy_(torch.ones(3, requires_grad=True))


def _parametrise(model: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model[0].linear, "weight", Twice())


CHANGES: list[Callable[[Any], Any]] = [
    lambda model: model.train(),
    lambda model: model.half(),
    _replace_a_parameter,
    _replace_a_module,
    _rewrite_weights,
    _train,
    _hooks,
    _state_of_their_own,
    _draw,
    _requires_grad,
    _parametrise,
]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("change", CHANGES)
def test_anything_is_put_back(change: Callable[[Any], Any], error: type[BaseException] | None) -> None:
    model = _model()
    before = _state(model)

    def borrow() -> None:
        with left_as_it_was(model, by_anything=True):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            change(model)
            assert _state(model) != before
            if error is not None:
                raise error

    if error is None:
        borrow()
    else:
        with pytest.raises(error):
            borrow()
    assert _state(model) == before
    model(torch.ones(4, 3))


@pytest.mark.parametrize("change", [_replace_a_parameter, _replace_a_module, _hooks, _draw, lambda m: m.train()])
def test_what_our_own_code_borrows_is_put_back_and_caches_stay(change: Callable[[Any], Any]) -> None:
    model = _model()
    before = _state(model)
    with left_as_it_was(model):
        change(model)
    assert _state(model) == before
    with left_as_it_was(model):
        model[0].cache["formed"] = 1
    assert model[0].cache["formed"] == 1


def test_named_attributes_alone_are_put_back() -> None:
    model = _model()
    other = copy.deepcopy(model[0].linear.weight)
    with attributes_put_back([model[0].linear], ["_parameters"]):
        model[0].linear.weight = nn.Parameter(torch.zeros(3, 3))
        model[0].calls = 5
    assert torch.equal(model[0].linear.weight, other)
    assert model[0].calls == 5


def test_tensors_that_are_not_plain() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("complex", torch.ones(2, dtype=torch.complex128))
    model.register_buffer("absent", torch.empty(2, device="meta"))
    model.nothing = torch.tensor(float("nan"))
    with left_as_it_was(model, by_anything=True):
        model.sparse.mul_(2)
        model.complex.mul_(2)
        model.nothing.zero_()
    assert torch.equal(model.sparse.to_dense(), torch.eye(2))
    assert torch.equal(model.complex, torch.ones(2, dtype=torch.complex128))
    assert model.nothing.isnan()
