"""What can be refused before a run starts, each with one error that says what to change."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc
import torch
import trl
from datasets import Dataset, IterableDataset, LargeList, List, Value
from peft import PeftConfig, PeftModel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..attention import check_skipping, check_supported
from ..attention.kernels import check_kernel
from ..from_hub import refuse_adapter
from ..modules import base_model
from ..rope import (
    AUTO,
    RopeScaling,
    current_rope,
    find_rope,
    native_window,
    only_reading,
    reach,
    scaled_rope,
    type_over,
)
from ..schedule import ContextStage, Schedule
from ..tuner import LongLoraConfig, LongLoraModel
from ..values import check_whole
from .callbacks import longlora_tuner
from .config import LongLoraSFTConfig
from .data import StageData

logger = logging.get_logger(__name__)

ANSWERED = frozenset({"messages", "conversations", "prompt", "completion", "chosen", "rejected", "labels"})
"""Columns of examples that end in answers, or whose labels may leave out tokens."""

ANSWERS = (
    "In windows most of a document stands elsewhere than its end: answers, which alone are learned here "
    '(completion_only_loss, assistant_only_loss, labels of -100), would lose what they answer. Set sparse="s2", or '
    "learn all tokens (completion_only_loss=False)."
)


def check_arguments(args: LongLoraSFTConfig) -> None:
    if args.auto_find_batch_size:
        raise ValueError("`auto_find_batch_size` would change how many examples a stage sees; set the batch size.")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    check_whole(1, **{name: getattr(args, name) for name in sizes})
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` would mix the stages; use 'random' (shuffled "
            "within each stage) or 'sequential'."
        )
    if args.padding_free and not args.packing:
        raise ValueError(
            '`padding_free` without packing: set packing=True as well, and packing_strategy="bfd", which packs whole '
            "examples and needs no padding either."
        )
    accelerator: Any = args.accelerator_config
    if accelerator.split_batches and args.world_size > 1:
        raise ValueError("`split_batches` would change how many examples a stage sees; leave it out.")
    parallel: Any = args.parallelism_config
    of_launch = int(os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1"))
    if of_launch > 1 or (parallel is not None and getattr(parallel, "sp_size", 1) > 1):
        raise ValueError(
            "Say how many processes share a sequence by `sequence_parallel`, not by accelerate's "
            "`parallelism_config`, which knows no sparse attention."
        )
    if parallel is not None and parallel.tp_size * parallel.cp_size > 1:
        raise ValueError(
            "tp and cp in `parallelism_config` are not supported: torch's context parallelism deals the tokens of a "
            "sequence out in turns and knows dense attention alone. For sequences over several processes set "
            "`sequence_parallel`; FSDP2 and ZeRO-3 spread weights."
        )
    if isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"):
        raise ValueError("`skip_prepare_dataset` leaves no way to cut sequences to each stage's length.")

    if args.selective_checkpointing and not hasattr(trl.models, "enable_selective_activation_checkpointing"):
        raise ValueError(f"TRL {trl.__version__} has no selective gradient_checkpointing_kwargs: 1.15 is the first.")
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("`activation_offloading` moves activations off an accelerator, and there is none here.")


def check_attention(args: LongLoraSFTConfig, schedule: Schedule) -> None:
    """Refuse a kernel that can't run here, and warn of stages that would be dense unasked."""
    check_kernel(schedule.attention.kernel, args.device.type)
    for number, stage in enumerate(schedule.stages, start=1):
        words = schedule.attention_config(number - 1).dense_at(stage.max_length)
        if words is not None and stage.attention != "dense" and schedule.sparse_by(number - 1) == "s2":
            logger.warning(f"Stage {number}: {words}")


