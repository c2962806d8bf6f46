"""What can be refused before a run starts, each with one error that says what to change, and what is settled then."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..attention import check_supported
from ..attention.kernels import check_kernel
from ..lookup import refuse_adapter
from ..modules import base_model
from ..rope import AUTO, RopeScaling, native_window
from ..schedule import Schedule
from ..tuner import LongLoraConfig, LongLoraModel, longlora_tuner
from ..values import check_whole
from .columns import check_dataset
from .config import LongLoraSFTConfig
from .ropes import Start, stage_ropes
from .sequences import check_sequences
from .sparse import settle_sparse

logger = logging.get_logger(__name__)


def checked(
    model: str | PreTrainedModel | PeftModel,
    args: LongLoraSFTConfig,
    dataset: Any,
    peft_config: PeftConfig | None,
    others: Mapping[str, Any],
) -> tuple[Schedule, Start, list[RopeScaling | None], set[str]]:
    """The schedule of a run, the RoPE that it starts from, that of each stage (`None`: the model's), its columns.

    The model stays as it is; in `args` "auto" is settled.

    Raises:
        ValueError, TypeError: if the run can't be, or would not do what its arguments say.
    """
    check_arguments(args)
    check_output(model, args)
    check_bare(model)
    columns = check_dataset(dataset, args, others.get("formatting_func"))
    config, model_class = supported_config(model, args)
    own_collator = others.get("data_collator") is not None
    start, schedule = settled(model, args, config, model_class, peft_config, columns, own_collator)
    check_attention(args, schedule)
    check_adapter(model, peft_config, schedule)
    check_trainable(model, peft_config)
    adapted = peft_config is not None or isinstance(model, PeftModel)
    if not adapted and args.learning_rate == LongLoraSFTConfig.learning_rate:
        logger.warning(
            f"All weights are trained at a learning rate of {args.learning_rate:g}, the default, which is for "
            "adapters: they usually want less, such as 2e-5."
        )
    ropes = stage_ropes(start, schedule)
    init: Any = args.model_init_kwargs or {}
    spread = bool(init.get("device_map")) or hasattr(model, "hf_device_map")
    check_sequences(args, schedule, ropes, config, model_class, spread, others)
    return schedule, start, ropes, columns


def settled(
    model: str | PreTrainedModel | PeftModel,
    args: LongLoraSFTConfig,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    peft_config: PeftConfig | None,
    columns: Collection[str] = (),
    own_collator: bool = False,
) -> tuple[Start, Schedule]:
    """The RoPE that a run starts from and its schedule; in `args`, too, stages and steps take the place of "auto"."""
    start = Start.of(model, config, peft_config)
    if isinstance(args.stages, str):
        args.resolve_stages(start.known)
    window = native_window(config if isinstance(model, str) else base_model(model), start.base_length)
    schedule = replace(args.schedule, native_window=window)
    return start, settle_sparse(args, schedule, config, model_class, columns, own_collator)


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
    if accelerator.dispatch_batches and args.packing and args.packing_strategy != "wrapped":
        raise ValueError(
            "`dispatch_batches` cuts off where the documents of a packed row end; leave it out, or set "
            'packing_strategy="wrapped".'
        )
    shared = [getattr(args.parallelism_config, f"{kind}_size", 1) for kind in ("sp", "cp", "tp")]
    if max(*shared, int(os.environ.get("PARALLELISM_CONFIG_SP_SIZE", "1"))) > 1:
        raise ValueError(
            "Say how many processes share a sequence by `sequence_parallel`, not by accelerate's "
            "`parallelism_config`, which knows dense attention alone; FSDP2 and ZeRO-3 spread weights, not its tp."
        )
    if isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"):
        raise ValueError("`skip_prepare_dataset` leaves no way to cut sequences to each stage's length.")

    if args.selective_checkpointing and not hasattr(trl.models, "enable_selective_activation_checkpointing"):
        raise ValueError(f"TRL {trl.__version__} has no selective gradient_checkpointing_kwargs: 1.15 is the first.")
    if args.activation_offloading and not torch.accelerator.is_available():
        raise ValueError("`activation_offloading` moves activations off an accelerator, and there is none here.")


def check_output(model: str | PreTrainedModel | PeftModel, args: LongLoraSFTConfig) -> None:
    """Refuse to save into the folder of the model: it would be loaded with its adapter from then on, or be no more."""
    of = model if isinstance(model, str) else base_model(model).config._name_or_path
    out = Path(str(args.output_dir))
    if of and Path(of).is_dir() and out.is_dir() and out.samefile(of):
        raise ValueError(
            f"output_dir={args.output_dir!r} is the folder of the model that is trained, and what is saved would lie "
            "among its files. Give the run a folder of its own."
        )


def check_bare(model: str | PreTrainedModel | PeftModel) -> None:
    """Refuse a model that has an adapter in it and is no `PeftModel`.

    A trainer or `get_peft_model` has put it on this very model, or transformers' `load_adapter`: what a new one of its
    name finds trained, norms and embeddings, it would go on from, and the model has the RoPE of the first.
    """
    if isinstance(model, (str, PeftModel)):
        return
    if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in model.modules()):
        raise ValueError(
            f"There is an adapter in this {type(model).__name__} already: PEFT puts it into the model that it is "
            "given, and a trainer does so with its `peft_config`. Give the trainer the PeftModel (trainer.model of "
            "the one before) to train it on. To begin anew, take the adapter off, base = trainer.model.unload(), or "
            "load the base again."
        )


def check_attention(args: LongLoraSFTConfig, schedule: Schedule) -> None:
    """Refuse a kernel that can't run here, and warn of stages that would be dense unasked."""
    check_kernel(schedule.attention.kernel, args.device.type)
    for number, stage in enumerate(schedule.stages, start=1):
        words = schedule.attention_config(number - 1).dense_at(stage.max_length)
        if words is not None and stage.attention != "dense" and schedule.sparse_by(number - 1) == "s2":
            logger.warning(f"Stage {number}: {words}")


def check_trainable(model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse a run in which nothing is trained, or nothing of a part that the adapter's config names."""
    if isinstance(model, str) or peft_config is not None:  # made trainable when it is loaded, or the adapter put on
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"Nothing would be trained: no weight of {type(model).__name__} has requires_grad. Load an adapter by "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True), or give one (peft_config)."
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
        if isinstance(model.base_model, LongLoraModel) and model.active_adapters != ["default"]:
            raise ValueError(
                f"The adapter that would be trained is called {', '.join(model.active_adapters)}, and PEFT saves one "
                "of that name in a folder of its own, where no checkpoint of Trainer's is resumed from. Call it "
                '"default": leave out `adapter_name` where it is made, or loaded with is_trainable=True.'
            )
        return
    if peft_config is None:
        return
    if peft_config.inference_mode or getattr(peft_config, "resolved", False):
        raise ValueError(
            "`peft_config` is that of an adapter which has been put on a model, or was read from a saved one "
            "(inference_mode=True). To train that one on, give the trainer the PeftModel: "
            "PeftModel.from_pretrained(base, adapter, is_trainable=True). For a new adapter make a fresh "
            f"{type(peft_config).__name__}."
        )
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
            f"{args.n_gpu} GPUs in one process: Trainer would wrap the model in torch.nn.DataParallel. Start the "
            "script by `accelerate launch` or `torchrun`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
        )


def check_saving(accelerator: Any) -> None:
    """Refuse a launch that would train an adapter and save none."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise ValueError(
            f"FSDP would save no adapter: fsdp_state_dict_type is {plugin.state_dict_type.name}, with which Trainer "
            "writes parts of the weights. Set it to FULL_STATE_DICT in accelerate's config."
        )


def supported_config(model: Any, args: LongLoraSFTConfig) -> tuple[PreTrainedConfig, type[PreTrainedModel] | None]:
    """Configuration and class of a model or of a path, if shifted sparse attention can be used in it.

    A class of remote code is `None` until it is loaded.
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
