"""Splitting a weight into the components that are kept and those that are removed (paper, section 3.1).

Pure tensors: nothing here knows PEFT or a model.
"""

from __future__ import annotations

import hashlib
import numbers
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

PruneStrategy = Literal["minor", "principal", "random"]
PRUNE_STRATEGIES: tuple[str, ...] = get_args(PruneStrategy)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices are float32 inside: neither autocast nor TF32 rounds their operands.

    Args:
        device: Where the matrices are.
    """
    with ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if hasattr(torch.backends, "fp32_precision"):  # torch 2.9 and later, where asking the old way can fail
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


class Residual(NamedTuple):
    """The removed components of a weight W (m x n), as factors: W = W_hat + B0 @ A0.

    Attributes:
        b0: U * sqrt(S) over the removed components, (m, r) (paper, Eq. 7).
        a0: sqrt(S) * Vh over the removed components, (r, n) (paper, Eq. 8).
    """

    b0: Tensor
    a0: Tensor

    @property
    def rank(self) -> int:
        """Number of removed components r."""
        return self.b0.shape[1]


def check_rank_ratio(rank_ratio: float, where: str = "rank_ratio") -> float:
    """Return `rank_ratio` as a float if it is a share of components that can be removed.

    Args:
        rank_ratio: Share of singular components to remove, 0 <= ratio < 1.
        where: What the value is called in the error.

    Raises:
        ValueError: If it is not a number in [0, 1).
    """
    is_number = isinstance(rank_ratio, (int, float, numbers.Real)) and not isinstance(rank_ratio, bool)
    if not is_number or not 0 <= rank_ratio < 1:
        raise ValueError(
            f"{where} is {rank_ratio!r}; give a number in [0, 1): the share of singular components to remove, "
            "for example 0.2."
        )
    return float(rank_ratio)


def kept_rank(shape: tuple[int, int] | torch.Size, rank_ratio: float) -> int:
    """Number of singular components kept, round((1 - ratio) * min(m, n)) (paper, section 3.1).

    This is the one place that rounds; halves go to the even neighbour, as in the published code.

    Args:
        shape: (m, n) of the weight.
        rank_ratio: Share of components removed, 0 <= ratio < 1.

    Raises:
        ValueError: If the ratio is outside [0, 1).
    """
    return round((1 - check_rank_ratio(rank_ratio)) * min(shape))


def residual_rank(shape: tuple[int, int] | torch.Size, rank_ratio: float) -> int:
    """Number of singular components removed: min(m, n) - `kept_rank`."""
    return min(shape) - kept_rank(shape, rank_ratio)


class SplitSettings(NamedTuple):
    """What one layer's residual is computed from, apart from its weight."""

    rank_ratio: float
    prune: str
    seed: int
    name: str


class KnownSplit(NamedTuple):
    """A residual that was computed before, and of what.

    Attributes:
        settings: The settings it was computed with.
        digest: The weight's `tensor_digest`.
        residual: The removed components.
    """

    settings: SplitSettings
    digest: str
    residual: Residual


@dataclass(frozen=True)
class Decomposition(ABC):
    """The singular value decomposition W = U diag(S) Vh of one weight, from which every rank ratio is served.

    Attributes:
        shape: (m, n) of the weight.
        s: Singular values in decreasing order, (min(m, n),).
        removal_order: Indices of all components in the order in which a growing ratio removes them, so
            that the residual of a larger ratio contains the one of a smaller ratio.
    """

    shape: torch.Size
    s: Tensor
    removal_order: Tensor

    @abstractmethod
    def kept(self, rank_ratio: float) -> Tensor:
        """The kept part W_hat = W - B0 @ A0 of the weight, (m, n) (Eq. 5).

        Raises:
            ValueError: If the ratio is outside [0, 1).
        """

    @abstractmethod
    def residual_of(self, components: Tensor) -> Residual:
        """Factors B0 (m, r) and A0 (r, n) of the given components, (r,) integer indices."""

    @abstractmethod
    def contributions(self, gradient: Tensor) -> Tensor:
        """By how much removing each component changes a loss to first order: -sigma_i u_i^T G v_i, (min(m, n),).

        Args:
            gradient: G = dL/dW, (m, n), at the weight itself or at what is left of it.
        """

    def removed_components(self, rank_ratio: float) -> Tensor:
        """Indices of the components that `rank_ratio` removes, in decreasing order of singular value."""
        rank = residual_rank(self.shape, rank_ratio)
        return self.removal_order[:rank].sort().values

    def residual(self, rank_ratio: float) -> Residual:
        """Factors B0 (m, r) and A0 (r, n) of the components that `rank_ratio` removes.

        Raises:
            ValueError: If the ratio is outside [0, 1).
        """
        return self.residual_of(self.removed_components(rank_ratio))