def check_dataset(dataset: Any, args: LongLoraSFTConfig, formatting_func: Any) -> set[str]:
    """The columns of a dataset or a stream, if it can be trained on."""
    if isinstance(dataset, Mapping):
        raise TypeError(f"`train_dataset` must be one split of a dataset, not all of them: {', '.join(dataset)}.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`train_dataset` must be a datasets.Dataset or a datasets.IterableDataset, got {type(dataset).__name__}. "
            "Of a list one is made by Dataset.from_list, of a generator a stream by IterableDataset.from_generator."
        )
    if isinstance(dataset, IterableDataset):
        check_stream(args)
        dataset = Dataset.from_list(list(dataset.take(1)), features=dataset.features)
    if len(dataset) == 0:
        raise ValueError("`train_dataset` is empty.")
    columns = set(dataset.column_names)
    if columns & {"image", "images"}:
        raise ValueError("Datasets with images are not supported: stages cut text to their length.")
    if formatting_func is None:
        check_columns(dataset, args.dataset_text_field)
    return columns


def check_stream(args: LongLoraSFTConfig) -> None:
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"`dataloader_num_workers={args.dataloader_num_workers}`: a stream is read in order, by one worker or (0) "
            "by none."
        )
    if args.sequence_parallel > 1:
        raise ValueError(
            "`sequence_parallel` doesn't take streams: `max_examples` of one, made a dataset by "
            "Dataset.from_list(list(stream.take(N))), will do."
        )


def check_columns(dataset: Dataset, text_field: str) -> None:
    """Raise a `ValueError` unless the columns that TRL reads hold texts or messages in every row."""
    for name in read_columns(dataset.column_names, text_field):
        check_texts(dataset, name, plain=name == text_field)


def read_columns(columns: Collection[str], text_field: str) -> list[str]:
    """The columns of texts or messages that TRL reads; none of a dataset that is tokenized.

    Raises:
        ValueError: there are no such columns.
    """
    if "input_ids" in columns:
        return []
    if "prompt" in columns and "completion" not in columns:
        raise ValueError(
            f"The dataset has a 'prompt' and no 'completion': its columns are {sorted(columns)}, and TRL reads "
            "'prompt' before any other. Rename what answers it, or remove_columns('prompt')."
        )
    if "prompt" in columns:
        return ["prompt", "completion"]
    names = [name for name in ("messages", "conversations", text_field) if name in columns][:1]
    if not names:
        raise ValueError(
            f"The dataset has no text: its columns are {sorted(columns)}, and none is {text_field!r} "
            "(dataset_text_field), 'messages', 'prompt' or 'input_ids'. Name the column, or pass a formatting_func."
        )
    return names


def check_rows(stream: IterableDataset, names: Sequence[str]) -> IterableDataset:
    """A stream that raises a `ValueError` at a row without a text or a message in one of its columns."""

    def check(row: dict[str, Any], index: int) -> dict[str, Any]:
        for name in names:
            if row[name] is None or row[name] == []:
                raise ValueError(
                    f"The column {name!r} of the stream has nothing in row {index:,}. Leave such rows out: "
                    f"stream.filter(lambda row: row[{name!r}])."
                )
        return row

    return stream.map(check, with_indices=True) if names else stream


def check_texts(dataset: Dataset, name: str, plain: bool) -> None:
    """Raise a `ValueError` unless a column holds nothing but texts or, where it need not be plain, messages."""
    kind: Any = dataset.features[name]
    text = getattr(kind, "dtype", None) in ("string", "large_string")
    messages = isinstance(kind, List | LargeList) and not isinstance(kind.feature, Value)
    if plain and not text:
        raise ValueError(f"The column {name!r} of the dataset holds {kind}, not text alone.")
    if not messages and (not text or name in ("messages", "conversations")):
        raise ValueError(f"The column {name!r} of the dataset holds {kind}, not a list of messages in each row.")
    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    missing = pc.is_null(column)
    if messages:
        missing = pc.or_kleene(missing, pc.equal(pc.list_value_length(column), 0))
    rows = pc.indices_nonzero(missing)
    if len(rows) > 0:
        raise ValueError(
            f"The column {name!r} of the dataset has no {'text' if text else 'message'} in {len(rows):,} of "
            f"{len(dataset):,} rows, such as row {rows[0].as_py():,}. Leave them out: "
            f"dataset.filter(lambda row: row[{name!r}])."
        )


