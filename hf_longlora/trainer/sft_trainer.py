"""TRL's SFTTrainer over stages of growing context."""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput

from ..attention import set_attention_mode, set_s2_attention
from ..hub.run import write_facts
from ..modules import base_model
from ..rope import find_rope, forget_lengths, rope_factor
from ..tuner import longlora_tuner
from .callbacks import ContextStageCallback, StageProgressCallback
from .checkpoints import refuse_others
from .compiling import compiled_layers
from .config import LongLoraSFTConfig
from .data import describe, evaluation_data, limited
from .guards import check_replicas, check_saving, checked
from .offload import PartialOffload
from .pieces import PiecewiseTrainer
from .rows import RowsTrainer
from .saving import SavingTrainer
from .sequences import ShardedLoss, ShardedTrainer, own_attention, parallelism_config
from .tiles import tile_mlps
from .trouble import WatchedTrainer, out_of_memory, peak_memory
from .windows import WindowCollator


class LongLoraSFTTrainer(RowsTrainer, SavingTrainer, WatchedTrainer, PiecewiseTrainer, ShardedTrainer, ShardedLoss):
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
        # What is resolved here is of this model, and the caller may have others.
        args, peft_config = copy.copy(args), copy.deepcopy(peft_config)
        # Refused here, while the model is as it was.
        found = checked(model, args, train_dataset, peft_config, kwargs)
        self.schedule, self._start, self._ropes, self._columns = found
        train_dataset = limited(train_dataset, args.max_examples)
        self._stage_callback = ContextStageCallback(self.schedule, self._ropes)
        revision = None
        if isinstance(model, str):
            given: Any = args.model_init_kwargs or {}
            args.model_init_kwargs, revision = {"attn_implementation": "s2attn"} | dict(given), given.get("revision")
        else:
            set_s2_attention(model)
        if args.mlp_tile is not None and args.use_liger_kernel:
            # Liger's MLP would shadow the tiled one.
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "swiglu": False, "geglu": False}
        if args.sequence_parallel > 1:
            args.parallelism_config = parallelism_config(args.sequence_parallel, args.world_size)
        self._train_source, self._stage_examples, self._stage_data = train_dataset, [], {}
        self._stream_state, self._steps_done, self._last_log, self._last_batch = "", 0, None, {}
        set_seed(args.seed)  # TRL before 1.15 leaves the adapter's random start unseeded
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=evaluation_data(eval_dataset, args.max_eval_examples),
            peft_config=peft_config,
            callbacks=[self._stage_callback, *(callbacks or [])],
            **kwargs,
        )
        check_replicas(args)
        self._rows = self.train_dataset
        # Loaded by its name it has the attention that its arguments ask for, if any; and PEFT has copied layers.
        set_s2_attention(self.model)
        if longlora_tuner(self.model) is not None:
            self._adopt_adapter(revision)
        if self.schedule.any_windows:
            self.data_collator = WindowCollator(self.data_collator)
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
            self.add_callback(StageProgressCallback(self.schedule))
        self._adapted = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self._data = describe(train_dataset, args)
        self._identity = self._identify()
        self._save_memory()
        self._stage_callback.apply(self.model, 0, self.processing_class)
        set_attention_mode(self.model, "auto")

    def _adopt_adapter(self, revision: str | None) -> None:
        """Make a LONGLORA adapter ready for the run, and let its config say how it is trained.

        `revision` is the base's, if it was loaded by its name.
        """
        check_saving(self.accelerator)
        tuner: Any = longlora_tuner(self.model)
        tuner.upcast_masters()  # TRL casts what a quantized model trains to bf16; before DDP sees it
        adapter: Any = self.model.active_peft_config
        adapter.schedule = self.schedule.to_dict()
        # TRL loads the base at a revision and doesn't tell PEFT, which would load the adapter on another one.
        if revision not in (None, "main"):
            adapter.revision = revision

    def _save_memory(self) -> None:
        """Put on the model what saves memory in long sequences, as far as it is asked for."""
        if self.args.selective_checkpointing and isinstance(self.model, PeftModel):
            # TRL changes the method of the PeftModel, and transformers >= 5.23 calls another.
            trl.models.enable_selective_activation_checkpointing(base_model(self.model))
        if self.args.mlp_tile is not None:
            tile_mlps(self.model, self.args.mlp_tile)
        if self.args.offload_share < 1:
            self.maybe_activation_offload_context = PartialOffload(self.args.offload_share)
            self.maybe_activation_offload_context.update_model_params(self.model)

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Run all stages; with `resume_from_checkpoint`, from where that checkpoint stands.

        Raises:
            ValueError: if there is no such checkpoint, it is of another run, it lacks what a run is resumed from, or
                its adapter is damaged; if `output_dir` has checkpoints of another run, and this one saves some; or if
                `train_dataset` has been replaced.
            FileNotFoundError: if its adapter is missing.
            FloatingPointError: if a loss or a gradient is not finite (the weights before that step are kept), or the
                loss has grown beyond that of a uniform guess.
            torch.OutOfMemoryError: with what would help.
        """
        if self.train_dataset is not self._rows:
            raise ValueError(
                "`trainer.train_dataset` has been replaced. It holds each stage's rows in order, cut to the stage's "
                "length, and no others make these stages: change the dataset before you give it to the trainer."
            )
        checkpoint = self._check_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.args.save_strategy != "no":
            refuse_others(str(self.args.output_dir), self._signature(), bool(self.args.save_total_limit))
        self._last_log = (time.perf_counter(), self._total_train_tokens)
        try:
            with (
                self._rows_from(checkpoint),
                compiled_layers(self.model, self.args.compile_layers),
                own_attention(self.model, self.args.sequence_parallel),
            ):
                if self.is_world_process_zero():
                    write_facts(Path(str(self.args.output_dir)), self._known)
                output = super().train(checkpoint, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            message = out_of_memory(self.args, self.schedule, self.state.global_step, self.model)
            raise torch.OutOfMemoryError(message) from error
        except FloatingPointError:
            self._write_report()
            raise
        finally:
            set_attention_mode(self.model, "auto")  # the run may have been stopped in a dense step
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
        with inputs_as_they_are(self._adapted if self.args.bf16 or self.args.fp16 else ()):
            return super().training_step(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self._clock_stopped():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """TRL's logs, and the stage's: stage, context length, RoPE factor, speed and peak memory.

        The attention of the step goes to the log history alone: trackers take numbers.
        """
        if "loss" not in logs or not self.model.training:
            return super().log(logs, start_time)
        step = self.schedule.last_step(self.state.global_step)
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


@contextmanager
def inputs_as_they_are(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, adapters don't cast their inputs to fp32, the dtype of their weights: for a forward under autocast.

    Autocast would cast them back: bit by bit the same, but four copies of the hidden states a layer, written twice and
    kept for the backward. PEFT's `disable_input_dtype_casting` looks for the layers each time, twice: 11 ms a forward
    of 32 layers.
    """
    before = [(layer, layer.cast_input_dtype_enabled) for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before:
            layer.cast_input_dtype_enabled = enabled
