"""SeTAR's cases for PEFT's own test matrix.

The names of the lists are those of PEFT's tests/test_custom_models.py, whose entries they take the place of.
"""

from __future__ import annotations

from dataclasses import dataclass

from setar_peft import SeTARConfig


@dataclass
class FinetunedSeTARConfig(SeTARConfig):
    """SeTAR+FT with a ratio by default: tests by config class give a config nothing but target modules."""

    rank_ratios: float | dict[str, float] | None = 0.5
    finetune: bool = True


def _finetuned(**kwargs: object) -> dict[str, object]:
    return {"rank_ratios": 0.5, "finetune": True, **kwargs}


TEST_CASES = [
    ("SeTAR+FT MLP name", "MLP", SeTARConfig, _finetuned(target_modules="lin0")),
    ("SeTAR+FT MLP first layer", "MLP", SeTARConfig, _finetuned(target_modules=["lin0"])),
    ("SeTAR+FT MLP last layer", "MLP", SeTARConfig, _finetuned(target_modules=["lin1"])),
    ("SeTAR+FT MLP both layers", "MLP", SeTARConfig, _finetuned(target_modules=["lin0", "lin1"])),
    (
        "SeTAR+FT MLP modules_to_save",
        "MLP",
        SeTARConfig,
        _finetuned(target_modules=["lin0"], modules_to_save=["lin1"]),
    ),
    (
        "SeTAR+FT MLP layer both targeted and saved",
        "MLP",
        SeTARConfig,
        _finetuned(target_modules=["lin0", "lin1"], modules_to_save=["lin1"]),
    ),
    (
        "SeTAR+FT MLP ratio map",
        "MLP",
        SeTARConfig,
        _finetuned(target_modules=["lin0", "lin1"], rank_ratios={"lin0": 0.3, "lin1": 0.5}),
    ),
    (
        "SeTAR+FT MLP ratio map names the targets",
        "MLP",
        SeTARConfig,
        {"finetune": True, "rank_ratios": {"lin0": 0.25, "lin1": 0.6}},
    ),
    ("SeTAR+FT MLP principal", "MLP", SeTARConfig, _finetuned(target_modules=["lin0"], prune="principal")),
    ("SeTAR+FT MLP random", "MLP", SeTARConfig, _finetuned(target_modules=["lin0"], prune="random", seed=3)),
    ("SeTAR+FT MLP2", "MLP2", SeTARConfig, _finetuned(target_modules=["lin0", "lin1"])),
    ("SeTAR+FT MLP_LayerNorm", "MLP_LayerNorm", SeTARConfig, _finetuned(target_modules=["lin0"])),
    # The Conv1D has one singular value: at this ratio it is removed.
    ("SeTAR+FT EmbConv1D", "EmbConv1D", SeTARConfig, _finetuned(target_modules=["conv1d"], rank_ratios=0.8)),
    (
        "SeTAR+FT EmbConv1D and Linear",
        "EmbConv1D",
        SeTARConfig,
        _finetuned(target_modules=["conv1d", "lin0"], rank_ratios=0.8),
    ),
    (
        "SeTAR+FT EmbConv1D modules_to_save",
        "EmbConv1D",
        SeTARConfig,
        _finetuned(target_modules=["conv1d"], rank_ratios=0.8, modules_to_save=["emb"]),
    ),
    ("SeTAR training-free MLP", "MLP", SeTARConfig, {"target_modules": ["lin0", "lin1"], "rank_ratios": 0.5}),
    (
        "SeTAR training-free MLP principal",
        "MLP",
        SeTARConfig,
        {"rank_ratios": {"lin0": 0.3, "lin1": 0.5}, "prune": "principal"},
    ),
    (
        "SeTAR training-free MLP random",
        "MLP",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.4, "prune": "random"},
    ),
    (
        "SeTAR training-free MLP modules_to_save",
        "MLP",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.5, "modules_to_save": ["lin1"]},
    ),
    ("SeTAR training-free EmbConv1D", "EmbConv1D", SeTARConfig, {"target_modules": ["lin0"], "rank_ratios": 0.5}),
]

ALL_PEFT_CONFIG_CLASSES = [FinetunedSeTARConfig]

_DRAWN = {"finetune": True, "init_weights": False}
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    (
        "SeTAR+FT Same",
        "setar",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.5, **_DRAWN},
        {"target_modules": ["lin0"], "rank_ratios": 0.3, **_DRAWN},
    ),
    (
        "SeTAR+FT Different",
        "setar",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.5, **_DRAWN},
        {"target_modules": ["lin1"], "rank_ratios": 0.5, **_DRAWN},
    ),
    (
        "SeTAR+FT and training-free Same",
        "setar",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.5, **_DRAWN},
        {"target_modules": ["lin0"], "rank_ratios": 0.3},
    ),
    (
        "SeTAR training-free Different",
        "setar",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.5},
        {"target_modules": ["lin1"], "rank_ratios": 0.5},
    ),
    (
        "SeTAR training-free Same minor and principal",
        "setar",
        SeTARConfig,
        {"target_modules": ["lin0"], "rank_ratios": 0.3},
        {"target_modules": ["lin0"], "rank_ratios": 0.3, "prune": "principal"},
    ),
]

MIXED_ADAPTER_TEST_CASES = [
    (
        "SeTAR mixed adapter",
        SeTARConfig(target_modules=["lin0"], rank_ratios=0.3),
        SeTARConfig(target_modules=["lin0"], rank_ratios=0.5, finetune=True, init_weights=False),
    ),
    (
        "SeTAR mixed adapter training-free",
        SeTARConfig(target_modules=["lin0"], rank_ratios=0.3),
        SeTARConfig(target_modules=["lin0"], rank_ratios=0.3, prune="principal"),
    ),
]
