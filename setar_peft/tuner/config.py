"""The configuration of a SeTAR adapter: what is adapted, by how much, and how the ratios are searched."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sized
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from setar_peft.decomposition import KnownSplit
from setar_peft.tuner.adapter_file import SavedShapes, check_adapter_file, file_digest, find_adapter_file
from setar_peft.tuner.config_checks import (
    check_search,
    check_targets,
    check_types,
    checked_candidates,
    checked_ratios,
)
from setar_peft.tuner.loading import CURRENT
from setar_peft.tuner.peft_type import SETAR

DEFAULT_CANDIDATES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)

# Fields that live only at run time: they are not written to adapter_config.json.
_RUNTIME_FIELDS = ("objective", "strict_base", "card", "known_splits", "saved_shapes")


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
    to `search_rank_ratios` needs neither. It is not changed by the model that it is used for: the model's own copy, in
    `peft_config`, has the resolved map of every adapted module's full name to its ratio, and no objective. (A config
    that is passed to a load, as `PeftModel.from_pretrained(..., config=config)`, is that model's from then on.)

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
        init_weights: `False`, with `finetune`, draws B and A at random, so that tests see an adapter that is not the
            identity.
        candidate_ratios: Ratios tried for each layer, in [0, 1): a list, or a mapping from weight type ("W_up", ...,
            "default") to a list. Ratio 0 is always among them at no cost: it is the incumbent.
        search: "greedy" evaluates every candidate of a layer (the paper's); "screened" those that the gradient of the
            objective predicts best, and as exactly.
        verify: How many candidates of a layer a screened search evaluates: by default 2, and 1 in the order
            "best_first".
        evaluations: How many candidates a screened search evaluates in all, at most, in the orders "best_first" and
            "joint"; by default as many as they take.
        order: Order in which the search visits the layers: one of "vision_text", "text_vision", "vision", "text",
            "interleaved", "exhaustive", or an explicit list of module names. A screened search also has "best_first"
            (the layers with a predicted gain, the largest first) and "joint" (all layers at once, in rounds).
        criterion: What a candidate must lower: the "total" loss (the paper's), its "id" or its "ood" part.
        passes: Number of times the search goes through all layers; it ends early when a pass changes nothing.
        recording_memory: GiB of recorded hidden states that the search may hold; by default half of the memory
            that is free. What does not fit is computed again; what stands for the images goes to a temporary file.
        objective: What the search minimises: an `Objective`, or a callable `model -> float`; `rank_ratios` is left out
            then. Lives at run time only; it is never serialised, copied or compared.
        strict_base: On loading, refuse a base that the factors are not known to come from instead of warning. Lives at
            run time only.
        card: What the model card is to say besides: license, tags, metrics (see `CardFacts`). Lives at run time only.
        known_splits: What a search has decomposed, by module name, so that the adapter need not do it again. Lives at
            run time only, and is not copied.
        saved_shapes: What is in the adapter's file that the config was read beside. Lives at run time only.
        factors_saved: Set in a saved adapter's file: its `rank_ratios` name the very modules that it adapts.
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
    search: str = "greedy"
    verify: int | None = None
    evaluations: int | None = None
    order: str | list[str] = "vision_text"
    criterion: str = "total"
    passes: int = 1
    recording_memory: float | None = None
    objective: Any = field(default=None, repr=False, compare=False)
    strict_base: bool = field(default=False, compare=False)
    card: CardFacts = field(default_factory=CardFacts, repr=False, compare=False)
    known_splits: dict[str, KnownSplit] = field(default_factory=dict, repr=False, compare=False)
    saved_shapes: SavedShapes | None = field(default=None, repr=False, compare=False)
    factors_saved: bool = False
    weights_sha256: str | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SETAR
        check_types(self)
        if not isinstance(self.card, CardFacts):
            raise ValueError(f"card is {self.card!r}; give a setar_peft.CardFacts.")
        splits = self.known_splits
        if not isinstance(splits, dict) or not all(isinstance(split, KnownSplit) for split in splits.values()):
            raise ValueError("known_splits is what search_rank_ratios hands over in its result's config; leave it out.")
        if not isinstance(self.saved_shapes, (SavedShapes, type(None))):
            raise ValueError(
                "saved_shapes is what SeTARConfig.from_pretrained reads of an adapter's file; leave it out."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        check_targets(self)
        self.rank_ratios = checked_ratios(self.rank_ratios)
        self.candidate_ratios = checked_candidates(self.candidate_ratios)
        check_search(self)

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
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json and, for an adapter, its model card (see `peft.PeftConfig.save_pretrained`)."""
        auto_mapping = kwargs.get("auto_mapping_dict")
        # PeftModel.save_pretrained, which passes a mapping, has written the weights by now; transformers does later.
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME) if "auto_mapping_dict" in kwargs else None
        saved = copy.copy(self)
        saved.weights_sha256 = file_digest(weights) if weights is not None and weights.is_file() else None
        super(SeTARConfig, saved).save_pretrained(save_directory, **kwargs)
        write_card = type(self).write_card
        if self.factors_saved and write_card is not None:
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
        if config.factors_saved:
            if not isinstance(config.rank_ratios, dict):
                raise ValueError(
                    f"The adapter_config.json of {pretrained_model_name_or_path} has no rank_ratios by module name. "
                    "Save the adapter again with save_pretrained."
                )
            hub_settings, _, _ = cls._split_kwargs(kwargs)
            path = find_adapter_file(pretrained_model_name_or_path, subfolder, **hub_settings)
            digest = config.weights_sha256 if path.name == SAFETENSORS_WEIGHTS_NAME else None
            config.saved_shapes, strongest = check_adapter_file(
                path, config.rank_ratios, finetune=config.finetune, digest=digest
            )
            load = CURRENT.get()
            if load is not None:
                load.strongest = strongest
        return config

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "objective": None, "known_splits": {}}
