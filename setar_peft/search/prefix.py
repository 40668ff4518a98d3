"""Sharing within a block: what runs before the searched layer is computed for the first candidate only.

The candidates of one layer differ in one weight. Whatever the block computes before that weight is used (for W_up:
the whole attention) is the same for all of them. It is recorded module by module while the first candidate runs, and
handed back to the others instead of being computed again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from setar_peft.backbones.untouched import HOOKS, attributes_put_back

_Outputs = dict[nn.Module, list[Any]]


class SharedPrefix:
    """The outputs of the modules that finish before `target` first runs.

    Args:
        modules: The modules to watch: those that may run before the target.
        target: The module whose weight differs between candidates.
    """

    def __init__(self, modules: Sequence[nn.Module], target: nn.Module) -> None:
        self._modules = [module for module in dict.fromkeys(modules) if module is not target]
        self._target = target
        self._recorded: _Outputs | None = None
        self._versions: list[tuple[torch.Tensor, int]] = []

    @property
    def size(self) -> int:
        """Bytes of the recorded outputs."""
        return sum(tensor.numel() * tensor.element_size() for tensor, _ in self._versions)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Watch one forward pass."""
        # Calls that finished, innermost open call last; a call that finishes swallows the calls inside it, for
        # handing back its output means that they never happen.
        finished: list[list[tuple[nn.Module, Any]]] = [[]]
        reached = False

        def enter(*_: Any) -> None:
            if not reached:
                finished.append([])

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            if not reached:
                finished.pop()
                finished[-1].append((module, output))

        def reach(*_: Any) -> None:
            nonlocal reached
            reached = True

        with attributes_put_back([*self._modules, self._target], HOOKS):
            for module in self._modules:
                module.register_forward_pre_hook(enter, prepend=True)
                module.register_forward_hook(leave)
            self._target.register_forward_pre_hook(reach, prepend=True)
            yield
        if not reached:
            return
        outputs: _Outputs = defaultdict(list)
        for call in finished:
            for module, output in call:
                outputs[module].append(output)
        self._recorded = dict(outputs)
        self._versions = [
            (leaf, leaf._version)
            for calls in outputs.values()
            for leaf in tree_leaves(calls)
            if isinstance(leaf, torch.Tensor)
        ]

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Hand the recorded outputs back during one forward pass; without a recording, compute everything."""
        # A later operation that works in place on an output would spoil it for the next candidate.
        if any(leaf._version != version for leaf, version in self._versions):
            self._recorded = None
        recorded = self._recorded or {}
        with attributes_put_back(recorded, ["forward"]):
            for module, outputs in recorded.items():
                module.forward = _handing_back(outputs, module.forward)
            yield


def _handing_back(outputs: Sequence[Any], computed: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that hands back what is recorded, call by call, and computes what was called more often."""
    waiting = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for output in waiting:
            return output
        return computed(*args, **kwargs)

    return forward
