"""Class prompts that begin alike ("a photo of a ..."): under causal attention their beginnings are one and the same.

So a beginning goes through the blocks once and not once for each class, and what follows the longest prompt's end does
not go through them at all.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from setar_peft.backbones.attention import attend


class Prompts(NamedTuple):
    """How the prompts of a batch lie in hidden states.

    Where they begin alike: in row 0 the common beginning, then padding, and in row i + 1 what follows in prompt i.
    Otherwise in row i prompt i.

    Attributes:
        beginning: Tokens of the common beginning; 0 where there is none to share.
        ends: Position of each prompt's end token in its row, (prompts,).
        tokens: Tokens a row, where the beginning is shared.
        mask: Which tokens the end may attend to, (prompts, tokens), bool; of whole prompts.
        blind: Whether some prompt's end may attend to no token at all.
    """

    beginning: int
    ends: Tensor
    tokens: int
    mask: Tensor
    blind: bool = False


def check_length(ids: Tensor, longest: int, *, exactly: bool = False) -> None:
    """Raise a `ValueError` unless prompts, (prompts, tokens), have a length that the model was trained with.

    Args:
        ids: The prompts' token ids.
        longest: The most tokens that the model takes.
        exactly: Whether it takes no fewer, either.
    """
    length = ids.shape[1]
    if length > longest or (exactly and length < longest):
        limit, padding = (f"exactly {longest}", "padding='max_length', ") if exactly else (f"at most {longest}", "")
        raise ValueError(
            f"The class prompts have {length} tokens; this model was trained with {limit}. Tokenise them with {padding}"
            f"max_length={longest}, truncation=True, as LoCoOpObjective.class_tokens does."
        )


def end_positions(ids: Tensor, end: int) -> Tensor:
    """Position of the first end token of each prompt, (prompts,).

    Args:
        ids: (prompts, tokens).
        end: The end token's id.

    Raises:
        ValueError: If a prompt has none.
    """
    ends = ids == end
    without = (~ends.any(-1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(
            f"{len(without)} of {len(ids)} class prompts have no end token (id {end}), the first of them number "
            f"{without[0]}, counted from 0: {ids[without[0]].tolist()}. The model reads a prompt at its end token; use "
            "the model's own tokenizer, or correct eos_token_id in the model's text_config."
        )
    return ends.int().argmax(-1)


def laid_out(ids: Tensor, ends: Tensor, attention_mask: Tensor | None) -> Prompts:
    """Find what prompts have in common.

    Args:
        ids: (prompts, tokens).
        ends: Position of each prompt's end token, (prompts,).
        attention_mask: (prompts, tokens), where the tokenizer gives one.
    """
    mask = torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]
    whole, blind = True, False
    if attention_mask is not None:
        whole = bool(attention_mask.bool()[mask].all())
        mask = mask & attention_mask.bool()
        blind = not whole and not bool(mask.any(-1).all())
    if blind:
        warnings.warn(
            "Some class prompts are read at a token before which there is only padding, so that their features mean "
            "nothing: the tokenizer pads on the left with the end token. Set tokenizer.padding_side = 'right'.",
            UserWarning,
            stacklevel=2,
        )
    longest = int(ends.max()) + 1
    alike = (ids == ids[:1]).all(0)[: int(ends.min())].long().cumprod(0)
    # At most half, so that the beginning fits into a row like the others.
    beginning = min(int(alike.sum()), longest // 2) if whole and len(ids) > 1 else 0
    return Prompts(beginning, ends - beginning, longest - beginning, mask, blind)


def shared(hidden: Tensor, prompts: Prompts) -> Tensor:
    """Hidden states of whole prompts, (prompts, tokens, width), with their common beginning in a row of its own."""
    first = F.pad(hidden[:1, : prompts.beginning], (0, 0, 0, prompts.tokens - prompts.beginning))
    return torch.cat([first, hidden[:, prompts.beginning : prompts.beginning + prompts.tokens]])


def block_step(block: Any, hidden: Tensor, prompts: Prompts) -> Tensor:
    """Hidden states with a shared beginning, (prompts + 1, tokens, width), past a block.

    Args:
        block: A block with `layer_norm1`, `self_attn`, `layer_norm2` and `mlp`, whose attention is causal.
        hidden: Its input.
        prompts: How the prompts lie in it.
    """
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    queries, keys, values = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    causal = torch.ones(prompts.tokens, prompts.tokens, dtype=torch.bool, device=hidden.device).tril()
    beginning = attend(queries[:1], keys[:1], values[:1], attention.head_dim, attention.scale, causal[None])
    follows = attend(
        queries[1:],
        with_beginning(keys, prompts),
        with_beginning(values, prompts),
        attention.head_dim,
        attention.scale,
        F.pad(causal, (prompts.beginning, 0), value=True)[None],
    )
    hidden = hidden + attention.out_proj(torch.cat([beginning, follows]))
    return hidden + block.mlp(block.layer_norm2(hidden))


def last_block_at_ends(block: Any, hidden: Tensor, prompts: Prompts) -> Tensor:
    """Each prompt's end token past the last block, (prompts, width): it alone attends and goes through the MLP.

    Args:
        block: As for `block_step`.
        hidden: Its input, with a shared beginning or of whole prompts.
        prompts: How the prompts lie in it.
    """
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    keys, values = attention.k_proj(normed), attention.v_proj(normed)
    mask, ends = prompts.mask.to(hidden.device), prompts.ends.to(hidden.device)
    if prompts.beginning:
        keys, values = with_beginning(keys, prompts), with_beginning(values, prompts)
        normed, hidden, mask = normed[1:], hidden[1:], mask[:, : keys.shape[1]]
    rows = torch.arange(len(hidden), device=hidden.device)
    query = attention.q_proj(normed[rows, ends][:, None])
    attended = attend(query, keys, values, attention.head_dim, attention.scale, mask[:, None])
    token = hidden[rows, ends] + attention.out_proj(attended)[:, 0]
    return token + block.mlp(block.layer_norm2(token))


def with_beginning(tokens: Tensor, prompts: Prompts) -> Tensor:
    """What follows in each prompt, (prompts, tokens, width), with the common beginning before it again."""
    count = len(tokens) - 1
    return torch.cat([tokens[:1, : prompts.beginning].expand(count, -1, -1), tokens[1:]], dim=1)
