"""For MkDocs: a config whose fields say themselves what they are (`metadata["help"]`) is shown as a table of them."""

import dataclasses
import importlib
import re
from typing import Any

FIELDS = re.compile(r"^<!-- fields of (\S+)\.(\w+) -->$", re.M)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    return FIELDS.sub(lambda found: _table(getattr(importlib.import_module(found[1]), found[2])), markdown)


def _table(config: type) -> str:
    """Of the fields of the class itself; those of its bases are another library's to document."""
    own = [field for field in dataclasses.fields(config) if field.name in vars(config)["__annotations__"]]
    rows = [f"| `{field.name}` | `{field.default!r}` | {field.metadata['help']} |" for field in own]
    return "\n".join(["| field | default | |", "| --- | --- | --- |", *rows])