def check_trainable(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse a run in which nothing is trained, or nothing of a part that the adapter's config names."""
    if isinstance(model, str) or peft_config is not None:  # made trainable when it is loaded, or the adapter put on
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "Nothing would be trained: the adapter was loaded for inference. Load it by "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True), or AutoPeftModelForCausalLM's."
            if isinstance(model, PeftModel)
            else f"Nothing would be trained: no weight of {type(model).__name__} has requires_grad. Set it where it "
            "is meant, or give an adapter (peft_config)."
        )
    tuner = longlora_tuner(model)
    frozen = tuner.frozen_parts() if tuner is not None else []
    if frozen:
        raise ValueError(
            f"The adapter asks for {', '.join(frozen)}, of which nothing is trainable. Load it by "
            "from_pretrained(..., is_trainable=True). If norms or embeddings are to stay as they are, say so: "
            "model.active_peft_config.train_norms = False, or train_embeddings."
        )


def check_adapter(model: Any, peft_config: PeftConfig | None, schedule: Schedule) -> None:
    stretches = any(stage.rope_type is not None or stage.rope_parameters for stage in schedule.stages)
    if isinstance(model, PeftModel):
        if stretches and not isinstance(model.base_model, LongLoraModel):
            raise ValueError(
                f"An adapter of type {model.active_peft_config.peft_type.value} can't carry the RoPE of the stages. "
                "Merge it (merge_and_unload) and train a LongLoraConfig adapter on the result."
            )
        return
    if peft_config is None:
        return
    if not isinstance(peft_config, LongLoraConfig):
        if stretches:
            raise ValueError(
                f"A {type(peft_config).__name__} adapter is saved without RoPE scaling and would be wrong when "
                "loaded. Use hf_longlora.LongLoraConfig (it takes the same arguments), or stages with rope_type=None."
            )
        return
    longest = schedule.stages[-1].max_length
    if peft_config.target_length not in (None, longest):
        raise ValueError(
            f"`target_length={peft_config.target_length}` of the adapter contradicts the last stage's max_length "
            f"{longest}. Leave it out: the stages set it."
        )
    if peft_config.rope_parameters is not None or any(
        peft_config.rope_type not in (AUTO, stage.rope_type) for stage in schedule.stages
    ):
        raise ValueError(
            "The adapter's rope_type or rope_parameters contradict the stages'. Set them in ContextStage alone, for "
            'example ContextStage(8192, 200, rope_type="yarn").'
        )


def check_replicas(args: LongLoraSFTConfig) -> None:
    """Refuse `torch.nn.DataParallel`, as TRL does since 1.15: to be asked once Trainer has counted the GPUs.

    Its replicas run what is bound to the model that they are copies of: TRL's loss, the weight of our tied head.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: Trainer would wrap the model in torch.nn.DataParallel, which is not "
            "supported. Start the script by `accelerate launch` or `torchrun`, or show it one GPU "
            "(CUDA_VISIBLE_DEVICES=0)."
        )


def check_saving(accelerator: Any) -> None:
    """Refuse a launch that would train an adapter and save none."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP would save no adapter: fsdp_state_dict_type is {plugin.state_dict_type.name}, with which Trainer "
            "writes each process's part of the weights and no file of the adapter. Set fsdp_state_dict_type: "
            "FULL_STATE_DICT in accelerate's config (--fsdp_state_dict_type FULL_STATE_DICT)."
        )


def supported_config(model: Any, args: LongLoraSFTConfig) -> tuple[PreTrainedConfig, type[PreTrainedModel] | None]:
    """Configuration and class of a model or of a path, if shifted sparse attention can be used in it.

    A class of remote code shows itself when it is loaded, and is `None` till then.
    """
    if isinstance(model, str):
        given: Any = args.model_init_kwargs
        init = {"trust_remote_code": args.trust_remote_code} | dict(given or {})
        options = {key: init[key] for key in ("revision", "trust_remote_code") if key in init}
        refuse_adapter(model)
        config = AutoConfig.from_pretrained(model, **options)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    else:
        config = model.config
        model_class = type(base_model(model))
    if not isinstance(model_class, type):
        return config, None
    check_supported(model_class, config)
    return config, model_class


