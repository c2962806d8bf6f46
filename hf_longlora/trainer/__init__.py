"""Context extension in stages, by TRL's trainer.

config          arguments
sft_trainer     the trainer: what happens when, in the terms of the files below (`staged`: what they share)
guards          what a run is refused for; of its data `columns`, of its RoPE `ropes`, of windows `sparse`
callbacks       a step puts its stage on the model
rows            the data of all stages as one dataset: `data`, `windows`, `streams`
pieces          a step in windows as several forwards
sequences       sequences that several processes share
tiles, compiling, offload    memory and speed of long sequences
trouble         divergence, and memory that is not enough
saving          checkpoints and which run they are of (`checkpoints`, `identity`), cards, `report`
plans           what a run takes, before it is loaded
"""

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
