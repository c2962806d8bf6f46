"""What TRL reads of a dataset: its columns of texts and messages, and what of them can't be trained on."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, LargeList, List, Value

from .config import LongLoraSFTConfig
from .data import in_arrow

TOLD = ("tool_calls", "thinking", "reasoning_content")
"""What a message may say in the place of content."""


def check_dataset(dataset: Any, args: LongLoraSFTConfig, formatting_func: Any) -> set[str]:
    """The columns of a dataset or a stream, if it can be trained on."""
    if isinstance(dataset, Mapping):
        raise TypeError(f"`train_dataset` must be one split of a dataset, not all of them: {', '.join(dataset)}.")
    check_type(dataset, "train_dataset")
    if isinstance(dataset, IterableDataset):
        check_stream(args)
        dataset = Dataset.from_list(list(dataset.take(1)), features=dataset.features)
    if "seq_lengths" in dataset.column_names:
        raise ValueError(
            "The dataset has a column 'seq_lengths', which says what documents rows are packed of. Stages pack by "
            "themselves (packing=True): give each document a row of its own, or remove_columns('seq_lengths')."
        )
    check_rows_of(dataset, args, formatting_func)
    return set(dataset.column_names)


def check_evaluated(dataset: Any, args: LongLoraSFTConfig, formatting_func: Any, name: str) -> str:
    """What to call data for evaluation, if they are fit for it: they come after so many steps, and would end a run.

    `name` is "eval", or what `eval_dataset` calls one of several.
    """
    what = "eval_dataset" if name == "eval" else f"eval_dataset[{name!r}]"
    check_type(dataset, what)
    if isinstance(dataset, Dataset):
        with said_of(what):
            check_rows_of(dataset, args, formatting_func)
    return what


@contextmanager
def said_of(what: str) -> Iterator[None]:
    """Inside, a `ValueError` says which data it is of."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"`{what}`: {error}") from error


def check_type(dataset: Any, what: str) -> None:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"`{what}` must be a datasets.Dataset or a datasets.IterableDataset, got {type(dataset).__name__}. "
            "Of a list one is made by Dataset.from_list, of a generator a stream by IterableDataset.from_generator."
        )


def check_rows_of(dataset: Dataset, args: LongLoraSFTConfig, formatting_func: Any) -> None:
    """Raise a `ValueError` unless TRL can make tokens of each row."""
    if len(dataset) == 0:
        raise ValueError("The dataset is empty.")
    columns = set(dataset.column_names)
    if columns & {"image", "images"}:
        raise ValueError("Datasets with images are not supported: stages cut text to their length.")
    if "labels" in columns and "input_ids" not in columns:
        raise ValueError(
            "The dataset has a column 'labels', which TRL takes for those of tokens, and no 'input_ids'. Rename it, "
            "or remove_columns('labels')."
        )
    for name in columns & {"input_ids", "labels"}:
        kind: Any = dataset.features[name]
        if not (isinstance(kind, List | LargeList) and "int" in getattr(kind.feature, "dtype", "")):
            raise ValueError(f"The column {name!r} of the dataset holds {kind}, not lists of token ids.")
    if formatting_func is None:
        check_columns(dataset, args.dataset_text_field)


def check_tokens(dataset: Dataset, vocabulary: int) -> None:
    """Raise a `ValueError` on token ids of a tokenized dataset that a model's embeddings don't have."""
    for ids in in_arrow(dataset, "input_ids"):
        found = pc.min_max(pc.list_flatten(ids)).as_py()
        if found["min"] is not None and not 0 <= found["min"] <= found["max"] < vocabulary:
            raise ValueError(
                f"The data have token ids from {found['min']:,} to {found['max']:,}, and the model's are 0 to "
                f"{vocabulary - 1:,}. Tokenize them by the model's own tokenizer; where tokens were added to it, call "
                "model.resize_token_embeddings(len(tokenizer)) first."
            )


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
            if says_nothing(row[name]):
                raise ValueError(
                    f"The column {name!r} of the stream has nothing in row {index:,}, or a message without content. "
                    f"Leave such rows out: stream.filter(lambda row: row[{name!r}])."
                )
        return row

    return stream.map(check, with_indices=True) if names else stream


def says_nothing(value: Any) -> bool:
    """Whether there is no text or no message, or a message has no content, of which chat templates make "None"."""
    if not isinstance(value, list):
        return value is None
    return not value or any(
        not isinstance(message, Mapping)
        or (message.get("content") is None and message.get("value") is None and not any(map(message.get, TOLD)))
        for message in value
    )


def check_texts(dataset: Dataset, name: str, plain: bool) -> None:
    """Raise a `ValueError` unless a column holds nothing but texts or, where it need not be plain, messages."""
    kind: Any = dataset.features[name]
    text = getattr(kind, "dtype", None) in ("string", "large_string")
    messages = isinstance(kind, List | LargeList) and not isinstance(kind.feature, Value)
    if plain and not text:
        raise ValueError(f"The column {name!r} of the dataset holds {kind}, not text alone.")
    fields = kind.feature if messages and isinstance(kind.feature, dict) else None
    roles = fields is not None and "role" in fields and not fields.keys().isdisjoint({"content", *TOLD})
    known = fields is None or roles or {"from", "value"} <= fields.keys()
    if not (messages and known) and (not text or name in ("messages", "conversations")):
        raise ValueError(
            f"The column {name!r} of the dataset holds {kind}, not a list of messages in each row, with 'role' and "
            "'content'."
        )
    if text:  # in Arrow: of books that is no small part of reading them
        missing = pc.is_null(dataset.select_columns([name]).with_format("arrow")[:][name])
        rows = pc.indices_nonzero(missing).to_pylist()
    else:
        rows = [index for index, value in enumerate(dataset[name]) if says_nothing(value)]
    if rows:
        what = "text" if text else "message with content"
        raise ValueError(
            f"The column {name!r} of the dataset has no {what} in {len(rows):,} of {len(dataset):,} rows, such as row "
            f"{rows[0]:,}. Leave them out: dataset.filter(lambda row: row[{name!r}])."
        )
