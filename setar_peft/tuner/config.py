"""The configuration of a SeTAR adapter: what is adapted, by how much, and how the ratios are searched."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from setar_peft.decomposition import PRUNE_STRATEGIES, check_rank_ratio
from setar_peft.tuner.checkpoint import check_adapter_folder
from setar_peft.tuner.peft_type import SETAR

ORDERS = ("vision_text", "text_vision", "vision", "text", "interleaved", "exhaustive")
DEFAULT_CANDIDATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)

# Fields that live only at run time: they are not written to adapter_config.json.
_RUNTIME_FIELDS = ("objective", "strict_base")


@dataclass
class SeTARConfig(PeftConfig):
    """Configuration of a SeTAR adapter (Li et al., NeurIPS 2024).

    Give `rank_ratios` to adapt with known ratios, or `objective` to have them searched; a config that is handed
    to `search_rank_ratios` needs neither. When the adapter is created, the config's `rank_ratios` becomes the
    resolved map of every adapted module's full name to its ratio, and the objective is let go of.

    Args:
        target_modules: Names (suffixes of module names), a regular expression, or "all-linear". By default W_up
            of the model type, or the keys of `rank_ratios` if those are a mapping.
        exclude_modules: Names or a regular expression of modules to leave alone.
        layers_to_transform: Index or indices of the blocks to adapt.
        layers_pattern: Name of the module list that `layers_to_transform` counts in.
        modules_to_save: Names of modules that are trained in full and saved with the adapter.
        rank_ratios: Share of singular components removed, in [0, 1): one number for every target, or a mapping.
            A key of the mapping is the full name of a module, or a suffix of names; the full name wins. A target
            that no key matches gets ratio 0.
        prune: Which components are removed: "minor" (the paper's method), "principal" or "random".
        seed: Seed of the random strategy.
        finetune: Train the removed components (SeTAR+FT): the output starts at the base's and the factors B, A
            are trainable. By default nothing is.
        init_weights: `False` draws B and A at random, so that tests see an adapter that is not the identity.
        candidate_ratios: Ratios tried for each layer, in [0, 1). Ratio 0 is always among them at no cost: it is
            the incumbent.
        order: Order in which the search visits the layers: one of "vision_text", "text_vision", "vision", "text",
            "interleaved", "exhaustive", or an explicit list of module names.
        passes: Number of times the search goes through all layers; it ends early when a pass changes nothing.
        recording_memory: GiB of recorded hidden states that the search may hold; by default half of the memory
            that is free. What does not fit is computed again.
        objective: What the search minimises: an `Objective`, or a callable `model -> float`. Lives at run time
            only; it is never serialised, copied or compared.
        strict_base: On loading, refuse a base that the factors did not come from instead of warning. Lives at run
            time only.
        factors_saved: Set in a saved adapter's file: the factors come with it, so loading runs no decomposition.

    Raises:
        ValueError: If a field has a value outside its range; the message names the field.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_ratios: float | dict[str, float] | None = None
    prune: str = "minor"
    seed: int = 0
    finetune: bool = False
    init_weights: bool = True
    candidate_ratios: list[float] | tuple[float, ...] = DEFAULT_CANDIDATES
    order: str | list[str] = "vision_text"
    passes: int = 1
    recording_memory: float | None = None
    objective: Any = field(default=None, repr=False, compare=False)
    strict_base: bool = field(default=False, compare=False)
    factors_saved: InitVar[bool] = False

    def __post_init__(self, factors_saved: bool) -> None:
        super().__post_init__()
        self.peft_type = SETAR
        # A config out of a saved adapter: its factors are in a file, and no decomposition is run to create them.
        self.awaits_factors = bool(factors_saved)
        # The weight shapes that the factors in the file were made for, by module name.
        self.saved_shapes: dict[str, tuple[int, int]] = {}
        # Set by the tuner: this config belongs to an adapter, so what is saved of it has factors beside it.
        self.factors_created = False
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_targets()
        self._check_ratios()
        self._check_search()

    @property
    def candidates(self) -> tuple[float, ...]:
        """The candidate ratios that are evaluated: ratio 0, the incumbent, is not among them."""
        return tuple(ratio for ratio in self.candidate_ratios if ratio > 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields that adapter_config.json holds, as plain values; run-time fields are left out."""
        values = {
            item.name: copy.deepcopy(getattr(self, item.name))
            for item in fields(self)
            if item.name not in _RUNTIME_FIELDS
        }
        values["candidate_ratios"] = list(self.candidate_ratios)
        values["factors_saved"] = self.awaits_factors or self.factors_created
        return values

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SeTARConfig:
        """Read the config of a saved adapter from a folder or the Hub (see `peft.PeftConfig.from_pretrained`).

        A folder's adapter file is checked against the config at the same time, before a model is touched.

        Raises:
            ValueError: If there is no such config, it holds a wrong value, or the adapter file beside it is damaged
                or belongs to another config.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if config.awaits_factors:
            if not isinstance(config.rank_ratios, dict):
                raise ValueError(
                    f"The adapter_config.json of {pretrained_model_name_or_path} has no rank_ratios by module name. "
                    "Save the adapter again with save_pretrained."
                )
            folder = Path(pretrained_model_name_or_path, subfolder or "")
            config.saved_shapes = check_adapter_folder(folder, config.rank_ratios, finetune=config.finetune)
        return config

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "objective": None}

    def _check_targets(self) -> None:
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform cannot be combined with a regular expression in target_modules: put the block "
                "numbers into the expression, or give target_modules as a list of names."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r} but layers_to_transform is not given: say which blocks."
            )
        if self.prune not in PRUNE_STRATEGIES:
            raise ValueError(f"prune is {self.prune!r}; give one of {', '.join(map(repr, PRUNE_STRATEGIES))}.")
        if not _is_integer(self.seed) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; give an integer of 0 or more.")
        for name in ("finetune", "init_weights", "strict_base"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give True or False.")

    def _check_ratios(self) -> None:
        if self.rank_ratios is None:
            return
        if isinstance(self.rank_ratios, Mapping):
            if not self.rank_ratios:
                raise ValueError(
                    "rank_ratios is an empty mapping; name at least one module, or give one number for every target."
                )
            for name, ratio in self.rank_ratios.items():
                if not isinstance(name, str) or not name:
                    raise ValueError(f"rank_ratios has the key {name!r}; a key is the name of a module.")
                check_rank_ratio(ratio, f"rank_ratios[{name!r}]")
            self.rank_ratios = {name: float(ratio) for name, ratio in self.rank_ratios.items()}
        else:
            self.rank_ratios = check_rank_ratio(self.rank_ratios, "rank_ratios")

    def _check_search(self) -> None:
        if not isinstance(self.candidate_ratios, (list, tuple)):
            raise ValueError(f"candidate_ratios is {self.candidate_ratios!r}; give a list of numbers in [0, 1).")
        self.candidate_ratios = tuple(check_rank_ratio(ratio, "candidate_ratios") for ratio in self.candidate_ratios)
        if not self.candidates:
            raise ValueError("candidate_ratios has no ratio above 0, so there is nothing to search.")
        if len(set(self.candidate_ratios)) != len(self.candidate_ratios):
            raise ValueError(f"candidate_ratios is {list(self.candidate_ratios)}; give each ratio once.")
        if isinstance(self.order, str):
            if self.order not in ORDERS:
                raise ValueError(
                    f"order is {self.order!r}; give one of {', '.join(map(repr, ORDERS))}, or a list of module names."
                )
        elif not self.order or not all(isinstance(name, str) for name in self.order):
            raise ValueError(f"order is {self.order!r}; an explicit order is a list of module names, top first.")
        if not _is_integer(self.passes) or self.passes < 1:
            raise ValueError(f"passes is {self.passes!r}; give an integer of 1 or more.")
        memory = self.recording_memory
        if memory is not None and not (isinstance(memory, (int, float)) and 0 <= memory < math.inf):
            raise ValueError(
                f"recording_memory is {memory!r}; give a number of GiB, or None for half of the free memory."
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