@dataclass(frozen=True)
class _TwoSided(Decomposition):
    """Both sides' singular vectors, as LAPACK gives them: U (m, k) and Vh (k, n), with k = min(m, n)."""

    u: Tensor
    vh: Tensor

    def kept(self, rank_ratio: float) -> Tensor:
        # The sum over what is left repeats the published code's figures to the bit where the LAPACK is the same.
        keep = torch.ones_like(self.s, dtype=torch.bool)
        keep[self.removed_components(rank_ratio)] = False
        with exact_float32(self.u.device):
            return (self.u[:, keep] * self.s[keep]) @ self.vh[keep]

    def residual_of(self, components: Tensor) -> Residual:
        root = self.s[components].sqrt()
        return Residual((self.u[:, components] * root).contiguous(), root[:, None] * self.vh[components])

    def contributions(self, gradient: Tensor) -> Tensor:
        with exact_float32(self.u.device):
            return -self.s * ((self.u.T @ gradient.to(self.u.dtype)) * self.vh).sum(1)


@dataclass(frozen=True)
class _OneSided(Decomposition):
    """The weight W and the singular vectors of its shorter side, (k, k) with k = min(m, n), one a column.

    The other side's are W v_i / sigma_i, and are formed for what is removed: W_hat = W - (W V_r) V_r^T.
    """

    weight: Tensor
    vectors: Tensor

    def kept(self, rank_ratio: float) -> Tensor:
        removed = self.vectors[:, self.removed_components(rank_ratio)]
        with exact_float32(self.weight.device):
            tall = self._tall(self.weight.float())
            return self._tall(tall - (tall @ removed) @ removed.T)

    def residual_of(self, components: Tensor) -> Residual:
        vectors, root = self.vectors[:, components], self.s[components].sqrt()
        with exact_float32(self.weight.device):
            # A component that float32 cannot tell from 0 has one side of its own length and the other of none.
            scale = torch.where(self.s[components] > 1e-7 * self.s[:1], 1 / root, 0)
            long, short = (self._tall(self.weight.float()) @ vectors) * scale, vectors * root
        left, right = (short, long) if self._is_wide else (long, short)
        return Residual(left.contiguous(), right.T.contiguous())

    def contributions(self, gradient: Tensor) -> Tensor:
        # sigma_i u_i^T G v_i = v_i^T (W^T G) v_i, for which u_i need not exist.
        with exact_float32(self.weight.device):
            product = self._tall(self.weight.float()).T @ self._tall(gradient.float())
            return -((product @ self.vectors) * self.vectors).sum(0)

    @property
    def _is_wide(self) -> bool:
        return self.shape[0] < self.shape[1]

    def _tall(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._is_wide else matrix


def decompose(
    weight: Tensor,
    prune: PruneStrategy = "minor",
    *,
    seed: int = 0,
    name: str = "weight",
    by_gram: bool | None = None,
) -> Decomposition:
    """Decompose a weight W = U diag(S) Vh (paper, Eq. 4) in float32, or in float64 if it is float64.

    Args:
        weight: The matrix W, (m, n), of any floating dtype.
        prune: Which components a ratio removes: the smallest singular values ("minor", the paper's method),
            the largest ("principal"), or a random draw ("random"; paper, Table 18).
        seed: Seed of the random draw. One draw a layer: `name` is mixed into the seed, so that the draw
            depends neither on the order of layers nor on the process.
        name: Name of the layer, for the errors and for the random draw.
        by_gram: Whether by the eigenvectors of the smaller Gram matrix, W^T W or W W^T, in float64, which takes a
            little more than half as long as an SVD and is nearer to the exact split than one in float32 (`python -m
            benchmarks.decompositions`). By default on a GPU alone, whose SVD is iterative and slow (pytorch issue
            41306): on a CPU LAPACK's SVD repeats the published code's figures to its own rounding. A float64 weight,
            of which a Gram matrix would lose half the digits, always goes through an SVD.

    Raises:
        ValueError: If the weight is not a 2-D floating matrix, holds NaN or infinity, or `prune` is unknown.
    """
    if prune not in PRUNE_STRATEGIES:
        raise ValueError(f"prune is {prune!r}; give one of {', '.join(map(repr, PRUNE_STRATEGIES))}.")
    if weight.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; only a 2-D weight (of a Linear or a Conv1D) can be split. "
            "Take it out of target_modules."
        )
    if not weight.is_floating_point():
        raise ValueError(
            f"{name} has dtype {weight.dtype}; only a floating-point weight can be split. "
            "Dequantise it, or take it out of target_modules."
        )
    matrix = weight.detach()
    if matrix.dtype != torch.float64:
        matrix = matrix.float()
    if not torch.isfinite(matrix).all():
        raise ValueError(
            f"{name} holds NaN or infinity, so it has no singular values. Load the checkpoint again, "
            "or take the layer out of target_modules."
        )
    order = _removal_order(min(matrix.shape), prune, seed, name).to(matrix.device)
    if (matrix.is_cuda if by_gram is None else by_gram) and matrix.dtype == torch.float32:
        values, vectors = gram_eigenvectors(matrix)
        return _OneSided(matrix.shape, values, order, weight.detach(), vectors)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _TwoSided(matrix.shape, s, order, u, vh)


