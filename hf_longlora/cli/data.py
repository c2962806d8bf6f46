"""Text from files and from the Hub, for training and for evaluation."""

import glob
import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIXES = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".md": "text",
}
"""The kind of a local file, by its suffix before any of `COMPRESSED`."""

CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""An empty cell has no value; "None", "NA" and "null" are texts, for which pandas would have none either."""

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "json": ("json", {}),
    "parquet": ("parquet", {}),
    "csv": ("csv", CSV),
    "tsv": ("csv", CSV | {"sep": "\t"}),
    "text": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),  # without the mark that some begin with
}
"""The builder of `datasets` for files of a kind, and its options."""

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")

KEPT = ("tools", "chat_template_kwargs", "image", "images")
"""Columns that TRL reads beside messages; those of pictures are kept to be refused."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
"""Who speaks in ShareGPT's conversations, as chat templates call them."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{}\n\n### Response:\n"
)
"""The prompt of Alpaca and of LongLoRA's own supervised fine-tuning, for tokenizers without a chat template."""

KINDS = f"{', '.join(SUFFIXES)}, and {', '.join(COMPRESSED)} of them"


def load_data(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """A dataset by its name on the Hub, or from a local file or folder: a `DatasetDict` of its splits.

    Local files are JSON Lines, JSON, Parquet, CSV, TSV or text, compressed or not; of text, each file is one document
    (a row with a `text`). A file is the split "train"; in a folder the names tell (`train.jsonl`, `test.jsonl`), else
    all of it is "train", and files that are neither are named and left out. A folder may also be one that
    `save_to_disk` wrote.

    Raises:
        ValueError: if a local file is of no known kind or can't be read, or a folder holds several kinds or none.
        OSError: if there is neither such a file nor such a dataset on the Hub.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.is_file():
        if _kind(path) is None:
            raise ValueError(f"{path} is of no known kind; known are {KINDS}.")
        return _read(path, {"train": [str(path)]}, streaming)
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return _saved(path, streaming)
    if path.is_dir() and not list(path.glob("*.py")):
        splits = _splits(path)
        kinds = Counter(_kind(file) for files in splits.values() for file in files)
        if len(kinds) != 1:
            found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "none"
            raise ValueError(f"{path} must hold data files of one kind ({KINDS}), and holds {found}.")
        return _read(path, splits, streaming)
    if _kind(path) is not None or path.is_absolute():  # meant as a file, and the Hub would be asked for long
        raise FileNotFoundError(f"{name} does not exist")
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except Exception as error:  # of many types: offline, no such repository, no such configuration
        raise OSError(
            f"{name} is no local file or folder, and can't be had from the Hub as a dataset: {error}"
        ) from error


def _splits(folder: Path) -> dict[str, list[str]]:
    """The data files of a folder by their splits, which `datasets` tells by names; the others are named."""
    from datasets.data_files import DataFilesDict, DataFilesList, EmptyDatasetError, get_data_patterns

    base = glob.escape(str(folder))
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except EmptyDatasetError:
        return {}
    data = {split: [file for file in files if _kind(file) is not None] for split, files in found.items()}
    read = {file for files in data.values() for file in files}
    rest = [Path(file).name for file in DataFilesList.from_patterns(["**"], base_path=base) if file not in read]
    if rest and read:
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        print(f"Not read in {folder}: {', '.join(rest[:3])}{more}.", file=sys.stderr)
    return {split: files for split, files in data.items() if files}


def _read(shown: Path, splits: Mapping[str, Sequence[str]], streaming: bool) -> Any:
    """Files of one kind, by `datasets`; `shown` is named where no single file is to blame."""
    from datasets import load_dataset

    files = [file for part in splits.values() for file in part]
    packed = next((file for file in files if file.endswith(".zst")), None)
    if packed is not None and find_spec("zstandard") is None:
        raise ImportError(f"{packed} needs a package that isn't installed: pip install zstandard")
    builder, options = BUILDERS[_kind(files[0]) or ""]
    patterns = {split: [glob.escape(file) for file in part] for split, part in splits.items()}
    try:
        data = load_dataset(builder, data_files=patterns, streaming=streaming, **options)
        for split in data.values():
            if streaming:
                next(iter(split))  # what can't be read at all is said now
            else:
                split.data.validate(full=True)  # whether texts are UTF-8, which Arrow takes on trust
        return data
    except Exception as error:  # of many types: one for each format and compression
        raise ValueError(_trouble(shown, files, error)) from error


def _trouble(shown: Path, files: Sequence[str], error: Exception) -> str:
    """Which of the files can't be read, and why: each is read alone."""
    from datasets import load_dataset

    cause = error.__cause__ or error  # that it could not make a dataset is all that `datasets` says itself
    said = f"can't be read as data: {cause or type(cause).__name__}"
    if getattr(cause, "errno", None) is not None:  # a full disk is no fault of theirs
        return f"{shown} {said}"
    builder, options = BUILDERS[_kind(files[0]) or ""]
    columns: dict[str, Sequence[str]] = dict.fromkeys(files, ())
    for file in files:
        try:
            alone = load_dataset(builder, data_files=glob.escape(file), split="train", streaming=True, **options)
            for row in alone:
                columns[file] = list(row)
        except StopIteration:  # what `datasets` makes of a file without a row
            continue
        except Exception as reason:
            if isinstance(reason, UnicodeDecodeError):
                return f"{file} is not UTF-8 text: {reason}"
            return f"{file} can't be read as data: {str(reason) or type(reason).__name__}"
    if empty := [file for file, names in columns.items() if not names]:
        return f"{shown if len(empty) == len(files) else empty[0]} holds no data"
    first = columns[files[0]]
    other = next((file for file in files if set(columns[file]) != set(first)), None)
    if other is not None:
        return (
            f"{shown} must hold files with the same columns: {files[0]} has {', '.join(first)}, and {other} has "
            f"{', '.join(columns[other])}"
        )
    return f"{shown} {said}"


def _saved(folder: Path, streaming: bool) -> Any:
    from datasets import DatasetDict, IterableDatasetDict, load_from_disk

    try:
        data = load_from_disk(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}, a folder of save_to_disk, can't be read: {error}") from error
    splits = data if isinstance(data, DatasetDict) else DatasetDict(train=data)
    if not streaming:
        return splits
    return IterableDatasetDict({name: split.to_iterable_dataset() for name, split in splits.items()})


def split_of(data: Any, name: str, what: str) -> Any:
    """A split, or a `ValueError` that names those there are."""
    if name not in data:
        raise ValueError(f"The data has no split {name!r} ({what}); it has {', '.join(map(repr, data))}.")
    return data[name]


def as_trl_reads(data: Any, text_field: str = "text", chat: bool = True) -> Any:
    """A dataset as published, in the columns that TRL's `SFTTrainer` reads, and in no other.

    | columns                                | become                                                              |
    |----------------------------------------|---------------------------------------------------------------------|
    | `input_ids`                            | all columns as they are                                             |
    | `prompt`, `completion` or `response`   | `prompt`, `completion`                                              |
    | `messages`, `conversations`            | `messages` of `role` and `content`, from `from`/`value` or JSON too |
    | the text field                         | the same                                                            |
    | `instruction`, `output`, maybe `input` | `prompt`, `completion`: messages, or text as Alpaca's (`ALPACA`)    |

    The first that is there counts; a text field of another name than "text" is meant and comes before all others.
    `chat` says whether there is a chat template, which messages need and instructions are put in.

    Raises:
        ValueError: if there are no such columns, messages are a string that is not JSON or have no chat template.
    """
    from ..trainer.data import column_names

    columns = column_names(data)
    names = read_of(columns, text_field)
    if "input_ids" in names:
        return data
    if "instruction" in names:
        return data.map(_instruction, with_indices=True, fn_kwargs={"chat": chat}, remove_columns=list(columns))
    data = data.select_columns(names)
    if text_field in names:
        return data
    for name, usual in (("response", "completion"), ("conversations", "messages")):
        if name in names:
            data = data.rename_column(name, usual)
    return _as_messages(data, chat)


def read_of(columns: Collection[str], text_field: str = "text") -> list[str]:
    """The columns that `as_trl_reads` reads.

    Raises:
        ValueError: there are none.
    """
    kept = [name for name in KEPT if name in columns]
    if "input_ids" in columns:
        return list(columns)
    if text_field in columns and text_field != "text":
        return [text_field, *kept]
    for names in (["prompt", "completion"], ["prompt", "response"], ["messages"], ["conversations"], [text_field]):
        if set(names) <= set(columns):
            return [*names, *kept]
    if {"instruction", "output"} <= set(columns):
        return [name for name in ("instruction", "input", "output") if name in columns]
    if {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            "The data are preferences ('chosen', 'rejected'), which supervised fine-tuning can't learn from. TRL's "
            'DPOTrainer does: `import hf_longlora`, and load the model with attn_implementation="s2attn".'
        )
    found = ", ".join(repr(name if len(name) <= 40 else f"{name[:40]}...") for name in sorted(columns))
    raise ValueError(
        f"No text in the data: the columns are {found}, and what is read is "
        f"{text_field!r} (dataset_text_field names another column), 'messages' or 'conversations', 'prompt' with "
        "'completion' or 'response', 'instruction' with 'output', or 'input_ids'."
    )


def _as_messages(data: Any, chat: bool) -> Any:
    """Messages of `role` and `content`, by TRL's converter, with the roles that chat templates know."""
    from trl.data_utils import maybe_convert_to_chatml

    from ..trainer.data import column_names

    columns = column_names(data)
    names: list[str] = [name for name in ("prompt", "completion", "messages") if name in columns]
    encoded = [name for name in names if name == "messages" and _is_plain(data, name)]
    if not encoded and all(_is_plain(data, name) for name in names):
        return data
    if not chat:
        raise ValueError(
            f"The data are messages ({', '.join(names)}), and the tokenizer has no chat template to write them in. "
            "Training takes one by chat_template_path: a .jinja file, or a model's name."
        )

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        for name in encoded:
            try:
                row[name] = json.loads(row[name])
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(
                    f"Row {index:,} has no messages in {name!r} but {str(row[name])[:80]!r}. A column of plain text "
                    "is read as such under another name than that: 'text', or what dataset_text_field says."
                ) from error
        row = maybe_convert_to_chatml(dict(row))
        for name in names:
            for message in row[name] or ():
                if not isinstance(message, dict):
                    continue
                if "role" in message:
                    message["role"] = ROLES.get(message["role"], message["role"])
                if isinstance(message.get("content"), list):
                    message["content"] = _joined(message["content"], index)
        return row

    # All columns are made anew: of a changed message, `datasets` would keep the old fields beside the new ones.
    return data.map(convert, with_indices=True, remove_columns=columns)


def _is_plain(data: Any, name: str) -> bool:
    if data.features is None:  # of a stream they may not be known
        return isinstance(next(iter(data))[name], str)
    return getattr(data.features[name], "dtype", None) in ("string", "large_string")


def _joined(parts: list[Any], index: int) -> str:
    """The text of a message in parts, which not all chat templates can write."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(f"Row {index:,} has a message with other parts than text: {str(parts)[:80]}")
    return "".join(part["text"] for part in parts)


def _instruction(row: dict[str, Any], index: int, chat: bool) -> dict[str, Any]:
    for name in ("instruction", "input", "output"):
        value = row.get(name)
        if not (isinstance(value, str) or (name == "input" and value is None)):
            raise ValueError(f"Row {index:,} has no text in {name!r} but {str(value)[:80]!r}. Leave such rows out.")
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    if not chat:
        return {"prompt": ALPACA.format(prompt), "completion": row["output"]}
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def load_documents(files: Sequence[str]) -> list[Any]:
    """The splits of files and folders, as `load_data` takes them, whose rows can be read.

    Raises:
        ValueError, OSError: as `load_data` and `as_trl_reads`; rows without a text.
    """
    from ..trainer.columns import check_columns

    splits: list[Any] = []
    for file in files:
        found = load_data(file)
        try:
            for split in found.values():
                check_columns(as_trl_reads(split), "text")
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        splits += found.values()
    return splits


def texts_of(splits: Sequence[Any], tokenizer: Any) -> list[str]:
    """Each row that has a text, as one: messages in the tokenizer's chat template, token ids decoded by it."""
    from trl import maybe_apply_chat_template

    def text_of(row: dict[str, Any]) -> str:
        if "input_ids" in row:
            return tokenizer.decode(row["input_ids"])
        row = maybe_apply_chat_template(row, tokenizer, tools=row.pop("tools", None))
        return row["prompt"] + row["completion"] if "prompt" in row else row["text"]

    chat = tokenizer.chat_template is not None
    texts = (text_of(row) for split in splits for row in as_trl_reads(split, chat=chat))
    return [text for text in texts if text]


def _kind(file: str | Path) -> str | None:
    file = Path(file)
    return SUFFIXES.get((Path(file.stem) if file.suffix in COMPRESSED else file).suffix.lower())
