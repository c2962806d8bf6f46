"""TRL's SFTTrainer over stages of growing context."""

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import trl
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerState, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..attention import set_attention_mode, set_s2_attention
from ..hub.run import write_facts
from ..modules import base_model
from ..parallel import sequence_group
from ..rope import find_rope, forget_lengths, rope_factor
from .callbacks import ContextStageCallback, StageProgressCallback, longlora_tuner
from .checkpoints import STREAM_NAME, last_checkpoint, refuse_others
from .columns import check_rows, check_tokens, read_columns
from .compiling import compiled_layers
from .config import LongLoraSFTConfig
from .data import (
    COLUMNS,
    StageData,
    column_names,
    describe,
    limited,
    longest_document,
    order,
    say_data,
    whole,
    with_length,
)
from .guards import Run, check_replicas, check_saving
from .identity import data_fingerprint
from .offload import PartialOffload
from .pieces import PiecewiseTrainer
from .ropes import check_lengths
from .saving import SavingTrainer
from .sequences import (
    InShards,
    ShardableCollator,
    ShardedLoss,
    own_attention,
    parallelism_config,
    shards_in_turn,
)
from .sparse import check_unmasked
from .streams import StreamCollator, StreamedRows
from .tiles import tile_mlps
from .trouble import beginnings, diverged, has_diverged, out_of_memory, peak_memory
from .windows import Served, WindowCollator

logger = logging.get_logger(__name__)

LAST_GOOD_NAME = "last-good"