def gram_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of a float32 matrix (m, n) and the singular vectors of its shorter side.

    In float64 the Gram matrix loses less than float32 can hold.

    Returns:
        S (k,) in decreasing order, and the vectors (k, k), one a column, with k = min(m, n), float32.
    """
    exact = matrix.double()
    gram = exact @ exact.T if matrix.shape[0] < matrix.shape[1] else exact.T @ exact
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0).sqrt().float(), vectors.flip(1).float().contiguous()


def tensor_digest(tensor: Tensor) -> str:
    """A digest of a tensor's shape, dtype and values: equal for equal tensors, wherever they are."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# So many of the strongest components of a residual say whether it came from a weight as well as all of them.
CHECKED_COMPONENTS = 4


def base_agreement(weight: Tensor, residual: Residual) -> float:
    """How well a residual's four strongest components fit a weight: <B0 A0, W> / ||B0 A0||^2 over them.

    It is 1 for the weight that the residual came from and near 0 for an unrelated one; NaN for an empty residual, and
    not finite where a value is not or overflows. The product B0 A0 is never formed.

    Args:
        weight: W, (m, n), on any device.
        residual: B0 (m, r), A0 (r, n), components in decreasing order, as `Decomposition.residual` gives them.
    """
    b0, a0 = _strongest(residual, weight.device)
    inner = (torch.nn.functional.linear(a0, weight.detach().to(b0.dtype)).T * b0).sum()
    norm = ((b0.T @ b0) * (a0 @ a0.T)).sum()
    return float(inner / norm)


def is_rounding_noise(weight: Tensor, residual: Residual) -> bool:
    """Whether a residual is too small beside the weight to be more than rounding: ||B0 A0|| below 1e-6 ||W||."""
    b0, a0 = _strongest(residual, weight.device)
    norm = ((b0.T @ b0) * (a0 @ a0.T)).sum().clamp(min=0).sqrt()
    return bool(norm <= 1e-6 * torch.linalg.vector_norm(weight.detach().to(b0.dtype)))


def _strongest(residual: Residual, device: torch.device) -> Residual:
    dtype = torch.float64 if residual.b0.dtype == torch.float64 else torch.float32
    b0, a0 = residual.b0.detach()[:, :CHECKED_COMPONENTS], residual.a0.detach()[:CHECKED_COMPONENTS]
    return Residual(b0.to(device, dtype), a0.to(device, dtype))


def _removal_order(size: int, prune: PruneStrategy, seed: int, name: str) -> Tensor:
    if prune == "minor":
        return torch.arange(size - 1, -1, -1)
    if prune == "principal":
        return torch.arange(size)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(size, generator=generator)
