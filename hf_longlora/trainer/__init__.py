"""Context extension in stages: stage -> callback -> model."""

from ..schedule import ContextStage, Schedule
from .checkpoints import last_checkpoint
from .config import LongLoraSFTConfig
from .plans import StagePlan, plan_stages
from .report import update_report
from .sft_trainer import LongLoraSFTTrainer

__all__ = [
    "ContextStage",
    "LongLoraSFTConfig",
    "LongLoraSFTTrainer",
    "Schedule",
    "StagePlan",
    "last_checkpoint",
    "plan_stages",
    "update_report",
]
