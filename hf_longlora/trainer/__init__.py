"""Context extension in stages: stage -> callback -> model."""

from .checkpoints import last_checkpoint
from .config import LongLoraSFTConfig
from .report import update_report
from .sft_trainer import LongLoraSFTTrainer
from .stages import ContextStage, Schedule

__all__ = ["ContextStage", "LongLoraSFTConfig", "LongLoraSFTTrainer", "Schedule", "last_checkpoint", "update_report"]
