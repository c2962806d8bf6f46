"""Text from files and from the Hub, for training and for evaluation."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"}
"""The `datasets` builder of a local file, by its suffix before any of `COMPRESSED`."""

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

KINDS = f"{', '.join(BUILDERS)}, and {', '.join(COMPRESSED)} of them"

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What the weights of a model may be loaded in."""


def check_writable(folder: Path) -> None:
    """Raise an `OSError` if a folder can't be made or written to: now, and not when the work is done."""
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise NotADirectoryError(f"{folder} can't be written to: {found} is no folder")
    try:
        tempfile.TemporaryFile(dir=found).close()  # permissions alone don't tell: a full disk, a read-only mount
    except OSError as error:
        raise OSError(f"{folder} can't be written to: {error.strerror or error} in {found}") from error


def load_data(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """A dataset by its name on the Hub, or from a local file or folder: a `DatasetDict` of its splits.

    Local files are JSON Lines, JSON, Parquet, CSV or text, compressed or not; of text, each file is one document (a
    row with a `text`). A file is the split "train"; in a folder the names tell (`train.jsonl`, `test.jsonl`), else all
    of it is "train". A folder may also be one that `save_to_disk` wrote.

    Raises:
        ValueError: if a local file is of no known kind or can't be read, or a folder holds several kinds or none.
        OSError: if there is neither such a file nor such a dataset on the Hub.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.is_file():
        if _suffix(path) not in BUILDERS:
            raise ValueError(f"{path} is of no known kind; known are {KINDS}.")
        return _read([path], streaming=streaming)
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return _saved(path, streaming)
    if path.is_dir() and not list(path.glob("*.py")):
        files = [file for file in path.rglob("*") if file.is_file() and _suffix(file) in BUILDERS]
        files = [file for file in files if not file.name.startswith((".", "README"))]
        kinds = Counter(BUILDERS[_suffix(file)] for file in files)
        if len(kinds) != 1:
            found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "none"
            raise ValueError(f"{path} must hold data files of one kind ({KINDS}), and holds {found}.")
        return _read(files, streaming=streaming, data_dir=str(path))
    if _suffix(path) in BUILDERS or path.is_absolute():  # meant as a file, and the Hub would be asked for long
        raise FileNotFoundError(f"{name} does not exist")
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except Exception as error:  # of many types: offline, no such repository, no such configuration
        raise OSError(
            f"{name} is no local file or folder, and can't be had from the Hub as a dataset: {error}"
        ) from error


def _read(files: Sequence[Path], *, streaming: bool, **options: Any) -> Any:
    """Files of one kind, by `datasets`: those of `data_dir` with their splits, else the first one alone."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    builder = BUILDERS[_suffix(files[0])]
    if builder == "text":
        options["sample_by"] = "document"
    shown = options.get("data_dir", files[0])
    packed = next((file for file in files if file.suffix == ".zst"), None)
    if packed is not None and find_spec("zstandard") is None:
        raise ImportError(f"{packed} needs a package that isn't installed: pip install zstandard")
    if "data_dir" not in options:
        options["data_files"] = str(files[0])
    try:
        data = load_dataset(builder, streaming=streaming, **options)
        if streaming:  # what can't be read at all is said now
            for split in data.values():
                next(iter(split))
        return data
    except (DatasetGenerationError, ValueError) as error:  # the first says nothing itself, but its cause does
        if isinstance(error.__cause__ or error, UnicodeDecodeError):
            shown = next((file for file in files if not _is_text(file)), shown)
            raise ValueError(f"{shown} is not UTF-8 text: {error.__cause__ or error}") from error
        raise ValueError(f"{shown} can't be read as data: {error.__cause__ or error}") from error
    except StopIteration as error:  # what `datasets` makes of files without a row
        raise ValueError(f"{shown} holds no data") from error


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


def _is_text(file: Path) -> bool:
    import fsspec

    try:
        with fsspec.open(file, "rt", encoding="utf-8", compression="infer") as text:
            return all(True for _ in text)
    except UnicodeDecodeError:
        return False


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

    Args:
        data: A dataset or a stream.
        text_field: The column of plain text.
        chat: Whether there is a chat template, which messages need and instructions are put in.

    Raises:
        ValueError: if there are no such columns, messages are a string that is not JSON or have no chat template.
    """
    from ..trainer.data import column_names

    columns = set(column_names(data))
    kept = [name for name in KEPT if name in columns]
    if "input_ids" in columns:
        return data
    if text_field in columns and text_field != "text":
        return data.select_columns([text_field, *kept])
    for answer in ("completion", "response"):
        if {"prompt", answer} <= columns:
            data = data.select_columns(["prompt", answer, *kept])
            return _as_messages(data if answer == "completion" else data.rename_column(answer, "completion"), chat)
    for name in ("messages", "conversations"):
        if name in columns:
            data = data.select_columns([name, *kept])
            return _as_messages(data if name == "messages" else data.rename_column(name, "messages"), chat)
    if text_field in columns:
        return data.select_columns([text_field, *kept])
    if {"instruction", "output"} <= columns:
        return data.map(_instruction, fn_kwargs={"chat": chat}, remove_columns=list(columns))
    if {"chosen", "rejected"} <= columns:
        raise ValueError(
            "The data are preferences ('chosen', 'rejected'), which supervised fine-tuning can't learn from. TRL's "
            'DPOTrainer does: `import hf_longlora`, and load the model with attn_implementation="s2attn".'
        )
    raise ValueError(
        f"No text in the data: the columns are {', '.join(map(repr, sorted(columns)))}, and what is read is "
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
                if isinstance(message, dict) and "role" in message:
                    message["role"] = ROLES.get(message["role"], message["role"])
        return row

    # All columns are made anew: of a changed message, `datasets` would keep the old fields beside the new ones.
    return data.map(convert, with_indices=True, remove_columns=columns)


def _is_plain(data: Any, name: str) -> bool:
    if data.features is None:  # of a stream they may not be known
        return isinstance(next(iter(data))[name], str)
    return getattr(data.features[name], "dtype", None) in ("string", "large_string")


def _instruction(row: dict[str, Any], chat: bool) -> dict[str, Any]:
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
    """Each row as one text: messages in the tokenizer's chat template, token ids decoded by it."""
    from trl import maybe_apply_chat_template

    def text_of(row: dict[str, Any]) -> str:
        if "input_ids" in row:
            return tokenizer.decode(row["input_ids"])
        row = maybe_apply_chat_template(row, tokenizer, tools=row.pop("tools", None))
        return row["prompt"] + row["completion"] if "prompt" in row else row["text"]

    chat = tokenizer.chat_template is not None
    return [text_of(row) for split in splits for row in as_trl_reads(split, chat=chat)]


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix
