"""What a search or a training minimises."""

from setar_peft.objectives.base import Objective
from setar_peft.objectives.locoop import LoCoOpObjective
from setar_peft.objectives.patch_metric import PatchMetricObjective

__all__ = ["LoCoOpObjective", "Objective", "PatchMetricObjective"]
