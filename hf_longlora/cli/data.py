"""Text from files and from the Hub, for training and for evaluation."""

import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"}
"""The `datasets` builder of a local file, by its suffix before any `.gz`."""

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

    Local files are JSON Lines, JSON, Parquet, CSV or text; of text, each file is one document (a row with a `text`). A
    file is the split "train"; in a folder the names tell (`train.jsonl`, `test.jsonl`), else all of it is "train".

    Raises:
        ValueError: if a local file is of no known kind or can't be read, or a folder holds several kinds or none.
        OSError: if there is neither such a file nor such a dataset on the Hub.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.is_file():
        return _read(path, streaming=streaming, data_files=str(path), **_builder(path))
    if path.is_dir() and not list(path.glob("*.py")):
        files = [file for file in path.rglob("*") if file.is_file() and _suffix(file) in BUILDERS]
        kinds = Counter(BUILDERS[_suffix(file)] for file in files if not file.name.startswith((".", "README")))
        if len(kinds) != 1:
            found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items()) or "none"
            raise ValueError(
                f"{path} must hold data files of one kind ({', '.join(BUILDERS)}, .gz too), and holds {found}."
            )
        of_kind = next(file for file in files if BUILDERS[_suffix(file)] in kinds)
        return _read(path, streaming=streaming, data_dir=str(path), **_builder(of_kind))
    if _suffix(path) in BUILDERS or path.is_absolute():  # meant as a file, and the Hub would be asked for long
        raise FileNotFoundError(f"{name} does not exist")
    try:
        return load_dataset(name, name=config, streaming=streaming)
    except Exception as error:  # of many types: offline, no such repository, no such configuration
        raise OSError(
            f"{name} is no local file or folder, and can't be had from the Hub as a dataset: {error}"
        ) from error


def _read(file: Path, **options: Any) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        return load_dataset(**options)
    except (DatasetGenerationError, ValueError) as error:  # the first says nothing itself, but its cause does
        raise ValueError(f"{file} can't be read as data: {error.__cause__ or error}") from error
    except StopIteration as error:  # what `datasets` makes of files without a row
        raise ValueError(f"{file} holds no data") from error


def split_of(data: Any, name: str, what: str) -> Any:
    """A split, or a `ValueError` that names those there are."""
    if name not in data:
        raise ValueError(f"The data has no split {name!r} ({what}); it has {', '.join(map(repr, data))}.")
    return data[name]


def read_documents(file: Path) -> list[str]:
    """The documents of a file, of the kinds that `load_data` reads: a text, or the `text` of each row.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of no known kind, not UTF-8, or a row has no `text`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist or is no file")
    is_text = _builder(file)["path"] == "text"
    if not is_text and _suffix(file) != ".jsonl":
        return _text_column(file, load_data(str(file))["train"])
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if is_text:
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines breaks at U+2028, too, which JSON allows
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: not a JSON object with a `text`") from error
        if not isinstance(text, str):
            raise ValueError(f"{file}, line {number}: its `text` is {json.dumps(text)[:80]}, not a text")
        documents.append(text)
    return documents


def _text_column(file: Path, rows: Any) -> list[str]:
    if "text" not in rows.column_names:
        raise ValueError(f"{file} has no column `text`: its columns are {', '.join(rows.column_names)}")
    documents = rows["text"][:]
    for number, text in enumerate(documents, start=1):
        if not isinstance(text, str):
            raise ValueError(f"{file}, row {number}: its `text` is {text!r:.80}, not a text")
    return documents


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix == ".gz" else file.suffix


def _builder(file: Path) -> dict[str, Any]:
    builder = BUILDERS.get(_suffix(file))
    if builder is None:
        raise ValueError(f"{file} is of no known kind; known are {', '.join(BUILDERS)}, and .gz of them.")
    return {"path": builder} | ({"sample_by": "document"} if builder == "text" else {})
