"""`hf-longlora train`: TRL's parser and field names, our trainer."""

import argparse
import difflib
import sys
from collections.abc import Collection
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .options import DTYPES, check_writable

OF_THE_STAGES = {"target_length", "rope_type", "rope_parameters"}
RESOLVED = {"rope", "base_rope", "schedule", "resolved"}
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""TRL's names of LoRA's settings, and PEFT's."""
INTERRUPTED = "The same command with --resume goes on from the last checkpoint."

ABOUT = """\
Extend a model's context in stages, as LongLoraSFTTrainer does it. Options are TRL's (ScriptArguments, ModelConfig),
those of LongLoraSFTConfig with all that SFTConfig and TrainingArguments have, and the adapter's; from a YAML file by
--config, and each of them on the command line, which wins.

  hf-longlora train --config run.yaml
  hf-longlora train --config run.yaml --resume              # after a stop, from the last whole checkpoint
  accelerate launch -m hf_longlora train --config run.yaml  # several processes

with run.yaml:

  model_name_or_path: meta-llama/Llama-3.1-8B
  dataset_name: books.jsonl        # or a dataset's name on the Hub, a folder, .parquet, .txt
  output_dir: llama-long
  stages:                          # or: auto, with max_length and max_steps
    - {max_length: 262144, max_steps: 200}
  packing: true
  packing_strategy: wrapped
  gradient_checkpointing: true
"""


def add(commands: Any) -> None:
    commands.add_parser(
        "train", help="extend a model's context in stages, from a YAML file or options", add_help=False
    )


