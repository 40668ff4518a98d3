"""W - B0 A0 of a layer, formed once: with it a training-free adapter costs what its base layer costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from setar_peft.tuner.base_weight import fingerprint, sample_fingerprint
from setar_peft.tuner.forward import Factors, effective_weight


def may_be_gone_round(base: nn.Module) -> bool:
    """Whether multiplying by a weight of our own does all that calling the base layer would do, here and now.

    A hook or a patched `forward` may load an offloaded weight (accelerate, ZeRO-3) or be the user's own; a weight that
    is computed (parametrisations), sharded or of a subclass of tensors is not ours to read; one that is trained needs
    its gradient. Programs that are recorded (torch.compile, export, tracing, CUDA graphs, transforms of torch.func)
    must not hold a weight that is formed while they are.

    Args:
        base: What the adapter layer wraps.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) or type(base).__call__ is not nn.Module.__call__:
        return False
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    if "forward" in vars(base) or any(hooks) or any(_global_hooks()):
        return False
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) is not nn.Parameter or weight.is_meta or weight.requires_grad or weight.is_inference():
        return False
    if type(bias) is not nn.Parameter and (bias is not None or "bias" not in base._parameters):
        return False
    recorded = torch._C._functorch.peek_interpreter_stack() is not None or (
        weight.is_cuda and torch.cuda.is_current_stream_capturing()
    )
    return not recorded and not _is_sharding()


def _global_hooks() -> tuple[Mapping[int, Any], ...]:
    return (
        *(torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks),
        *(torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks),
    )


def _is_sharding() -> bool:
    # FSDP2 shows whole weights while a forward lasts, as ordinary parameters; keeping one would undo the sharding.
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed._composable_state import _module_state_mapping

    return bool(_module_state_mapping)


def check_is_cheaper(tokens: int, rank: int, shape: tuple[int, int]) -> bool:
    """Whether comparing a kept weight on a CPU takes less time than multiplying the tokens by the factors.

    Comparing reads an eleventh of the m n numbers of W from memory. With N tokens the factors take N r (m + n)
    multiplications, of which a core does about 14 while it reads one number, and three passes over the N m numbers of
    the output. For 3072 x 768 and r = 77 that is 7 tokens; a model that generates one token at a time multiplies.

    Args:
        tokens: Number N of input vectors.
        rank: Number r of removed components, summed over the adapters.
        shape: (m, n) of the weight.
    """
    m, n = shape
    return tokens * (rank * (m + n) / 14 + 3 * m) > m * n / 11


class _Source(NamedTuple):
    """A tensor that a kept weight was formed from, as it was then.

    Attributes:
        tensor: The tensor.
        memory: Another view of its memory; while it is held, no other tensor can come to lie there.
        version: How often torch had seen the tensor written.
        sample: Its `sample_fingerprint`.
        values: Its `fingerprint`.
    """

    tensor: Tensor
    memory: Tensor
    version: int
    sample: Tensor
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Source:
        return cls(tensor, tensor.detach(), tensor._version, sample_fingerprint(tensor), fingerprint(tensor))

    def is_unchanged(self, tensor: Tensor, *, in_doubt: bool) -> bool:
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.dtype == self.memory.dtype
            and tensor.is_set_to(self.memory)
            and (tensor.device.type != "cpu" or torch.equal(sample_fingerprint(tensor), self.sample))
            and (not in_doubt or torch.equal(fingerprint(tensor), self.values))
        )


class KeptWeight:
    """Forms W - B0 A0 and keeps it for as long as W, B0 and A0 are what they were.

    Writing to `tensor.data` leaves no trace in torch's counters. So values are compared, too: all of them after
    somebody has had the base layer from the adapter layer (`doubt`), as PEFT's other tuners do to merge into it; and an
    eleventh of them at each use on a CPU, where that costs little. What is left is a write through
    `.data` of a tensor that somebody has held since before: of single elements on a CPU, of any elsewhere, where
    comparing would mean to wait for the device.

    It is not copied, pickled or saved with the layer.
    """

    def __init__(self) -> None:
        self._sources: list[_Source] = []
        self._weight: Tensor | None = None
        self._in_doubt = False

    def __reduce__(self) -> tuple[type[KeptWeight], tuple[()]]:
        return KeptWeight, ()

    def drop(self) -> None:
        """Give the memory back; the next use forms the weight again."""
        self._sources, self._weight = [], None

    def doubt(self) -> None:
        """Compare values at the next use."""
        self._in_doubt = True

    def of(self, weight: nn.Parameter, adapters: Sequence[Factors], *, transposed: bool) -> Tensor:
        """The weight without the components that the adapters remove.

        Args:
            weight: The base weight, (m, n), or (n, m) if it is stored transposed.
            adapters: Factors of the adapters; only B0 and A0 of each are read.
            transposed: Whether the weight is stored as (n, m).

        Returns:
            W - B0 A0 (- B0' A0' ...), (m, n), computed in float32 and rounded once to the dtype of the weight.
        """
        tensors = [weight, *(tensor for factors in adapters for tensor in (factors.b0, factors.a0))]
        kept = self._weight
        if kept is not None and len(tensors) == len(self._sources):
            pairs = zip(self._sources, tensors, strict=True)
            if all(source.is_unchanged(tensor, in_doubt=self._in_doubt) for source, tensor in pairs):
                self._in_doubt = False
                return kept
        self.drop()
        with torch.inference_mode(False), torch.no_grad():
            sources = [_Source.of(tensor) for tensor in tensors]
            matrix = weight.T if transposed else weight
            frozen = [Factors(factors.b0, factors.a0) for factors in adapters]
            formed = effective_weight(matrix.detach(), frozen).to(weight.dtype)
        if type(formed) is Tensor:  # and no stand-in, under a dispatch mode
            self._sources, self._weight, self._in_doubt = sources, formed, False
        return formed
