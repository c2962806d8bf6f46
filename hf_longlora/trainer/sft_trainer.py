"""TRL's SFTTrainer over stages of growing context."""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging
from trl import SFTTrainer

from ..attention import set_attention_mode, set_s2_attention
from ..rope import current_rope, reach, rope_factor
from ..tuner.config import check_weights
from .callbacks import ContextStageCallback, StageProgressCallback, longlora_tuner
from .checks import check_adapter, check_arguments, check_dataset, checked_config, known_length, stage_ropes
from .config import LongLoraSFTConfig
from .layers import compiled_layers, tile_mlps
from .report import write_report
from .stages import Schedule

logger = logging.get_logger(__name__)

SCHEDULE_NAME = "context_schedule.json"
LAST_GOOD_NAME = "last-good"


class LongLoraSFTTrainer(SFTTrainer):
    """Extend a model's context in stages, in one run (LongLoRA, arXiv 2309.12307).

    A [`~trl.SFTTrainer`] in everything but this: sequences, RoPE, group size and attention follow the stages of
    `args`. Each stage has its own view of the dataset, tokenised once and truncated or packed to the stage's length;
    one dataloader serves them in order, shuffled by `args.seed`, under one learning rate schedule and one log history.
    A run resumed from a checkpoint ends as the unbroken one would.

    Args:
        model: A model's name or path, a [`~transformers.PreTrainedModel`], or a [`~peft.PeftModel`] with a LONGLORA
            adapter. It is switched to `attn_implementation="s2attn"`.
        args: The stages and everything that `SFTConfig` has.
        train_dataset: Raw text, conversations, prompt-completion pairs or token ids, as TRL takes them; map-style.
        peft_config: A [`LongLoraConfig`], or `None` to train all weights (or the adapter of a `PeftModel`).
        kwargs: The remaining arguments of [`~trl.SFTTrainer`].

    Raises:
        ValueError: before training starts, if the stages, the model, the adapter and the dataset don't fit together.
        TypeError: if `args` is not a [`LongLoraSFTConfig`] or `train_dataset` is not a map-style dataset.
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
        train_dataset: Dataset,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LongLoraSFTConfig):
            raise TypeError(f"`args` must be a LongLoraSFTConfig with its stages, got {type(args).__name__}.")
        # All that can be refused is refused here, while the model is as it was.
        check_arguments(args)
        check_dataset(train_dataset, args, kwargs.get("formatting_func"))
        config = checked_config(model, args)
        args.resolve_stages(known_length(config))
        self.schedule: Schedule = args.schedule
        check_adapter(model, peft_config, self.schedule)
        self._base_rope, self._ropes = stage_ropes(model, config, peft_config, self.schedule)
        stage_callback = ContextStageCallback(self.schedule, self._ropes)
        if isinstance(model, str):
            given: Any = args.model_init_kwargs
            args.model_init_kwargs = {"attn_implementation": "s2attn"} | dict(given or {})
        else:
            set_s2_attention(model)
        self._train_source: Dataset | None = train_dataset
        self._stage_examples: list[int] = []
        if args.mlp_tile is not None and args.use_liger_kernel:
            # Liger's MLP would shadow the tiled one.
            args.liger_kernel_config = {**(args.liger_kernel_config or {}), "swiglu": False, "geglu": False}
        set_seed(args.seed)  # TRL before 1.16 leaves the adapter's random start unseeded
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            peft_config=peft_config,
            callbacks=[stage_callback, *(callbacks or [])],
            **kwargs,
        )
        self._train_source = None
        self._last_log: tuple[float, int] | None = None
        self._last_loss = math.inf
        if self.pop_callback(DEFAULT_PROGRESS_CALLBACK) is not None:
            self.add_callback(StageProgressCallback(self.schedule))
        tuner = longlora_tuner(self.model)
        if tuner is not None:
            tuner.upcast_masters()  # TRL casts what a quantized model trains to bf16, the norms too
            adapter: Any = self.model.active_peft_config
            adapter.schedule = self.schedule.to_dict()
        if args.mlp_tile is not None:
            tile_mlps(self.model, args.mlp_tile)
        stage_callback.apply(self.model, 0)
        set_attention_mode(self.model, "auto")

    # ----------------------------------------------------------------------------------------------------------------
    # Data

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Dataset:
        """Of the training dataset, what each stage will see, one after the other. Other datasets: as TRL does."""
        prepare = super()._prepare_dataset
        if dataset is not self._train_source:
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        # TRL tokenises, then truncates or packs; without a length it stops in between.
        tokenized = prepare(dataset, processing_class, _with_length(args, None), False, formatting_func, dataset_name)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        longest, served = [], []
        for number, stage in enumerate(self.schedule.stages, start=1):
            own = _with_length(args, stage.max_length)
            view = prepare(tokenized, processing_class, own, packing, None, f"stage {number}")
            longest.append(longest_document(view))
            self._stage_examples.append(len(view))
            if len(view) > 0:
                shuffle = args.train_sampling_strategy != "sequential"
                served.append(view.select(_order(len(view), stage.max_steps * batch, args.seed + number, shuffle)))
        self._check_lengths(longest)
        return concatenate_datasets(served)

    def _check_lengths(self, longest: list[int]) -> None:
        """Raise a `ValueError` if a stage that stretches RoPE would train no distance that is new to the model."""
        known = reach(self._base_rope)[1] if self._base_rope is not None else 0
        stages = zip(self.schedule.stages, self._ropes, longest, strict=True)
        for number, (stage, rope, tokens) in enumerate(stages, start=1):
            stretches = rope is not None and stage.rope_type is not None and stage.max_length > known
            if tokens == 0 or (stretches and tokens <= known):
                raise ValueError(
                    f"Too few tokens for stage {number} (max_length {stage.max_length:,}): the longest sequence it "
                    f"would see has {tokens:,} tokens, no more than the {known:,} the model knows by then. Give "
                    'longer documents, set packing=True and packing_strategy="wrapped" (one stream of text, as in the '
                    "paper), or drop the stage."
                )
            known = max(known, tokens)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # the order is in the dataset already: stage after stage, shuffled within
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    # ----------------------------------------------------------------------------------------------------------------
    # The run

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Run all stages; with `resume_from_checkpoint`, from where that checkpoint stands.

        Raises:
            ValueError: if there is no such checkpoint, it is of another schedule, or its adapter is damaged.
            FileNotFoundError: if its adapter is missing.
            FloatingPointError: if a loss or a gradient is not finite (the weights before that step are kept), or the
                loss has grown beyond that of a uniform guess.
            torch.OutOfMemoryError: with what would help.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._check_checkpoint(resume_from_checkpoint)
        self._last_log = (time.perf_counter(), self._total_train_tokens)
        try:
            with compiled_layers(self.model, self.args.compile_layers):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(self._out_of_memory()) from error
        if self.args.report and self.is_world_process_zero():
            write_report(Path(str(self.args.output_dir)), self.state.log_history, self.schedule)
        return output

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        # PEFT casts each adapter's input to its fp32 weights, and autocast casts it back: bit by bit the same, but
        # four copies of the hidden states a layer, written twice and kept for the backward.
        with disable_input_dtype_casting(self.model, active=self.args.bf16 or self.args.fp16):
            loss = super().training_step(model, inputs, *args, **kwargs)
        # Alone, a process stops at the loss; several stop together, at the gradients that they share.
        if self.args.world_size == 1 and not loss.isfinite():
            self._stop_at_divergence("loss", inputs)
        # fp16's loss scaler skips steps with infinite gradients by itself.
        if self.accelerator.sync_gradients and not self.args.fp16:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
                self._stop_at_divergence("gradient", inputs)
        return loss

    def _stop_at_divergence(self, what: str, inputs: dict[str, Any]) -> NoReturn:
        """Keep the weights, which the step has not touched, and stop the run."""
        plan = self.schedule.step(self.state.global_step)
        path = os.path.join(str(self.args.output_dir), LAST_GOOD_NAME)
        self.save_model(path)
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} (stage {plan.stage + 1}) is not finite. The weights "
            f"before it are in {path}. The last batch begins with {beginnings(inputs, self.processing_class)}. Lower "
            "the learning rate, clip gradients (max_grad_norm), or look at the data."
        )

    def _check_loss(self, loss: float) -> None:
        """Raise a `FloatingPointError` if a model that had learned something is worse than a uniform guess, twice.

        It comes from the log, which all processes have alike.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        worst, before = math.log(vocabulary), self._last_loss
        self._last_loss = loss
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        if loss > worst < before < math.inf and any(earlier < worst - 1 for earlier in losses):
            checkpoint = last_checkpoint(str(self.args.output_dir))
            raise FloatingPointError(
                f"The run has diverged: the loss is {loss:.2f} at step {self.state.global_step}, above the "
                f"{worst:.2f} of a uniform guess over {vocabulary:,} tokens, and was {min(losses):.2f}. Lower the "
                "learning rate. "
                + (f"The last checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet.")
            )

    def _out_of_memory(self) -> str:
        """What to do about it, in the order of what it costs."""
        args, plan = self.args, self.schedule.step(min(self.state.global_step, self.schedule.max_steps - 1))
        advice = [
            (
                args.per_device_train_batch_size > 1,
                f"per_device_train_batch_size=1 and {args.per_device_train_batch_size} times the "
                "gradient_accumulation_steps",
            ),
            (not args.gradient_checkpointing, "gradient_checkpointing=True"),
            (args.mlp_tile is None, "mlp_tile=4096 (the MLP by tiles of tokens)"),
            (not args.activation_offloading, "activation_offloading=True"),
            (not getattr(self.model, "is_quantized", False), "a base quantized to 4 bits (QLoRA)"),
            (True, "shorter stages"),
        ]
        length = self.schedule.stages[plan.stage].max_length
        return (
            f"Out of memory in step {self.state.global_step + 1} (stage {plan.stage + 1}: {length:,} tokens in a "
            f"sequence, {args.per_device_train_batch_size} in a batch; peak {_peak_memory(args.device):.1f} GiB). "
            f"What helps: {'; '.join(words for useful, words in advice if useful)}. "
            "A run that has saved a checkpoint goes on from it (resume_from_checkpoint=True)."
        )

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """TRL's logs, and the stage's: stage, context length, RoPE factor, speed and peak memory.

        The attention of the step goes to the log history alone: trackers take numbers.
        """
        if "loss" not in logs or not self.model.training:
            return super().log(logs, start_time)
        self._check_loss(float(logs["loss"]))
        plan = self.schedule.step(max(self.state.global_step - 1, 0))
        stage = self.schedule.stages[plan.stage]
        now, tokens = time.perf_counter(), self._total_train_tokens
        if self._last_log is not None:
            since, before = self._last_log
            logs["tokens_per_second"] = (tokens - before) / max(now - since, 1e-9)
        self._last_log = now, tokens
        logs["stage"] = plan.stage + 1
        logs["context_length"] = stage.max_length
        has_rope = getattr(self.model.config.get_text_config(), "rope_parameters", None)
        logs["rope_factor"] = rope_factor(current_rope(self.model.config)) if has_rope else 1.0
        logs["peak_memory_gib"] = _peak_memory(self.args.device)
        super().log(logs, start_time)
        last: dict[str, Any] = self.state.log_history[-1]
        last["attention"] = "dense" if plan.mode == "dense" else "s2attn"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            Path(folder, TRAINER_STATE_NAME).unlink(missing_ok=True)  # not whole any more, if it was
            Path(folder, SCHEDULE_NAME).write_text(json.dumps(self._signature(), indent=2))
        # A checkpoint holds the fp32 masters, so that a resumed run is the same run; a saved adapter the base's dtype.
        tuner = longlora_tuner(self.model)
        if tuner is not None:
            tuner.full_precision_state = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            if tuner is not None:
                tuner.full_precision_state = False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the trainer's state is written next, and says that all else is there

    def _signature(self) -> dict[str, Any]:
        """What makes a run this run: a checkpoint of another one can't be resumed."""
        args = self.args
        return {
            **self.schedule.to_dict(),
            "seed": args.seed,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "packing": args.packing_strategy if args.packing else None,
            "examples": self._stage_examples,
        }

    def _check_checkpoint(self, resume_from_checkpoint: str | bool) -> str:
        path: str | bool | None = resume_from_checkpoint
        if path is True:
            directory = str(self.args.output_dir)
            path = last_checkpoint(directory)
            if path is None:
                raise ValueError(
                    f"There is no whole checkpoint in {directory} to resume from; call train() without one."
                )
        assert isinstance(path, str)
        file = Path(path, SCHEDULE_NAME)
        if not file.is_file():
            raise ValueError(f"{path} is not a checkpoint of a staged run: it has no {SCHEDULE_NAME}.")
        found, own = json.loads(file.read_text()), json.loads(json.dumps(self._signature()))
        differing = [key for key in own if found.get(key) != own[key]]
        if differing:
            raise ValueError(
                f"{path} is of another schedule and can't be resumed: "
                + "; ".join(f"{key} was {found.get(key)}, is {own[key]}" for key in differing)
                + "."
            )
        if longlora_tuner(self.model) is not None:
            check_weights(path)
        return path