def make_parser() -> Any:
    """TRL's parser over its script and model arguments, ours, and `LongLoraSFTConfig`."""
    from trl import ModelConfig, ScriptArguments, TrlParser

    from ..trainer import LongLoraSFTConfig
    from ..tuner import LongLoraConfig

    @dataclass
    class RunArguments(ScriptArguments):
        dataset_name: str | None = field(
            default=None,
            metadata={
                "help": "A dataset's name on the Hub, or a local file or folder: jsonl, json, parquet, csv, tsv, txt."
            },
        )
        resume: bool = field(
            default=False,
            metadata={"help": "Go on from the last whole checkpoint in output_dir; start afresh if there is none."},
        )

    @dataclass
    class ModelArguments(ModelConfig):
        dtype: str | None = field(
            default=None,
            metadata={
                "help": "The weights' dtype. Default: the checkpoint's with an adapter, float32 without one.",
                "choices": list(DTYPES),
            },
        )
        use_peft: bool = field(default=True, metadata={"help": "Train a LONGLORA adapter, not all weights."})
        lora_target_modules: list[str] | None = field(
            default=None, metadata={"help": "What LoRA is put on. Default: the attention projections."}
        )

    hints, known = get_type_hints(LongLoraConfig), {f.name: f for f in fields(LongLoraConfig)}
    other_defaults = {name: known[LORA[name]] for name in ("lora_r", "lora_alpha", "lora_dropout")}
    named = {f.name: f for f in own_fields()} | other_defaults
    own = [(name, hints[f.name], field(default=f.default, metadata=f.metadata)) for name, f in named.items()]
    parts: Any = (RunArguments, make_dataclass("AdapterArguments", own, bases=(ModelArguments,)), LongLoraSFTConfig)
    return TrlParser(
        parts,
        prog="hf-longlora train",
        usage="hf-longlora train [--config FILE] [--resume] [OPTION VALUE ...]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run(options: argparse.Namespace) -> None:
    from ..trainer import LongLoraSFTTrainer
    from .data import as_trl_reads, load_data, split_of

    script, model, args = parse(options.arguments)
    if script.dataset_name is None:
        raise ValueError("No data: name it by dataset_name, a dataset on the Hub or a local file or folder.")
    template = Path(args.chat_template_path or "")
    if template.suffix in (".jinja", ".j2") and not template.is_file():  # TRL would ask the Hub for it
        raise FileNotFoundError(f"{template} does not exist (chat_template_path)")
    check_writable(Path(args.output_dir))
    checkpoint = _checkpoint(script, args)
    config = config_of(model, args)  # before the data are read
    data = load_data(script.dataset_name, script.dataset_config, script.dataset_streaming)
    # With a template, instructions are a conversation: the model's, if no other is given.
    chat = args.chat_template_path is not None or _has_chat_template(model, args)
    train = split_of(data, script.dataset_train_split, "dataset_train_split")
    if script.dataset_streaming and args.train_sampling_strategy != "sequential":
        train = train.shuffle(seed=args.order_seed, buffer_size=1)  # its files; the trainer shuffles their examples
    if args.process_index == 0:
        _say_columns(train, args)
    train = as_trl_reads(train, args.dataset_text_field, chat)
    if args.process_index == 0:
        _say_plan(model, args, config, train.column_names or ())
    evaluated = None
    if args.eval_strategy != "no":
        evaluated = split_of(data, script.dataset_test_split, "dataset_test_split")
        evaluated = as_trl_reads(evaluated, args.dataset_text_field, chat)

    args.model_init_kwargs = _init_kwargs(model, args) | dict(args.model_init_kwargs or {})
    trainer = LongLoraSFTTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=evaluated,
        peft_config=_adapter(model),
    )
    for what, line in trainer.stage_data.items():
        trainer.accelerator.print(f"{what}: {line}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved in {Path(args.output_dir).resolve()}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        trainer.accelerator.print(f"On the Hub: {trainer.hub_model_id}")


def _checkpoint(script: Any, args: Any) -> Any:
    """What to resume from, as the trainer takes it: a folder, `True` for the last one, or nothing."""
    from ..trainer import last_checkpoint

    checkpoint = args.resume_from_checkpoint
    if str(checkpoint).lower() == "true":  # as scripts for Trainer have it: the last one, which has to be there
        return True
    if checkpoint is not None:
        return checkpoint
    last = last_checkpoint(args.output_dir)
    if args.process_index == 0 and (last or script.resume):
        if not script.resume:
            said = f"Starting afresh beside {last}, whose place others will take: --resume goes on from it."
        else:
            said = f"Resuming from {last}." if last else f"No whole checkpoint in {args.output_dir}: starting afresh."
        print(said, file=sys.stderr)
    return last if script.resume else None


def _say_columns(train: Any, args: Any) -> None:
    """Print which columns are read, and which are not."""
    from ..trainer.data import column_names
    from .data import read_of

    columns = column_names(train)
    read = read_of(columns, args.dataset_text_field)
    unread = ", ".join(name for name in columns if name not in read)
    print(f"Read of each example: {', '.join(read)}{f'; not read: {unread}' if unread else ''}", file=sys.stderr)


def _say_plan(model: Any, args: Any, config: Any, columns: Collection[str]) -> None:
    """Print what the run takes on this machine's card, if there is one that is known."""
    from ..planning import local_gpu

    if (gpu := local_gpu()) is None:
        return
    try:
        _, stages = plan_of(model, args, config, gpu, args.world_size, columns)
    except ValueError as error:
        print(f"The run can't be planned: {error}", file=sys.stderr)
    else:
        print(f"Planned on {cards(gpu, args.world_size)}: {in_all(stages)}", file=sys.stderr)
        print("\n".join(f"  stage {number}, {stage}" for number, stage in enumerate(stages, 1)), file=sys.stderr)


def _init_kwargs(model: Any, args: Any) -> dict[str, Any]:
    """How the model is loaded. Over a quantized base what is computed in is said in `model`, where TRL reads it."""
    from trl import get_quantization_config

    if model.load_in_4bit or model.load_in_8bit:
        model.dtype = "float16" if args.fp16 else "bfloat16"
    given = {
        "revision": model.model_revision,
        "dtype": _dtype(model),
        "trust_remote_code": args.trust_remote_code or None,
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }
    return {name: value for name, value in given.items() if value is not None}


def config_of(model: Any, args: Any) -> Any:
    """The config of the model that is trained.

    Raises:
        ValueError: if none is named, or it is an adapter.
        OSError: if it can't be had.
    """
    from ..lookup import read_config, refuse_adapter

    if model.model_name_or_path is None:
        raise ValueError("No model: name it by model_name_or_path.")
    refuse_adapter(model.model_name_or_path)
    revision, trusted = model.model_revision, args.trust_remote_code
    return read_config(model.model_name_or_path, revision=revision, trust_remote_code=trusted)


def plan_of(model: Any, args: Any, config: Any, gpu: Any, gpus: int, columns: Collection[str] = ()) -> Any:
    """What `plan_stages` gives for a run as it was parsed."""
    import torch

    from ..trainer import plan_stages

    quantized = model.load_in_4bit or model.load_in_8bit
    name = _dtype(model)
    return plan_stages(
        config,
        args,
        gpu,
        adapter=_adapter(model),
        dtype=(config.dtype or torch.float32) if name == "auto" else getattr(torch, name),
        quantization=None if not quantized else "4bit" if model.load_in_4bit else "8bit",
        gpus=gpus,
        columns=columns,
    )


def cards(gpu: Any, gpus: int) -> str:
    return f"{'one' if gpus == 1 else gpus} {gpu.name} ({gpu.memory_gib:g} GiB)"


def in_all(stages: Any) -> str:
    peak, hours = max(stage.step.total for stage in stages), sum(stage.hours for stage in stages)
    return f"{peak:.1f} GiB at most, {hours:.2g} h in all"


def _dtype(model: Any) -> str:
    """The dtype of the weights, where they are not quantized."""
    return model.dtype or ("auto" if model.use_peft else "float32")


def _has_chat_template(model: Any, args: Any) -> bool:
    from transformers import AutoTokenizer

    revision, trusted = model.model_revision, args.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=revision, trust_remote_code=trusted)
    return tokenizer.chat_template is not None


