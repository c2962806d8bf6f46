"""What the parts of the staged trainer know of its run."""

from typing import Any

from datasets import Dataset, IterableDataset
from trl import SFTTrainer

from ..rope import RopeScaling
from ..schedule import Schedule
from .config import LongLoraSFTConfig
from .data import StageData
from .ropes import Start


class StagedTrainer(SFTTrainer):
    """TRL's trainer, with what `LongLoraSFTTrainer` sets up for its parts: `rows`, `saving`, `trouble`, `pieces`."""

    args: LongLoraSFTConfig
    model: Any
    schedule: Schedule
    _start: Start
    _ropes: list[RopeScaling | None]
    """Of each stage; `None` where it is the model's."""
    _columns: set[str]
    """The training dataset's, as it was given."""
    _train_source: Dataset | IterableDataset | None
    """The training dataset until it is prepared."""
    _rows: Any
    """`train_dataset` as it was made."""
    _stage_examples: list[int]
    """Rows that each stage could be served."""
    _stage_data: dict[int, StageData]
    _data_fingerprint: str
    _stream_state: str
    """Where the stream stood at the last batch."""
    _steps_done: int
    """Micro-steps of a run that is resumed in shards."""
    _last_log: tuple[float, int] | None
    """When it was, in seconds, and the tokens by then."""
    _last_batch: dict[str, Any]
