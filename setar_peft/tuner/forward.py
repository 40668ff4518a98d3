"""What adapters do to a linear layer, as functions of tensors: on its weight, or on its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from setar_peft.decomposition import exact_float32


class Factors(NamedTuple):
    """The factors of one adapter: W becomes W - B0 A0, and W - B0 A0 + B A when it is fine-tuned.

    Attributes:
        b0: Removed components, (m, r); frozen.
        a0: Removed components, (r, n); frozen.
        b: Trained factor, (m, r), or `None`.
        a: Trained factor, (r, n), or `None`.
    """

    b0: Tensor
    a0: Tensor
    b: Tensor | None = None
    a: Tensor | None = None

    @property
    def negated(self) -> Factors:
        """The factors that undo these: W becomes W + B0 A0 (- B A)."""
        return self._replace(b0=-self.b0, b=None if self.b is None else -self.b)


def removes_nothing(factors: Factors) -> bool:
    """Whether an adapter removes no component, and so changes nothing."""
    return factors.b0.shape[1] == 0


def effective_weight(weight: Tensor, adapters: Iterable[Factors]) -> Tensor:
    """The weight that a layer has with its adapters, W - B0 A0 (+ B A) summed over them.

    Args:
        weight: W, (m, n).
        adapters: Factors of each adapter.

    Returns:
        (m, n), in float32 or wider whatever autocast and TF32 are set to, so that it is rounded once, by whoever
        stores it; differentiable in B and A.
    """
    with exact_float32(weight.device):
        for factors in adapters:
            if removes_nothing(factors):
                continue
            dtype = torch.promote_types(torch.promote_types(weight.dtype, factors.b0.dtype), torch.float32)
            weight = torch.addmm(weight.to(dtype), factors.b0.to(dtype), factors.a0.to(dtype), alpha=-1)
            if factors.b is not None and factors.a is not None:
                weight = torch.addmm(weight, factors.b.to(dtype), factors.a.to(dtype))
    return weight


def adapter_output(x: Tensor, factors: Factors) -> Tensor:
    """What an adapter adds to the layer's output: -B0 (A0 x) (+ B (A x)).

    Args:
        x: Input, (..., n), of the dtype of B0 and A0.
        factors: The adapter's factors.

    Returns:
        (..., m), of the dtype of B0 and A0; under autocast of autocast's.
    """
    b0, a0, b, a = factors
    if b is None or a is None:
        return F.linear(F.linear(x, a0), -b0)
    # One product with 2 r rows instead of two with r: at the start the two halves cancel.
    left = torch.cat([b.to(b0.dtype), -b0], dim=1)
    right = torch.cat([a.to(a0.dtype), a0], dim=0)
    return F.linear(F.linear(x, right), left)


def trained_output(x: Tensor, factors: Factors) -> Tensor:
    """What training has put in place of the removed components, B (A x): (..., m) of x (..., n).

    Args:
        x: Input, of the dtype of B0 and A0.
        factors: The adapter's factors; `b` and `a` are not `None`.
    """
    b0, a0, b, a = factors
    assert b is not None
    assert a is not None
    return F.linear(F.linear(x, a.to(a0.dtype)), b.to(b0.dtype))
