"""The rows of a run: each stage's own view of the data, one after the other, and how they come to a step."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from .checkpoints import STREAM_NAME
from .columns import check_evaluated, check_rows, check_tokens, read_columns, said_of
from .data import COLUMNS, StageData, column_names, lengths, order, say_data, with_length
from .identity import data_fingerprint
from .ropes import check_lengths
from .sequences import InShards, ShardableCollator
from .sparse import check_unmasked
from .staged import StagedTrainer
from .streams import StreamCollator, StreamedRows
from .windows import Served

SAID = "sequence-length-is-longer-than-the-specified-maximum"
"""Tokenizers warn once that a text is longer than the base took and "will result in indexing errors": here it is meant
to be, and they are told that they have said it."""


class RowsTrainer(StagedTrainer):
    """A trainer whose training data are what each stage sees of them, in order."""

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        """The training dataset as each stage will see it, one after the other. Data for evaluation: as TRL does."""
        prepare = super()._prepare_dataset
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        getattr(tokenizer, "deprecation_warnings", {})[SAID] = True
        vocabulary = self._start.config.get_text_config().vocab_size
        if dataset is not self._train_source:
            what = check_evaluated(dataset, args, formatting_func, dataset_name)
            prepared = prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
            if isinstance(prepared, Dataset):
                with said_of(what):
                    check_tokens(prepared, vocabulary)
            return prepared
        self._train_source = None  # the first that TRL prepares; an evaluation set may be the same object
        if isinstance(dataset, IterableDataset) and formatting_func is None:
            dataset = check_rows(dataset, read_columns(self._columns, args.dataset_text_field))
        # TRL tokenises, then truncates or packs; without a length it stops in between.
        tokenized: Any = prepare(
            dataset, processing_class, with_length(args, None), False, formatting_func, dataset_name
        )
        names = column_names(tokenized)
        masked = "labels" in names and bool(
            self.completion_only_loss or args.assistant_only_loss or self._columns & {"labels", "assistant_masks"}
        )
        longest: list[int] = []
        served: list[Dataset] = []

        def look(number: int, view: Dataset, data: StageData) -> None:
            self._stage_data[number] = data
            longest.append(int(lengths(view).max(initial=0)) if data.used else 0)
            if self.schedule.has_windows(number):
                check_unmasked(view)

        if isinstance(tokenized, IterableDataset):
            documents = tokenized.select_columns([name for name in COLUMNS if name in names])
            rows = StreamedRows(documents, args, self.schedule, masked, vocabulary)
            head = rows.head()
            self._data_fingerprint = data_fingerprint(head)
            for number in range(len(self.schedule.stages)):
                look(number, *rows.view(head, number))
        else:
            check_tokens(tokenized, vocabulary)
            self._data_fingerprint = data_fingerprint(tokenized)
            strategy = args.packing_strategy if packing else None
            for number, stage in enumerate(self.schedule.stages):
                own = with_length(args, stage.max_length)
                view = prepare(tokenized, processing_class, own, packing, None, f"stage {number + 1}")
                self._stage_examples.append(len(view))
                wanted = stage.max_steps * args.examples_a_step
                look(number, view, StageData.of(tokenized, view, stage.max_length, strategy, masked, wanted))
                if len(view) > 0:
                    shuffle = args.train_sampling_strategy != "sequential"
                    served.append(view.select(order(len(view), wanted, args.order_seed + number + 1, shuffle)))
        check_lengths(self._start, self.schedule, self._ropes, longest)
        if args.process_index == 0:
            say_data(list(self._stage_data.values()), args)
        return rows if isinstance(tokenized, IterableDataset) else concatenate_datasets(served)

    def _get_dataloader(self, **kwargs: Any) -> DataLoader:  # type: ignore[override]  # Trainer calls it by names
        streamed = kwargs.get("is_training") and isinstance(kwargs["dataset"], StreamedRows)
        if kwargs.get("is_training") and self.schedule.any_windows and not streamed:
            rows = self._remove_unused_columns(kwargs["dataset"], description="training")
            kwargs["dataset"] = Served(rows, self.args.order_seed, self.schedule, self.args.examples_a_step)
        collator, drop_last = self.data_collator, self.args.dataloader_drop_last
        if self.args.sequence_parallel > 1:
            self.data_collator = ShardableCollator(collator, self.args.sequence_parallel)
            # `InShards` reads whole batches, if need be of more rows than there are: accelerate would take the last of
            # them for padding, and leave their tokens out of what is counted.
            self.args.dataloader_drop_last = drop_last or bool(kwargs.get("is_training"))
        if streamed:
            self.data_collator = StreamCollator(collator)
        try:
            return super()._get_dataloader(**kwargs)
        finally:
            self.data_collator, self.args.dataloader_drop_last = collator, drop_last

    @contextmanager
    def _rows_from(self, checkpoint: Any) -> Iterator[None]:
        """Inside, rows are read from where a checkpoint stands; without one, from the first."""
        step = 0
        if checkpoint:
            step = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME)).global_step
        if isinstance(self.train_dataset, StreamedRows):
            self._stream_state = Path(checkpoint, STREAM_NAME).read_text() if checkpoint else ""
            self.train_dataset.resume(self._stream_state, step * self.args.examples_a_step)
        sharded = self.args.sequence_parallel > 1
        if sharded and checkpoint:
            # Trainer can't skip batches that are cut into shards: they are read from where the run stands.
            self._steps_done, self.args.ignore_data_skip = step * self.args.gradient_accumulation_steps, True
        try:
            yield
        finally:
            if sharded:
                self._steps_done, self.args.ignore_data_skip = 0, False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # the order is in the dataset already: stage after stage, shuffled within
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.sequence_parallel == 1:
            return SequentialSampler(dataset)
        batch = args.train_batch_size, args.sequence_parallel, args.data_parallel
        return InShards(len(dataset), *batch, done=self._steps_done)