def check_windows(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    columns: Collection[str],
    own_collator: bool,
) -> None:
    """Refuse steps in windows of what can't be cut into any.

    Args:
        args: The trainer's.
        schedule: The stages.
        config: The model's.
        model_class: The model's, if it is known.
        columns: The training dataset's.
        own_collator: Whether the trainer is given a collator.
    """
    if schedule.any_windows:
        _check_cuttable(args, schedule, config, model_class, columns, own_collator)


def resolve_sparse(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    columns: Collection[str] = (),
    own_collator: bool = False,
) -> Schedule:
    """The schedule with what `sparse="auto"` stands for, in `args`, too: "windows" for plain text that can be cut.

    The arguments are those of `check_windows`.
    """
    if args.sparse != AUTO:
        return schedule
    why = None
    if answers := sorted(set(columns) & ANSWERED):
        why = f"the dataset has answers ({', '.join(answers)})"
    elif args.sequence_parallel > 1:
        why = "processes share sequences"
    elif not args.names_groups:  # who names groups knows what they are
        try:
            _check_cuttable(args, schedule, config, model_class, columns, own_collator)
        except ValueError as error:
            why = str(error)
    sparse = args.resolve_sparse(why is None and not args.names_groups)
    if why is not None and replace(schedule, sparse="windows").any_windows and args.process_index == 0:
        logger.warning(f'Steps that aren\'t dense take sparse="s2", not "windows": {why}.')
    return replace(schedule, sparse=sparse)


def _check_cuttable(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    columns: Collection[str],
    own_collator: bool,
) -> None:
    if schedule.native_window is None:  # of a linear RoPE that may be read in two ways: windows would be of either
        only_reading(config, current_rope(config))
    if model_class is not None:
        check_skipping(model_class, config)
    completions = args.completion_only_loss
    if completions is None:
        completions = {"prompt", "completion"} <= set(columns)
    if completions or args.assistant_only_loss:
        raise ValueError(ANSWERS)
    if own_collator:
        raise ValueError('Windows are collated as they are: leave out `data_collator`, or set sparse="s2".')
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches and args.world_size > 1:
        raise ValueError("`dispatch_batches` would tear windows apart; leave it out.")


def check_unmasked(view: Dataset) -> None:
    """Refuse steps in windows on a prepared dataset whose labels leave out tokens."""
    labels = view.with_format("arrow")[:]["labels"]
    if any(pc.any(pc.equal(chunk.flatten(), -100)).as_py() for chunk in labels.chunks):
        raise ValueError(ANSWERS)


def base_window(model: Any, config: PreTrainedConfig, peft_config: PeftConfig | None) -> int | None:
    """The native window of a model or of its base, where something says it (`hf_longlora.rope.native_window`)."""
    if isinstance(model, PeftModel):
        peft_config, model = model.active_peft_config, base_model(model)
    return native_window(config if isinstance(model, str) else model, getattr(peft_config, "base_length", None))


@dataclass(frozen=True)
class Start:
    """The RoPE that a run starts from, and what of it is known.

    Args:
        config: The model's.
        base: The model's own, whatever an adapter has made of it; `None` if it has none that can be read.
        now: A loaded adapter's, where it has one.
        base_length: The adapter's.
    """

    config: PreTrainedConfig
    base: RopeScaling | None
    now: RopeScaling | None
    base_length: int | None

    @classmethod
    def of(cls, model: Any, config: PreTrainedConfig, peft_config: PeftConfig | None) -> "Start":
        base, now = find_rope(config), None
        tuner = longlora_tuner(model)
        if tuner is not None:
            peft_config = model.active_peft_config
            base, now = tuner.base_rope, model.active_peft_config.scaling
        return cls(config, base, now, getattr(peft_config, "base_length", None))

    @property
    def known(self) -> int:
        """Tokens that the model reaches as it is; 0 if it has no RoPE to scale.

        Raises:
            ValueError: its config leaves that open.
        """
        if self.now is not None:
            return self.now.length
        return 0 if self.base is None else only_reading(self.config, self.base, self.base_length)[1]


