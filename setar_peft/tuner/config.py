"""The configuration of a SeTAR adapter: what is adapted, by how much, and how the ratios are searched."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable, Mapping, Sized
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from setar_peft.decomposition import PRUNE_STRATEGIES, check_rank_ratio
from setar_peft.tuner.adapter_file import SavedShapes, check_adapter_file, file_digest, find_adapter_file
from setar_peft.tuner.peft_type import SETAR

if TYPE_CHECKING:
    from setar_peft.tuner.layer import KnownSplit

ORDERS = ("vision_text", "text_vision", "vision", "text", "interleaved", "exhaustive")
CRITERIA = ("total", "id", "ood")
DEFAULT_CANDIDATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)

# Fields that live only at run time: they are not written to adapter_config.json.
_RUNTIME_FIELDS = ("objective", "strict_base", "card")


@dataclass
class CardFacts:
    """What a card can say beyond an adapter's config. It lives at run time; only the card holds it.

    Attributes:
        license: The adapter's license, as the Hub spells it ("apache-2.0"); none is claimed by default.
        tags: Further tags for the Hub.
        objective: Settings of the objective that the ratios were searched with.
        metrics: Data set -> metric -> value, for example {"iNaturalist": {"FPR95": 26.9, "AUROC": 94.7}}.
    """

    license: str | None = None
    tags: list[str] = field(default_factory=list)
    objective: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def objective_settings(objective: object) -> dict[str, Any]:
    """What a card says of an objective: its name, and those of its public attributes that are plain values."""
    if objective is None:
        return {}
    kind = getattr(objective, "__name__", type(objective).__name__)
    values = getattr(objective, "__dict__", {})
    plain = {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and isinstance(value, (bool, int, float, str))
    }
    names = values.get("class_names")
    counts = {"classes": len(names)} if isinstance(names, (list, tuple)) else {}
    if isinstance(objective, Sized):
        counts["images"] = len(objective)
    return {"objective": kind, **plain, **counts}


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
        candidate_ratios: Ratios tried for each layer, in [0, 1): a list, or a mapping from weight type ("W_up", ...,
            "default") to a list. Ratio 0 is always among them at no cost: it is the incumbent.
        order: Order in which the search visits the layers: one of "vision_text", "text_vision", "vision", "text",
            "interleaved", "exhaustive", or an explicit list of module names.
        criterion: What a candidate must lower: the "total" loss (the paper's), its "id" or its "ood" part.
        passes: Number of times the search goes through all layers; it ends early when a pass changes nothing.
        recording_memory: GiB of recorded hidden states that the search may hold; by default half of the memory
            that is free. What does not fit is computed again; what stands for the images goes to a temporary file.
        objective: What the search minimises: an `Objective`, or a callable `model -> float`. Lives at run time
            only; it is never serialised, copied or compared.
        strict_base: On loading, refuse a base that the factors did not come from instead of warning. Lives at run
            time only.
        card: What the model card is to say besides: license, tags, metrics (see `CardFacts`). Lives at run time only.
        factors_saved: Set in a saved adapter's file: the factors come with it, so loading runs no decomposition.
        weights_sha256: Set in a saved adapter's file: SHA-256 of the file of its factors.

    Raises:
        ValueError: If a field has a value outside its range; the message names the field.
    """

    # Writes the model card: `(folder, config, auto_mapping)`. Set by the package, since the Hub stands above the tuner.
    write_card: ClassVar[Callable[..., None] | None] = None

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
    candidate_ratios: list[float] | tuple[float, ...] | dict[str, list[float]] = DEFAULT_CANDIDATES
    order: str | list[str] = "vision_text"
    criterion: str = "total"
    passes: int = 1
    recording_memory: float | None = None
    objective: Any = field(default=None, repr=False, compare=False)
    strict_base: bool = field(default=False, compare=False)
    card: CardFacts = field(default_factory=CardFacts, repr=False, compare=False)
    factors_saved: InitVar[bool] = False
    weights_sha256: InitVar[str | None] = None

    def __post_init__(self, factors_saved: bool, weights_sha256: str | None) -> None:
        super().__post_init__()
        self.peft_type = SETAR
        # A config out of a saved adapter: its factors are in a file, and no decomposition is run to create them.
        self.awaits_factors = bool(factors_saved)
        # What is in that file, once it was read.
        self.saved_shapes: SavedShapes | None = None
        self._weights_sha256 = weights_sha256
        # Set by the search: what it decomposed, by module name, so that the adapter need not do it again.
        self.known_splits: dict[str, KnownSplit] = {}
        # Set by the tuner: names of the model's parameters that required gradients before the adapter came.
        self.trainable_before: set[str] = set()
        # Set by the tuner: this config belongs to an adapter, so what is saved of it has factors beside it.
        self.factors_created = False
        self._check_types()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_targets()
        self._check_ratios()
        self._check_search()

    def candidates_of(self, weight_type: str) -> tuple[float, ...]:
        """The ratios that are evaluated for layers of a weight type: ratio 0, the incumbent, is not among them.

        Args:
            weight_type: "W_up" and so on, or a module's own name where it has no such name.

        Raises:
            ValueError: If `candidate_ratios` is a mapping that names neither the weight type nor "default".
        """
        ratios = self.candidate_ratios
        if isinstance(ratios, dict):
            if weight_type not in ratios and "default" not in ratios:
                raise ValueError(
                    f"candidate_ratios gives ratios for {', '.join(ratios)}, but {weight_type} is searched too. Add "
                    f"{weight_type!r} or 'default'."
                )
            ratios = ratios.get(weight_type, ratios.get("default", ()))
        return tuple(ratio for ratio in ratios if ratio > 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields that adapter_config.json holds, as plain values; run-time fields are left out."""
        values = {
            item.name: copy.deepcopy(getattr(self, item.name))
            for item in fields(self)
            if item.name not in _RUNTIME_FIELDS
        }
        # A set has another order in each process; the same config is to give the same file.
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
        if isinstance(self.candidate_ratios, tuple):
            values["candidate_ratios"] = list(self.candidate_ratios)
        values["weights_sha256"] = self._weights_sha256
        values["factors_saved"] = self.awaits_factors or self.factors_created
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, for an adapter, its model card (see `peft.PeftConfig.save_pretrained`)."""
        auto_mapping = kwargs.get("auto_mapping_dict")
        # PeftModel.save_pretrained, which passes a mapping, has written the weights by now; transformers does later.
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME) if "auto_mapping_dict" in kwargs else None
        self._weights_sha256 = file_digest(weights) if weights is not None and weights.is_file() else None
        super().save_pretrained(save_directory, **kwargs)
        write_card = type(self).write_card
        if self.factors_created and write_card is not None:
            write_card(save_directory, self, auto_mapping)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> SeTARConfig:
        """Read the config of a saved adapter from a folder or the Hub (see `peft.PeftConfig.from_pretrained`).

        The adapter's file is checked against the config at the same time, before a model is touched; from the Hub, it
        is downloaded for this.

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
            hub_settings, _, _ = cls._split_kwargs(kwargs)
            path = find_adapter_file(pretrained_model_name_or_path, subfolder, **hub_settings)
            if path is None:
                raise ValueError(
                    f"{pretrained_model_name_or_path} has an adapter_config.json of a saved adapter, but no "
                    f"{SAFETENSORS_WEIGHTS_NAME}. Copy or download the adapter again, with both files."
                )
            digest = config._weights_sha256 if path.name == SAFETENSORS_WEIGHTS_NAME else None
            config.saved_shapes = check_adapter_file(path, config.rank_ratios, finetune=config.finetune, digest=digest)
        return config

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "objective": None, "known_splits": {}}

    def _check_types(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            text = isinstance(value, str) and name != "modules_to_save"
            if value is not None and not text and not _is_names(value):
                raise ValueError(f"{name} is {value!r}; give a list of names of modules.")
            if text and name != "layers_pattern":
                try:
                    re.compile(value)
                except (re.error, OverflowError) as error:
                    raise ValueError(f"{name} is {value!r}, which is no regular expression ({error}).") from None
        blocks = self.layers_to_transform
        if blocks is not None and not (
            _is_integer(blocks) or (isinstance(blocks, (list, tuple)) and all(map(_is_integer, blocks)))
        ):
            raise ValueError(f"layers_to_transform is {blocks!r}; give the index of a block, or a list of indices.")
        for name in ("base_model_name_or_path", "revision", "_weights_sha256"):
            if not isinstance(getattr(self, name), (str, os.PathLike, type(None))):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a string.")
        if not isinstance(self.card, CardFacts):
            raise ValueError(f"card is {self.card!r}; give a setar_peft.CardFacts.")
        if not isinstance(self.auto_mapping, (dict, type(None))):
            raise ValueError(f"auto_mapping is {self.auto_mapping!r}; it is a mapping that PEFT writes.")

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
        for name in ("finetune", "init_weights", "strict_base", "inference_mode"):
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
        if isinstance(self.candidate_ratios, dict):
            self.candidate_ratios = {
                weight_type: list(_checked_candidates(ratios, f"candidate_ratios[{weight_type!r}]"))
                for weight_type, ratios in self.candidate_ratios.items()
            }
        else:
            self.candidate_ratios = _checked_candidates(self.candidate_ratios, "candidate_ratios")
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion is {self.criterion!r}; give one of {', '.join(map(repr, CRITERIA))}.")
        if isinstance(self.order, str):
            if self.order not in ORDERS:
                raise ValueError(
                    f"order is {self.order!r}; give one of {', '.join(map(repr, ORDERS))}, or a list of module names."
                )
        elif not self.order or not _is_names(self.order):
            raise ValueError(f"order is {self.order!r}; an explicit order is a list of module names, top first.")
        if not _is_integer(self.passes) or self.passes < 1:
            raise ValueError(f"passes is {self.passes!r}; give an integer of 1 or more.")
        memory = self.recording_memory
        if memory is not None and not (isinstance(memory, (int, float)) and 0 <= memory < math.inf):
            raise ValueError(
                f"recording_memory is {memory!r}; give a number of GiB, or None for half of the free memory."
            )


def _checked_candidates(ratios: object, where: str) -> tuple[float, ...]:
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