class LongLoraSFTTrainer(SavingTrainer, PiecewiseTrainer, ShardedLoss):
    """Extend a model's context in stages, in one run (LongLoRA, arXiv 2309.12307).

    A [`~trl.SFTTrainer`] in everything but this: sequences, RoPE, group size and attention follow the stages of
    `args`. Each stage has its own view of the dataset, tokenised once and truncated or packed to the stage's length;
    one dataloader serves them in order, shuffled by `args.data_seed` (else `args.seed`), under one learning rate
    schedule and one log history. A run resumed from a checkpoint ends as the unbroken one would.

    Args:
        model: A model's name or path, a [`~transformers.PreTrainedModel`], or a [`~peft.PeftModel`] with a LONGLORA
            adapter. It is switched to `attn_implementation="s2attn"`.
        args: The stages and everything that `SFTConfig` has.
        train_dataset: Raw text, conversations, prompt-completion pairs or token ids, as TRL takes them. Of a stream
            (`IterableDataset`) each stage reads what its steps take, from where the stage before it stopped.
        peft_config: A [`LongLoraConfig`], or `None` to train all weights (or the adapter of a `PeftModel`).
        eval_dataset: What TRL takes. It is cut or packed to the last stage's length once, so that losses of all stages
            are of the same text and can be compared; attention is dense, RoPE that of the stage that is trained.
        kwargs: The remaining arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: before training starts, if the stages, the model, the adapter and the dataset don't fit together.
        TypeError: if `args` is not a [`LongLoraSFTConfig`] or `train_dataset` no dataset and no stream.
    """

    _tag_names = ["trl", "sft", "longlora", "hf_longlora"]
    _name = "LongLoRA SFT"
    _paper = {
        "title": "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
        "id": "2309.12307",
        "citation": (
            "@inproceedings{chen2024longlora,\n"
            "  title     = {{LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models}},\n"
            "  author    = {Yukang Chen and Shengju Qian and Haotian Tang and Xin Lai and Zhijian Liu and Song Han "
            "and Jiaya Jia},\n"
            "  booktitle = {International Conference on Learning Representations},\n"
            "  year      = 2024\n"
            "}"
        ),
    }

    args: LongLoraSFTConfig
    model: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: LongLoraSFTConfig,
        *,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LongLoraSFTConfig):
            raise TypeError(f"`args` must be a LongLoraSFTConfig with its stages, got {type(args).__name__}.")
        args = copy.copy(args)  # what is resolved here is of this model, and the caller may have others
        run = Run.of(model, args, train_dataset, peft_config, kwargs)  # refused here, while the model is as it was
        train_dataset = limited(train_dataset, args.max_examples)
        self.schedule, self._start, self._ropes, self._columns = run.schedule, run.start, run.ropes, run.columns
        self._stage_callback = ContextStageCallback(self.schedule, self._ropes)
        if isinstance(model, str):
            given: Any = args.model_init_kwargs
            args.model_init_kwargs = {"attn_implementation": "s2attn"} | dict(given or {})
        else:
            set_s2_attention(model)
        self._train_source: Dataset | IterableDataset | None = train_dataset
        self._stage_examples: list[int] = []
        self._stage_data: dict[int, StageData] = {}
        self._stream_state = ""  # of what was last trained on
        if args.mlp_tile is not None and args.use_liger_kernel:
            # Liger's MLP would shadow the tiled one.
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "swiglu": False, "geglu": False}
        if args.sequence_parallel > 1:
            args.parallelism_config = parallelism_config(args.sequence_parallel, args.world_size)
        self._steps_done = 0  # micro-steps of a run that is resumed in shards
        set_seed(args.seed)  # TRL before 1.16 leaves the adapter's random start unseeded
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=whole(eval_dataset, args.max_eval_examples),
            peft_config=peft_config,
            callbacks=[self._stage_callback, *(callbacks or [])],
            **kwargs,
        )
        set_s2_attention(self.model)  # loaded by its name it has the attention that its arguments ask for, if any
        check_replicas(args)
        if self.schedule.any_windows:
            self.data_collator = WindowCollator(self.data_collator)
        self._data = describe(train_dataset, args)
        self._last_log: tuple[float, int] | None = None
        self._last_batch: dict[str, Any] = {}
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
            self.add_callback(StageProgressCallback(self.schedule))
        tuner = longlora_tuner(self.model)
        if tuner is not None:
            check_saving(self.accelerator)
            tuner.upcast_masters()  # TRL casts what a quantized model trains to bf16; before DDP sees it
            adapter: Any = self.model.active_peft_config
            adapter.schedule = self.schedule.to_dict()
            # TRL loads the base at a revision and doesn't tell PEFT, which would load the adapter on another one.
            if isinstance(model, str) and (revision := (given or {}).get("revision", "main")) != "main":
                adapter.revision = revision
        self._identity = self._identify()
        if args.selective_checkpointing and isinstance(self.model, PeftModel):
            # TRL changes the method of the PeftModel, and transformers >= 5.24 calls another.
            trl.models.enable_selective_activation_checkpointing(base_model(self.model))
        if args.mlp_tile is not None:
            tile_mlps(self.model, args.mlp_tile)
        if args.offload_share < 1:
            self.maybe_activation_offload_context = PartialOffload(args.offload_share)
            self.maybe_activation_offload_context.update_model_params(self.model)
        self._stage_callback.apply(self.model, 0, self.processing_class)
        set_attention_mode(self.model, "auto")

    # ----------------------------------------------------------------------------------------------------------------
    # Data

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Any:
        """Of the training dataset, what each stage will see, one after the other. Other datasets: as TRL does."""
        prepare = super()._prepare_dataset
        if dataset is not self._train_source:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._train_source = None  # the first that TRL prepares; an evaluation set may be the same object
        if isinstance(dataset, IterableDataset) and formatting_func is None:
            dataset = check_rows(dataset, read_columns(self._columns, args.dataset_text_field))
        # TRL tokenises, then truncates or packs; without a length it stops in between.
        tokenized: Any = prepare(
            dataset, processing_class, with_length(args, None), False, formatting_func, dataset_name
        )
        names = column_names(tokenized)
        masked = "labels" in names and bool(
            self.completion_only_loss or args.assistant_only_loss or "labels" in self._columns
        )
        longest: list[int] = []
        served: list[Dataset] = []

        def look(number: int, view: Dataset, data: StageData) -> None:
            self._stage_data[number] = data
            longest.append(longest_document(view) if data.used else 0)
            if self.schedule.has_windows(number):
                check_unmasked(view)

        vocabulary = self._start.config.get_text_config().vocab_size
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
            # `train_batch_size` counts GPUs that Trainer has yet to find to hold one model between them.
            batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.data_parallel
            strategy = args.packing_strategy if packing else None
            for number, stage in enumerate(self.schedule.stages):
                own = with_length(args, stage.max_length)
                view = prepare(tokenized, processing_class, own, packing, None, f"stage {number + 1}")
                self._stage_examples.append(len(view))
                wanted = stage.max_steps * batch
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
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.data_parallel
            rows = self._remove_unused_columns(kwargs["dataset"], description="training")
            kwargs["dataset"] = Served(rows, self.args.order_seed, self.schedule, batch)
        collator = self.data_collator
        if self.args.sequence_parallel > 1:
            self.data_collator = ShardableCollator(collator, self.args.sequence_parallel)
        if streamed:
            self.data_collator = StreamCollator(collator)
        try:
            return super()._get_dataloader(**kwargs)
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # the order is in the dataset already: stage after stage, shuffled within
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        if args.sequence_parallel == 1:
            return SequentialSampler(dataset)
        batch = args.train_batch_size, args.sequence_parallel, args.data_parallel
        return InShards(len(dataset), *batch, done=self._steps_done)

    # ----------------------------------------------------------------------------------------------------------------
    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Run all stages; with `resume_from_checkpoint`, from where that checkpoint stands.

        Raises:
            ValueError: if there is no such checkpoint, it is of another run, it lacks what a run is resumed from, or
                its adapter is damaged; or if `output_dir` has checkpoints of another run, and this one saves some.
            FileNotFoundError: if its adapter is missing.
            FloatingPointError: if a loss or a gradient is not finite (the weights before that step are kept), or the
                loss has grown beyond that of a uniform guess.
            torch.OutOfMemoryError: with what would help.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._check_checkpoint(resume_from_checkpoint)
        if self.args.save_strategy != "no":
            refuse_others(str(self.args.output_dir), self._signature(), bool(self.args.save_total_limit))
        if isinstance(self.train_dataset, StreamedRows):
            self._stream_state, done = "", 0
            if resume_from_checkpoint:
                state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
                self._stream_state = Path(resume_from_checkpoint, STREAM_NAME).read_text()
                done = state.global_step * self._signature()["batch_size"]
            self.train_dataset.resume(self._stream_state, done)
        self._last_log = (time.perf_counter(), self._total_train_tokens)
        if self.is_world_process_zero():
            write_facts(Path(str(self.args.output_dir)), self._known)
        size = self.args.sequence_parallel
        if size > 1 and resume_from_checkpoint:
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            # Trainer can't skip batches that are cut into shards: they are read from where the run stands.
            self._steps_done = state.global_step * self.args.gradient_accumulation_steps
            self.args.ignore_data_skip = True
        try:
            with compiled_layers(self.model, self.args.compile_layers), own_attention(self.model, size):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            message = out_of_memory(self.args, self.schedule, self.state.global_step, self.model)
            raise torch.OutOfMemoryError(message) from error
        except FloatingPointError:
            self._write_report()
            raise
        finally:
            set_attention_mode(self.model, "auto")  # the run may have been stopped in a dense step
            if size > 1:
                self._steps_done, self.args.ignore_data_skip = 0, False
        self._write_report()
        return output

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        forget_lengths(self.model)  # dynamic RoPE: a batch's numbers don't depend on the lengths of those before
        if not self.is_model_parallel:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # `device_map` has spread the model over GPUs, with its head on the last. Trainer counts tokens and wants the
        # loss on the first, and TRL's kernel runs on the current one.
        device = self.model.get_output_embeddings().weight.device
        if isinstance(kwargs.get("num_items_in_batch"), torch.Tensor):
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"].to(device)
        with torch.cuda.device(device):
            result = super().compute_loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return result[0].to(self.args.device), *result[1:]
        return result.to(self.args.device)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self._stream_state = inputs.pop("stream", self._stream_state)
        self._last_batch = {key: inputs[key] for key in ("input_ids", "position_ids") if key in inputs}
        # PEFT casts each adapter's input to its fp32 weights, and autocast casts it back: bit by bit the same, but
        # four copies of the hidden states a layer, written twice and kept for the backward.
        with disable_input_dtype_casting(self.model, active=self.args.bf16 or self.args.fp16):
            loss = super().training_step(model, inputs, *args, **kwargs)
        # Alone, a process stops at the loss; several stop together, at the gradients that they share.
        if self.args.world_size == 1 and not loss.isfinite():
            self._stop_at_divergence("loss")
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Trainer's, which it asks for before each optimizer step; the run stops at one that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        # fp16's loss scaler skips such steps by itself, and DeepSpeed's engine has taken the step by now.
        if not (self.args.fp16 or self.is_deepspeed_enabled) and not torch.as_tensor(norm).isfinite():
            self._stop_at_divergence("gradient")
        return norm

    def _stop_at_divergence(self, what: str) -> NoReturn:
        """Keep the weights, which the step has not touched, and stop the run."""
        step = self.schedule.step(self.state.global_step)
        path = os.path.join(str(self.args.output_dir), LAST_GOOD_NAME)
        self.save_model(path, _internal_call=True)  # which keeps it from the Hub
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} (stage {step.stage + 1}) is not finite. The weights "
            f"before it are in {path}. The last batch begins with {self._documents}. Lower the learning rate, clip "
            "gradients (max_grad_norm), or look at the data."
        )

    def _check_losses(self) -> None:
        """Raise a `FloatingPointError` if the loss has grown beyond that of a uniform guess.

        It goes by the log, which all processes have alike.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        losses = [float(entry["loss"]) for entry in self.state.log_history if "loss" in entry]
        if has_diverged(losses, vocabulary):
            checkpoint = last_checkpoint(str(self.args.output_dir))
            raise FloatingPointError(
                diverged(
                    losses, vocabulary, self._last_step.stage, self.state.global_step, self._documents, checkpoint
                )
            )

    @property
    def _documents(self) -> str:
        """How the documents of this process's last batch begin."""
        return beginnings(self._last_batch, self.processing_class)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._clock_stopped():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with own_attention(self.model, self.args.sequence_parallel):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if self.args.sequence_parallel == 1:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if not prediction_loss_only:
            raise ValueError(
                "With `sequence_parallel` no process has the logits of a whole row: set `prediction_loss_only`."
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._loss_in_turns(model, self._prepare_inputs(inputs)), None, None

    def _loss_in_turns(self, model: Any, inputs: Any) -> torch.Tensor:
        """That of this process's batch, where a group goes through those of all its processes in shards.

        accelerate cuts no batches of evaluations, and a long row would have to fit one card.
        """
        group = sequence_group(self.model)
        assert group is not None
        losses = []
        for shard in shards_in_turn(inputs, group):
            labels = (shard["shift_labels"] != -100).sum()
            mean = super().compute_loss(model, shard)  # of no label: 0 or not a number
            found = torch.stack([torch.where(labels > 0, mean.float() * labels, 0), labels])
            dist.all_reduce(found, group=group)
            losses.append(found[0] / found[1].clamp(min=1))
        return losses[dist.get_rank(group)]

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """TRL's logs, and the stage's: stage, context length, RoPE factor, speed and peak memory.

        The attention of the step goes to the log history alone: trackers take numbers.
        """
        if "loss" not in logs or not self.model.training:
            return super().log(logs, start_time)
        step = self._last_step
        stage = self.schedule.stages[step.stage]
        now, tokens = time.perf_counter(), self._total_train_tokens
        if self._last_log is not None:
            since, before = self._last_log
            logs["tokens_per_second"] = (tokens - before) / max(now - since, 1e-9)
        self._last_log = now, tokens
        logs["stage"] = step.stage + 1
        logs["context_length"] = stage.max_length
        rope = find_rope(self.model.config)
        base, length = self._start.base, self._start.base_length
        logs["rope_factor"] = rope_factor(rope, base, length) if rope is not None else 1.0
        logs["peak_memory_gib"] = peak_memory(self.args.device)
        super().log(logs, start_time)
        last: dict[str, Any] = self.state.log_history[-1]
        last["attention"] = {"auto": "s2attn", "windows": self.schedule.sparse_by(step.stage)}.get(
            step.mode, step.mode
        )
        self._check_losses()