# --------------------------------------------------------------------------------------------------------------------
# Helpers


def beginnings(inputs: dict[str, Any], tokenizer: Any, documents: int = 4, tokens: int = 12) -> str:
    """How the first documents of a batch begin: the rows, and where positions restart the documents packed in them."""
    ids, positions = inputs["input_ids"], inputs.get("position_ids")
    starts = torch.zeros_like(ids, dtype=torch.bool) if positions is None else positions == 0
    starts[:, 0] = True
    found = [ids[row, at : at + tokens].tolist() for row, at in starts.nonzero()[:documents].tolist()]
    texts = [str(tokenizer.decode(part)) if tokenizer is not None else str(part) for part in found]
    more = int(starts.sum()) - len(found)
    return ", ".join(map(repr, texts)) + (f" and {more} more documents" if more > 0 else "")


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest whole checkpoint in a run's output directory; `None` if there is none.

    A checkpoint is whole if the trainer's state, the last file written, is there and can be read. One that a kill or a
    full disk has left in part is passed over, with a warning.
    """
    found = [(int(path.name.rpartition("-")[2]), path) for path in Path(directory).glob("checkpoint-[0-9]*")]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning(f"{path} was not written to its end and is passed over.")
        else:
            return str(path)
    return None


def _with_length(args: LongLoraSFTConfig, max_length: int | None) -> LongLoraSFTConfig:
    args = copy.copy(args)
    args.max_length = max_length
    return args


def _order(examples: int, wanted: int, seed: int, shuffle: bool) -> Iterable[int]:
    """`wanted` indices into a stage's view: passes over it, each in another order."""
    generator = torch.Generator().manual_seed(seed)
    passes = [
        torch.randperm(examples, generator=generator) if shuffle else torch.arange(examples)
        for _ in range(math.ceil(wanted / examples))
    ]
    return torch.cat(passes)[:wanted].tolist()


def longest_document(view: Dataset) -> int:
    """Tokens in the longest document of a prepared dataset: a row, or one of those packed into a row."""
    if len(view) == 0:
        return 0
    table = view.with_format("arrow")[:]
    if "seq_lengths" in view.column_names:
        return pc.max(pc.list_flatten(table["seq_lengths"])).as_py() or 0
    return pc.max(pc.list_value_length(table["input_ids"])).as_py() or 0


def _peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / 2**30
    import resource  # everywhere else; counted in KiB, on macOS in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