def parse(arguments: list[str]) -> Any:
    """TRL's script and model arguments, with ours, and the trainer's."""
    parser = make_parser()
    # TRL wants `--config=FILE` in two.
    arguments = [part for one in arguments for part in (one.split("=", 1) if one.startswith("--config=") else [one])]
    rest = list(arguments)
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            parser.error("--config needs a YAML file")
        if not Path(rest[at + 1]).is_file():
            raise FileNotFoundError(f"{rest[at + 1]} does not exist or is no file")
        _check_file(Path(rest[at + 1]), parser.dataclass_types)
        del rest[at : at + 2]
    options = list(parser._option_string_actions)
    if unknown := parser.parse_known_args(rest)[1]:  # before anything is made of the others
        parser.error("unknown: " + " ".join(_meant(part, options) if part[:2] == "--" else part for part in unknown))
    *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        known = [option.removeprefix("--") for option in options]
        names = ", ".join(_meant(name.removeprefix("--"), known) for name in unknown[::2])
        raise ValueError(f"The --config file has unknown options: {names}")
    return parsed


def _check_file(file: Path, classes: Collection[type]) -> None:
    """Raise a `ValueError` on what YAML reads without a word: an option twice, or one that needs a value without it.

    Args:
        file: Of `--config`.
        classes: Those whose fields are the options.
    """
    import yaml

    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The --config file is not YAML: {error}") from error
    if not isinstance(node, yaml.MappingNode):
        return  # TRL says so
    names = [key.value for key, _ in node.value]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"The --config file has {', '.join(twice)} more than once.")
    kinds = {name: kind for one in classes for name, kind in get_type_hints(one).items()}
    empty = [key.value for key, value in node.value if value.tag == "tag:yaml.org,2002:null"]
    needing = [name for name in empty if name in kinds and type(None) not in get_args(kinds[name])]
    if needing:
        raise ValueError(f"The --config file has no value for {', '.join(needing)}: give one, or leave it out.")
    many = [key.value for key, value in node.value if isinstance(value, yaml.CollectionNode)]
    single = [name for name in many if name in kinds and not _takes_many(kinds[name])]
    if single:
        raise ValueError(f"The --config file has more than a single value for {', '.join(single)}.")


def _takes_many(kind: Any) -> bool:
    """Whether a type takes a list or a mapping."""
    return any(each is Any or (get_origin(each) or each) in (list, dict) for each in (kind, *get_args(kind)))


def _meant(name: str, known: list[str]) -> str:
    """An unknown option, and what may have been meant."""
    if name.removeprefix("--") in OF_THE_STAGES:
        return f"{name} (each stage has its own: see stages)"
    near = difflib.get_close_matches(name, known, n=1)
    return f"{name} (did you mean {near[0]}?)" if near else name


def _adapter(model: Any) -> Any:
    """The adapter that `ModelConfig`'s fields and ours describe; `None` to train all weights."""
    from ..tuner import LongLoraConfig

    if not model.use_peft:
        idle = [f.name for f in own_fields() if getattr(model, f.name) != f.default]
        if idle:
            raise ValueError(f"{', '.join(idle)}: of an adapter, and use_peft=false trains all weights without one.")
        return None
    lora = {ours: getattr(model, name) for name, ours in LORA.items() if getattr(model, name) is not None}
    name = lora.get("target_modules")
    if isinstance(name, str) and name.isidentifier():
        lora["target_modules"] = [name]  # of a list of one TRL makes a string, to PEFT a pattern of whole names
    return LongLoraConfig(**lora, **{f.name: getattr(model, f.name) for f in own_fields()})


def own_fields() -> list[Any]:
    """The fields that `LongLoraConfig` adds to LoRA's, without those that stages set or a model resolves."""
    from peft import LoraConfig

    from ..tuner import LongLoraConfig

    known = {f.name for f in fields(LoraConfig)} | OF_THE_STAGES | RESOLVED
    return [f for f in fields(LongLoraConfig) if f.name not in known]
