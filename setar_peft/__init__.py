"""SeTAR as a PEFT tuner: training-free OOD detection by selective low-rank approximation.

Importing this package registers the method with PEFT, so that `get_peft_model(model, SeTARConfig(...))` and
`PeftModel.from_pretrained` know it.
"""

from setar_peft.losses import locoop_loss
from setar_peft.objective import LoCoOpObjective, Objective
from setar_peft.search import SearchResult, SearchTrace, search_rank_ratios
from setar_peft.tuner import SeTARConfig, SeTARLayer, SeTARModel

__all__ = [
    "LoCoOpObjective",
    "Objective",
    "SeTARConfig",
    "SeTARLayer",
    "SeTARModel",
    "SearchResult",
    "SearchTrace",
    "locoop_loss",
    "search_rank_ratios",
]

__version__ = "0.1.0"

# The tuner stands below the search and may not import it; here, above both, they meet.
SeTARModel.search = staticmethod(search_rank_ratios)
