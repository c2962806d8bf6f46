"""What a run leaves, and takes up again: checkpoints and their identity, cards, the report."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..hub.card import base_name, folder_card
from ..hub.run import RUN_NAME, read_facts, run_facts, write_facts
from ..modules import base_model
from ..rope import find_rope
from ..tuner import longlora_tuner
from ..tuner.config import read_shapes
from ..tuner.masters import full_precision
from ..tuner.stored import rope_seen_to
from .callbacks import ContextStageCallback
from .checkpoints import (
    STREAM_NAME,
    begin_checkpoint,
    check_complete,
    check_signature,
    last_checkpoint,
    optimizer_states,
    write_signature,
)
from .identity import adapter_settings, optimizer_settings, weights_fingerprint
from .report import write_report
from .staged import StagedTrainer
from .streams import StreamedRows, stage_data

logger = logging.get_logger(__name__)


class SavingTrainer(StagedTrainer):
    """What `LongLoraSFTTrainer` saves of a run, where TRL's trainer saves it too."""

    _stage_callback: ContextStageCallback
    _data: str
    _identity: dict[str, Any]

    @property
    def _base(self) -> str | None:
        """The base's name as others may read it; none of a model that was made in memory."""
        return base_name(base_model(self.model).config._name_or_path)

    @property
    def _own_name(self) -> str:
        """The model's name as its card has it."""
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    @property
    def _known(self) -> dict[str, str]:
        """Facts of the run before its first step."""
        return ({"base": self._base} if self._base else {}) | {"data": self._data} | self.stage_data

    @property
    def stage_data(self) -> dict[str, str]:
        """What each stage sees of the data: `data of stage 1` -> a line."""
        lines = {number: str(data) for number, data in self._stage_data.items()}
        if isinstance(self.train_dataset, StreamedRows):
            lines = {number: f"{line}, at its beginning" for number, line in lines.items()}
            lines |= {number: str(data) for number, data in stage_data(self._stream_state).items()}
        return {f"data of stage {number + 1}": line for number, line in lines.items()}

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Time spent inside doesn't count as training time in the log (tokens per second)."""
        before, stopped = self._last_log, time.perf_counter()
        yield
        if before is not None:  # an evaluation of several datasets evaluates each: only the whole of it counts
            since, tokens = before
            self._last_log = since + time.perf_counter() - stopped, tokens

    def _write_report(self) -> None:
        """Leave the report, and what `update_report` makes it from once the model has been evaluated."""
        if self.args.report and self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            write_signature(folder, self._signature())
            write_facts(folder, self._known | run_facts(self.args, self.state))
            write_report(folder, self.state.log_history, self.schedule)

    def create_model_card(  # type: ignore[override]  # TRL's signature, which isn't Trainer's either
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of an adapter into the output directory, from what has happened; TRL's for whole models.

        It needs the adapter to be saved there, as `save_model` and `push_to_hub` do before they call this.
        """
        folder = Path(str(self.args.output_dir))
        if longlora_tuner(self.model) is None:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero() and (folder / CONFIG_NAME).is_file():
            named = model_name not in (None, self._own_name.rpartition("/")[2])  # Trainer gives the name's last part
            name = model_name if named else None
            self._write_card(folder, dataset_name, [tags] if isinstance(tags, str) else tags or [], name)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and longlora_tuner(self.model) is not None:
            self._write_card(Path(output_dir or str(self.args.output_dir)))  # in the place of PEFT's

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As Trainer's, which pushes the output directory with the checkpoint's weights; here with its card, too."""
        for name in ("README.md", RUN_NAME):
            if self.args.should_save and Path(checkpoint_folder, name).is_file():
                shutil.copy(Path(checkpoint_folder, name), Path(str(self.args.output_dir), name))
        super()._push_from_checkpoint(checkpoint_folder)

    def _write_card(
        self, folder: Path, dataset_name: str | None = None, tags: Sequence[str] = (), name: str | None = None
    ) -> None:
        write_facts(folder, read_facts(folder) | self._known | run_facts(self.args, self.state))
        name, tags = name or self._own_name, [*self._tag_names, *tags]
        card = folder_card(folder, name=name, base_model=self._base, dataset=dataset_name, tags=tags)
        card.save(folder / "README.md")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            begin_checkpoint(Path(folder), self._signature() | {"tokens": self._total_train_tokens})
            if self._stream_state:
                Path(folder, STREAM_NAME).write_text(self._stream_state)
        # A checkpoint holds the fp32 masters, so that a resumed run is the same run; a saved adapter the base's dtype.
        with full_precision(), self._clock_stopped():
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with rope_seen_to():  # the stage that is resumed sets it
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        """As Trainer's, with the RoPE of the best checkpoint, which may be of a stage before the last."""
        with rope_seen_to():
            super()._load_best_model()
        step = max((self.state.best_global_step or 0) - 1, 0)
        self._stage_callback.apply(self.model, step)
        number, stages = self.schedule.step(step).stage, self.schedule.stages
        if number + 1 < len(stages):
            logger.warning(
                f"The best model is that of {self.state.best_model_checkpoint}, in stage {number + 1} of "
                f"{len(stages)}: it is for {stages[number].max_length:,} tokens."
            )

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As Trainer's; also True at a stage's end, so that `save_strategy="best"` saves there, too."""
        return (
            super()._determine_best_metric(*args, **kwargs)
            or self.schedule.last_step(self.state.global_step).last_of_stage
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the trainer's state is written next, and says that all else is there

    def _signature(self) -> dict[str, Any]:
        """What makes a run this run: a checkpoint of another one can't be resumed."""
        args = self.args
        streamed = isinstance(self.train_dataset, StreamedRows)
        return {
            **self.schedule.to_dict(),
            "seed": args.seed,
            "data_seed": args.data_seed,
            "batch_size": args.examples_a_step,
            "packing": args.packing_strategy if args.packing else None,
            "order": args.train_sampling_strategy,
            "examples": self._stage_examples,
            "streamed": [args.shuffle_buffer, args.max_examples] if streamed else None,
            "optimizer_states": optimizer_states(self.accelerator),
            **self._identity,
        }

    def _identify(self) -> dict[str, Any]:
        """What `_signature` says of adapter, base, data and optimizer: to be asked for before a step is done."""
        adapted = isinstance(self.model, PeftModel)
        # Of the first process: where FSDP sends the weights to the others, they have none yet.
        prints = [weights_fingerprint(self.model) if adapted else None, self._data_fingerprint]
        weights, data = broadcast_object_list(prints)
        rope = self._start.base or find_rope(self.model.config)
        return {
            "adapter": adapter_settings(self.model.active_peft_config) if adapted else None,
            "base": {"weights": weights, "rope": rope and rope.to_dict()},
            "ropes": [rope and rope.to_dict() for rope in self._ropes],
            "data": data,
            "optimizer": optimizer_settings(
                self.args, self.optimizer, self.lr_scheduler, self.optimizer_cls_and_kwargs
            ),
        }

    def _check_checkpoint(self, resume_from_checkpoint: Any) -> str:
        path: str | None
        if resume_from_checkpoint is True:
            directory = str(self.args.output_dir)
            path = last_checkpoint(directory)
            if path is None:
                raise ValueError(
                    f"There is no whole checkpoint in {directory} to resume from; call train() without one."
                )
        elif not os.path.isdir(path := os.fspath(resume_from_checkpoint)):
            raise ValueError(f"There is no checkpoint to resume from: {path} is no folder.")
        if self.args.ignore_data_skip:
            raise ValueError("`ignore_data_skip` would show the stage that is resumed the first stage's sequences.")
        tokens = check_signature(path, self._signature())
        scaled = getattr(self.accelerator, "scaler", None) is not None
        check_complete(path, self.args.world_size, scaled, isinstance(self.train_dataset, StreamedRows))
        adapted = longlora_tuner(self.model) is not None
        if adapted:
            read_shapes(path)
        self._total_train_tokens = tokens
        step = TrainerState.load_from_json(os.path.join(path, TRAINER_STATE_NAME)).global_step
        if step >= self.schedule.ends[-1] and self.is_world_process_zero():
            weights = "its adapter merged (hf-longlora merge)" if adapted else "its weights"
            logger.warning(
                f"{path} is of the run's last step, {step:,}: nothing is left to train. To train further, start a run "
                f"in another output_dir, with further stages, from {weights}."
            )
        return path
