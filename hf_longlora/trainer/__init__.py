"""Context extension in stages: stage -> callback -> model."""

from .config import LongLoraSFTConfig
from .sft_trainer import LongLoraSFTTrainer, last_checkpoint
from .stages import ContextStage, Schedule

__all__ = ["ContextStage", "LongLoraSFTConfig", "LongLoraSFTTrainer", "Schedule", "last_checkpoint"]
