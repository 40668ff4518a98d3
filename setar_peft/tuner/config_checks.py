"""Checks of the values in a config: each returns the value as the config holds it, or raises a `ValueError`."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft.utils.warning import PeftWarning

from setar_peft.decomposition import PRUNE_STRATEGIES, check_rank_ratio

SEARCHES = ("greedy", "screened")
SCREENED_ORDERS = ("best_first", "joint")
ORDERS = ("vision_text", "text_vision", "vision", "text", "interleaved", "exhaustive", *SCREENED_ORDERS)
CRITERIA = ("total", "id", "ood")


def check_types(config: Any) -> None:
    """Check the fields that PEFT reads: names of modules, blocks and what a file says of its origin."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        value = getattr(config, name)
        text = isinstance(value, str) and name != "modules_to_save"
        if value is not None and not text and not _is_names(value):
            raise ValueError(f"{name} is {value!r}; give a list of names of modules.")
        if text and name != "layers_pattern":
            try:
                re.compile(value)
            except (re.error, OverflowError) as error:
                raise ValueError(f"{name} is {value!r}, which is no regular expression ({error}).") from None
    blocks = config.layers_to_transform
    if blocks is not None and not (
        _is_integer(blocks) or (isinstance(blocks, (list, tuple)) and all(map(_is_integer, blocks)))
    ):
        raise ValueError(f"layers_to_transform is {blocks!r}; give the index of a block, or a list of indices.")
    for name in ("base_model_name_or_path", "revision", "weights_sha256"):
        if not isinstance(getattr(config, name), (str, os.PathLike, type(None))):
            raise ValueError(f"{name} is {getattr(config, name)!r}; give a string.")
    if not isinstance(config.auto_mapping, (dict, type(None))):
        raise ValueError(f"auto_mapping is {config.auto_mapping!r}; it is a mapping that PEFT writes.")
    for name in ("finetune", "init_weights", "strict_base", "inference_mode", "factors_saved"):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} is {getattr(config, name)!r}; give True or False.")


def check_targets(config: Any) -> None:
    """Check which modules are adapted, and how."""
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        raise ValueError(
            "layers_to_transform cannot be combined with a regular expression in target_modules: put the block "
            "numbers into the expression, or give target_modules as a list of names."
        )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError(
            f"layers_pattern is {config.layers_pattern!r} but layers_to_transform is not given: say which blocks."
        )
    if config.prune not in PRUNE_STRATEGIES:
        raise ValueError(f"prune is {config.prune!r}; give one of {', '.join(map(repr, PRUNE_STRATEGIES))}.")
    if not _is_integer(config.seed) or config.seed < 0:
        raise ValueError(f"seed is {config.seed!r}; give an integer of 0 or more.")
    # PEFT's own tests set it for every method, so that it is no error.
    if not config.init_weights and not config.finetune and not config.factors_saved:
        warnings.warn(
            "init_weights=False changes nothing without finetune=True: there are no factors B, A to draw at random.",
            PeftWarning,
            stacklevel=2,
        )
    if config.objective is not None and config.rank_ratios is not None:
        raise ValueError(
            "rank_ratios and objective are both given: ratios that are known are not searched for. Leave one out; "
            "settings of the objective for the model card go into CardFacts(objective=...)."
        )


def checked_ratios(ratios: Any) -> float | dict[str, float] | None:
    """The ratios as floats."""
    if ratios is None:
        return None
    if not isinstance(ratios, Mapping):
        return check_rank_ratio(ratios, "rank_ratios")
    if not ratios:
        raise ValueError(
            "rank_ratios is an empty mapping; name at least one module, or give one number for every target."
        )
    for name in ratios:
        if not isinstance(name, str) or not name:
            raise ValueError(f"rank_ratios has the key {name!r}; a key is the name of a module.")
    return {name: check_rank_ratio(ratio, f"rank_ratios[{name!r}]") for name, ratio in ratios.items()}


def checked_candidates(ratios: Any) -> tuple[float, ...] | dict[str, list[float]]:
    """The candidates as floats: a tuple, or a list for each weight type."""
    if isinstance(ratios, dict):
        return {
            weight_type: list(_checked_list(values, f"candidate_ratios[{weight_type!r}]"))
            for weight_type, values in ratios.items()
        }
    return _checked_list(ratios, "candidate_ratios")


def check_search(config: Any) -> None:
    """Check how the ratios are searched."""
    if config.criterion not in CRITERIA:
        raise ValueError(f"criterion is {config.criterion!r}; give one of {', '.join(map(repr, CRITERIA))}.")
    if isinstance(config.order, str):
        if config.order not in ORDERS:
            raise ValueError(
                f"order is {config.order!r}; give one of {', '.join(map(repr, ORDERS))}, or a list of module names."
            )
    elif not config.order or not isinstance(config.order, (list, tuple)) or not _is_names(config.order):
        raise ValueError(f"order is {config.order!r}; an explicit order is a list of module names, top first.")
    if config.search not in SEARCHES:
        raise ValueError(f"search is {config.search!r}; give one of {', '.join(map(repr, SEARCHES))}.")
    if config.order in SCREENED_ORDERS and config.search != "screened":
        raise ValueError(
            f"order is {config.order!r}, which goes by predictions, and search is {config.search!r}; add "
            "search='screened' (--search screened), or take another order."
        )
    for name, wanted, is_used in (
        ("verify", "candidates a layer to evaluate", config.search == "screened" and config.order != "joint"),
        ("evaluations", "candidates to evaluate in all", config.order in SCREENED_ORDERS),
    ):
        value = getattr(config, name)
        if value is not None and (not _is_integer(value) or value < 1):
            raise ValueError(f"{name} is {value!r}; give the number of {wanted}, 1 or more.")
        if value is not None and not is_used:
            raise ValueError(
                f"{name} is {value}, which search={config.search!r} with order={config.order!r} does not ask for: "
                "verify is for search='screened' (--search screened) in every order but 'joint', evaluations for the "
                "orders 'best_first' and 'joint'. Leave it out, or change those."
            )
    if config.order == "joint" and config.passes != 1:
        raise ValueError(
            f"passes is {config.passes!r}, and order 'joint' goes on for as long as a round takes anything; leave "
            "passes out, or bound the search with evaluations."
        )
    if not _is_integer(config.passes) or config.passes < 1:
        raise ValueError(f"passes is {config.passes!r}; give an integer of 1 or more.")
    memory = config.recording_memory
    if memory is not None and not (isinstance(memory, (int, float)) and 0 <= memory < math.inf):
        raise ValueError(f"recording_memory is {memory!r}; give a number of GiB, or None for half of the free memory.")


def _checked_list(ratios: object, where: str) -> tuple[float, ...]:
    if not isinstance(ratios, (list, tuple)):
        raise ValueError(f"{where} is {ratios!r}; give a list of numbers in [0, 1).")
    checked = tuple(check_rank_ratio(ratio, where) for ratio in ratios)
    if not any(checked):
        raise ValueError(f"{where} is {ratios!r}, which has no ratio above 0, so there is nothing to search.")
    if len(set(checked)) != len(checked):
        raise ValueError(f"{where} is {list(checked)}; give each ratio once.")
    return checked


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) and name for name in value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