def stage_ropes(start: Start, schedule: Schedule) -> list[RopeScaling | None]:
    """The RoPE of each stage; `None` where it is the one the model comes with.

    A stage extends what is there, be it the base's, a loaded adapter's or the stage's before: in its type, and never
    to less than it reaches. So one run and several are held to the same, and end in the same RoPE.

    Raises:
        ValueError: if a stage's length is one that the base reaches already, less than what was reached since or in
            another type, or the model has no RoPE to scale.
    """
    ropes: list[RopeScaling | None] = []
    now = start.now
    for number, stage in enumerate(schedule.stages, start=1):
        if stage.rope_type is None and stage.rope_parameters is None:
            # As the stage before left it, said outright: a run resumed here has not been through that stage.
            ropes.append(ropes[-1] if ropes else None)
            continue
        try:
            now = _extended(start, now, stage)
        except ValueError as error:
            raise ValueError(
                f"Stage {number}: {error} (A stage with rope_type=None trains at a length the model reaches already.)"
            ) from error
        ropes.append(now)
    return ropes


def _extended(start: Start, now: RopeScaling | None, stage: ContextStage) -> RopeScaling:
    """The RoPE of a stage after `now`, that of the stage or the adapter before it, if there is one."""
    base = start.base or current_rope(start.config)
    kind, explicit = stage.rope_type or AUTO, stage.rope_parameters
    if now is None or now == base:
        return scaled_rope(start.config, stage.max_length, kind, explicit, start.base_length, base=base)
    original, reached = reach(now)
    own = type_over(now, base)
    if stage.max_length < reached:
        raise ValueError(
            f"max_length={stage.max_length} is less than the {reached} tokens that RoPE was stretched to before, and "
            "it only grows."
        )
    if explicit is None and kind not in (AUTO, own):
        raise ValueError(
            f"RoPE was stretched by {own!r} before, and {kind!r} would replace the frequencies that the adapter has "
            f'been trained with. Pass rope_type="{own}" or "auto", or explicit rope_parameters.'
        )
    if explicit is None and stage.max_length == reached:
        return now
    return scaled_rope(start.config, stage.max_length, own, explicit, original, base=now)


def say_data(stages: Sequence[StageData], args: LongLoraSFTConfig) -> None:
    """One line a stage, of what it sees of the data; a warning if that is less than half."""
    for number, data in enumerate(stages, start=1):
        if data.share >= 0.5:
            logger.info(f"Stage {number}: {data}")
            continue
        remedy = (
            'packing_strategy="bfd_split" or "wrapped" goes on in the next row with what is over'
            if args.packing
            else 'packing=True with packing_strategy="bfd_split" or "wrapped" cuts nothing off'
        )
        logger.warning(f"Stage {number} uses less than half of the data: {data}. A longer stage sees more; {remedy}.")


def check_lengths(
    start: Start, schedule: Schedule, ropes: Sequence[RopeScaling | None], longest: Sequence[int]
) -> None:
    """Refuse a stage that stretches RoPE and would train no distance that is new to the model.

    Args:
        start: Of the run.
        schedule: The stages.
        ropes: What `stage_ropes` gave for them.
        longest: Tokens in the longest document that each stage sees.
    """
    known = start.known if any(rope is not None for rope in ropes) else 0
    for number, (stage, rope, tokens) in enumerate(zip(schedule.stages, ropes, longest, strict=True), start=1):
        stretches = rope is not None and stage.rope_type is not None and stage.max_length > known
        if tokens == 0:
            raise ValueError(
                f"Stage {number} (max_length {stage.max_length:,}) would see nothing to learn from: no example is "
                "left that has a token to learn once it is cut to that length (with assistant_only_loss or "
                "completion_only_loss: longer prompts). Give shorter examples, or a longer stage."
            )
        if stretches and tokens <= known:
            raise ValueError(
                f"Too few tokens for stage {number} (max_length {stage.max_length:,}): the longest sequence it would "
                f"see has {tokens:,} tokens, no more than the {known:,} the model knows by then. Give longer "
                'documents, set packing=True and packing_strategy="wrapped" (one stream of text, as in the paper), or '
                "drop the stage."
            )
        known = max(known, tokens)
