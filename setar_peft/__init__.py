"""SeTAR as a PEFT tuner: training-free OOD detection by selective low-rank approximation.

Importing this package registers the method with PEFT, so that `get_peft_model(model, SeTARConfig(...))` and
`PeftModel.from_pretrained` know it.
"""

from setar_peft.evaluation import evaluate
from setar_peft.images import ImageSource
from setar_peft.losses import locoop_loss
from setar_peft.objective import LoCoOpObjective, Objective
from setar_peft.patch_metric import PatchMetricObjective
from setar_peft.search import SearchResult, SearchTrace, estimate_cost, search_rank_ratios
from setar_peft.tuner import SeTARConfig, SeTARLayer, SeTARModel
from setar_peft.tuner.card import CardFacts
from setar_peft.tuner.export import export_lora

__all__ = [
    "CardFacts",
    "ImageSource",
    "LoCoOpObjective",
    "Objective",
    "PatchMetricObjective",
    "SeTARConfig",
    "SeTARLayer",
    "SeTARModel",
    "SearchResult",
    "SearchTrace",
    "estimate_cost",
    "evaluate",
    "export_lora",
    "locoop_loss",
    "search_rank_ratios",
]

__version__ = "0.1.0"

# The tuner stands below the search and may not import it; here, above both, they meet.
SeTARModel.search = staticmethod(search_rank_ratios)
