"""Context extension in stages: stage -> callback -> model."""

from .config import LongLoraSFTConfig
from .sft_trainer import LongLoraSFTTrainer
from .stages import ContextStage, Schedule

__all__ = ["ContextStage", "LongLoraSFTConfig", "LongLoraSFTTrainer", "Schedule"]
