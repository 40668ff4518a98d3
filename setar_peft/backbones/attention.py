"""Attention written out, for towers that need less of it than their blocks compute: some queries, or some keys once."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, head_dim: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Multi-head attention of some queries over all tokens, before the output projection: (batch, queries, width).

    Args:
        queries: (batch, queries, width), past their projection; keys and values likewise, (batch, tokens, width).
        keys: See `queries`.
        values: See `queries`.
        head_dim: Width of one head.
        scale: What the products of queries and keys are multiplied by.
        mask: (batch or 1, queries or 1, tokens), bool: which tokens may be attended to; by default all.
    """
    queries, keys, values = (
        part.view(*part.shape[:-1], -1, head_dim).transpose(1, 2) for part in (queries, keys, values)
    )
    # No fused kernel: with few queries, or short prompts, the weights are small, and this repeats the published figures
    # most closely.
    weights = (queries @ keys.transpose(-1, -2)) * scale
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None], -torch.inf)
    attended = weights.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    return attended.transpose(1, 2).flatten(-2)


def attended_by_first(
    normed: Tensor,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    head_dim: int,
    scale: float,
    *,
    first: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """The first tokens attend to all, each of the others to itself alone: (batch, tokens, width).

    The others thus take the value path (Miyai et al., 2023b, Zhou et al., 2022): with one token to attend to, attention
    is that token's value, and neither its query nor its key matters.

    Args:
        normed: What the attention reads, (batch, tokens, width).
        projections: The query, key and value layers.
        head_dim: Width of one head.
        scale: What the products of queries and keys are multiplied by.
        first: How many tokens attend.
        mask: (batch, tokens), bool: which tokens they may attend to; by default all.
    """
    query, key, value = projections
    values, keys = value(normed), key(normed)
    # Contiguous: on a strided input the same product may be summed in another order once the weights are frozen.
    attended = attend(
        query(normed[:, :first].contiguous()), keys, values, head_dim, scale, None if mask is None else mask[:, None]
    )
    return torch.cat([attended, values[:, first:]], dim=1)
