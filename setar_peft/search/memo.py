"""Replay for callable objectives: a block that is called with what it was called with before is not computed again.

Nothing is known here of the model, or of what the callable does with it. But the elements of a stack (a `ModuleList`
or `Sequential`) that run before the searched layer compute the same for every candidate, and so do stacks that do not
depend on it. Their outputs are remembered, call by call, and handed back where neither the inputs nor the weights have
changed; so it does not matter what the callable does: what differs is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves

from setar_peft.search.recording import MemoryBudget

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Call(NamedTuple):
    """What a block's output depends on; tensors with the versions that in-place operations raise."""

    structure: TreeSpec
    leaves: list[tuple[Any, int]]
    weights: list[tuple[Tensor, int]]


class _Remembered(NamedTuple):
    """A call and its output, and how many bytes are held for them."""

    call: _Call
    output: Any
    versions: list[tuple[Tensor, int]]
    target: str | None
    size: int


class BlockMemo:
    """Remembers outputs of a model's blocks while an objective is evaluated again and again.

    A block is taken to be a function of its inputs and weights. It is computed as it is where a gradient is wanted, in
    training mode, under `torch.inference_mode` (which hides in-place changes), where a hook listens inside, where it
    writes to its inputs, and for inputs that cannot be compared, such as a cache of keys and values.

    Args:
        model: The model.
        budget: Room for inputs and outputs, on the model's device.
    """

    def __init__(self, model: nn.Module, budget: MemoryBudget) -> None:
        self._model = model
        self._budget = budget
        self._remembered: dict[nn.Module, dict[int, _Remembered]] = {}
        self._outputs: set[int] = set()
        self._target: str | None = None
        self._given_up: set[nn.Module] = set()

    @contextmanager
    def evaluating(self, target: str | None) -> Iterator[None]:
        """Hand back what is known during one evaluation.

        Args:
            target: Full name of the layer that is searched; None for the model as it is.
        """
        blocks = list(_unaffected_blocks(self._model, target))
        if target != self._target:
            self._target = target
            self._given_up.clear()
            for block in set(self._remembered) - set(blocks):
                self._forget(block)
        with ExitStack() as restore:
            for block in blocks:
                # Who has put another forward there (a launcher's hooks, say) wants it called.
                if "forward" not in vars(block):
                    block.__dict__["forward"] = MethodType(self._forward(block), block)
                    restore.callback(block.__dict__.pop, "forward")
            yield

    def _forward(self, block: nn.Module) -> Callable[..., Any]:
        number = -1

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            compute = type(module).forward
            # A deep copy of the block carries this forward along.
            if module is not block or block in self._given_up or not _can_be_remembered(block):
                return compute(module, *args, **kwargs)
            call = _call(block, args, kwargs)
            if call is None:
                self._give_up(block)
                return compute(module, *args, **kwargs)
            known = self._remembered.get(block, {}).get(number)
            if known is not None and _unchanged(known.versions) and _same(known.call, call):
                return known.output
            output = compute(module, *args, **kwargs)
            depends = known is not None and known.target == self._target and _same_weights(known.call, call)
            if depends or not _left_alone(call, args, kwargs):
                # Its inputs depend on the candidate, or on chance; or it writes to them.
                self._give_up(block)
            else:
                self._remember(block, number, call, output)
            return output

        return forward

    def _remember(self, block: nn.Module, number: int, call: _Call, output: Any) -> None:
        of_block = self._remembered.setdefault(block, {})
        if number in of_block:
            self._release(of_block.pop(number))
        leaves = tree_leaves(output)
        if not all(_is_comparable(leaf) for leaf in leaves):
            self._give_up(block)
            return
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf, _ in call.leaves if isinstance(leaf, Tensor) and id(leaf) not in self._outputs]
        size = sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, *inputs])
        if self._budget.take(size, tensors[0].device.type if tensors else "cpu"):
            versions = [(tensor, tensor._version) for tensor in tensors]
            of_block[number] = _Remembered(call, output, versions, self._target, size)
            self._outputs.update(map(id, tensors))

    def _give_up(self, block: nn.Module) -> None:
        self._given_up.add(block)
        self._forget(block)

    def _forget(self, block: nn.Module) -> None:
        for remembered in self._remembered.pop(block, {}).values():
            self._release(remembered)

    def _release(self, remembered: _Remembered) -> None:
        self._outputs.difference_update(id(tensor) for tensor, _ in remembered.versions)
        place = remembered.versions[0][0].device.type if remembered.versions else "cpu"
        self._budget.give_back(remembered.size, place)


def _unaffected_blocks(module: nn.Module, target: str | None) -> Iterator[nn.Module]:
    """The outermost elements of stacks that may not depend on the target: in its own stack, those before it."""
    on_path, _, rest = (target or "").partition(".")
    is_stack = isinstance(module, (nn.ModuleList, nn.Sequential))
    for name, child in module.named_children():
        if target is not None and name == on_path:
            if rest:
                yield from _unaffected_blocks(child, rest)
            if is_stack:
                return
        elif is_stack:
            yield child
        else:
            yield from _unaffected_blocks(child, None)


def _can_be_remembered(block: nn.Module) -> bool:
    if block.training or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    return not any(inner._forward_hooks or inner._forward_pre_hooks for inner in block.modules() if inner is not block)


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """What the output of a call depends on, or None if that cannot be compared."""
    leaves, structure = tree_flatten((args, kwargs))
    weights = [*block.parameters(), *block.buffers()]
    if not all(map(_is_comparable, [*leaves, *weights])):
        return None
    return _Call(structure, [(leaf, _version(leaf)) for leaf in leaves], [(w, w._version) for w in weights])


def _left_alone(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block has not written to its inputs."""
    leaves, structure = tree_flatten((args, kwargs))
    return structure == call.structure and all(
        before is leaf and version == _version(leaf)
        for (before, version), leaf in zip(call.leaves, leaves, strict=True)
    )


def _is_comparable(leaf: Any) -> bool:
    return not leaf.is_inference() if isinstance(leaf, Tensor) else isinstance(leaf, _CONSTANTS)


def _version(leaf: Any) -> int:
    return leaf._version if isinstance(leaf, Tensor) else 0


def _unchanged(tensors: list[tuple[Tensor, int]]) -> bool:
    return all(tensor._version == version for tensor, version in tensors)


def _same(known: _Call, call: _Call) -> bool:
    return (
        known.structure == call.structure
        and _same_weights(known, call)
        and all(_equal(*pair, leaf) for pair, (leaf, _) in zip(known.leaves, call.leaves, strict=True))
    )


def _same_weights(known: _Call, call: _Call) -> bool:
    return len(known.weights) == len(call.weights) and all(
        before is now and then == version
        for (before, then), (now, version) in zip(known.weights, call.weights, strict=True)
    )


def _equal(known: Any, version: int, leaf: Any) -> bool:
    if not isinstance(known, Tensor):
        return type(known) is type(leaf) and bool(known == leaf)
    if not isinstance(leaf, Tensor) or known._version != version:
        return False
    return known is leaf or (
        known.shape == leaf.shape
        and known.dtype == leaf.dtype
        and known.device == leaf.device
        and torch.equal(known, leaf)
    )
