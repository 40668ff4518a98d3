"""The one way to leave a model as it was: what is changed of its modules while a context is open is put back."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What `torch.nn.Module` itself keeps of a module: parameters, buffers, submodules, hooks; and a patched forward.
MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), "forward"})
HOOKS = frozenset(name for name in MODULE_ATTRIBUTES if "hook" in name)

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def left_as_it_was(model: nn.Module, *, by_anything: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; at the end the model and the random generators are as they were.

    Put back are every module's class, training flag, parameters, buffers, submodules, hooks and forward, which
    parameters require gradients, and the state of torch's (CPU and CUDA), Python's and NumPy's generators.

    Args:
        model: The model.
        by_anything: Whether code runs of which nothing is known, as a callable objective does. Then all attributes of
            modules are put back, with the contents of their lists, dicts and sets, and the values and gradients of all
            tensors among them, of which a copy is kept in host memory. Not put back is what other objects hold that an
            attribute refers to, such as a configuration.
    """
    modules = list(model.modules())
    generators = _Generators()
    tensors = [_Tensor(tensor, with_values=by_anything) for tensor in _tensors_of(modules, every=by_anything)]
    try:
        with attributes_put_back(modules, None if by_anything else MODULE_ATTRIBUTES), torch.no_grad():
            model.eval()
            yield
    finally:
        for tensor in tensors:
            tensor.put_back()
        generators.put_back()


@contextmanager
def attributes_put_back(modules: Iterable[nn.Module], names: Collection[str] | None) -> Iterator[None]:
    """At the end each module has the attributes that it had, and what are lists, dicts and sets their contents.

    Args:
        modules: The modules.
        names: The attributes that are put back; None for all of them.
    """
    before = [_Attributes(module, names) for module in modules]
    try:
        yield
    finally:
        for attributes in before:
            attributes.put_back()


class _Attributes:
    """Attributes of one module, its class, and its training flag, which a scripted module keeps elsewhere."""

    def __init__(self, module: nn.Module, names: Collection[str] | None) -> None:
        self._module, self._class, self._training = module, type(module), module.training
        self._names = names
        held = vars(module)
        self._values = {name: held[name] for name in self._names_in(held) if name in held}
        # Most containers are empty, for they are for hooks that nobody registered.
        self._contents: list[tuple[Any, Any]] = [
            (value, value.copy() if value else ()) for value in self._values.values() if type(value) in _CONTAINERS
        ]

    def put_back(self) -> None:
        if type(self._module) is not self._class:
            self._module.__class__ = self._class
        for container, content in self._contents:
            # One that nobody changed is not emptied even for a moment: other threads may be reading it.
            if (container or content) and list(map(id, _items(container))) != list(map(id, _items(content))):
                container.clear()
                container.extend(content) if hasattr(container, "extend") else container.update(content)
        held = vars(self._module)
        for name in [name for name in self._names_in(held) if name not in self._values and name in held]:
            del held[name]
        held.update(self._values)
        if self._module.training != self._training:
            self._module.training = self._training

    def _names_in(self, held: dict[str, Any]) -> Collection[str]:
        return held if self._names is None else self._names


class _Tensor:
    """A tensor of a module: where its data are, whether it requires gradients, and a copy of its values if wanted."""

    def __init__(self, tensor: Tensor, *, with_values: bool) -> None:
        self._tensor, self._requires_grad, self._is_leaf = tensor, tensor.requires_grad, tensor.is_leaf
        self._with_values = with_values
        if not with_values:
            return
        self._data, self._grad = tensor.detach(), tensor.grad if tensor.is_leaf else None
        self._copies = [
            (held, held.detach().to("cpu", copy=True))
            for held in (tensor, self._grad)
            if held is not None and not held.is_meta
        ]

    def put_back(self) -> None:
        tensor = self._tensor
        if tensor.grad_fn is not None and self._is_leaf:
            tensor.detach_()
        if tensor.is_leaf and tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        if not self._with_values:
            return
        if _place(tensor) != _place(self._data):
            tensor.data = self._data
        for held, values in self._copies:
            if not _same_bits(held.detach().cpu(), values):
                with torch.no_grad():
                    held.copy_(values)
        if tensor.is_leaf and tensor.grad is not self._grad:
            tensor.grad = self._grad


class _Generators:
    """The state of the random generators."""

    def __init__(self) -> None:
        self._torch, self._python = torch.get_rng_state(), random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - what other people's transforms draw from
        # A process that has not used its GPUs, or that cannot since it was forked, has drawn nothing there.
        used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call] # torch's own
        self._cuda = torch.cuda.get_rng_state_all() if used else []

    def put_back(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def _tensors_of(modules: Iterable[nn.Module], *, every: bool) -> list[Tensor]:
    """The parameters and buffers of modules, and all other tensors among their attributes if wanted; each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        held = vars(module)
        for value in held.values() if every else (held.get("_parameters"), held.get("_buffers")):
            parts = [value] if isinstance(value, Tensor) else _items(value) if type(value) in _CONTAINERS else ()
            found.update({id(part): part for part in parts if isinstance(part, Tensor)})
    return list(found.values())


def _items(container: Any) -> list[Any]:
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    where = (tensor.stride(), tensor.data_ptr()) if tensor.layout is torch.strided and not tensor.is_meta else ()
    return tensor.device, tensor.dtype, tensor.shape, *where


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = _BITS.get(one.element_size())
    return bits is not None and one.layout is torch.strided and torch.equal(one.view(bits), other.view(bits))
