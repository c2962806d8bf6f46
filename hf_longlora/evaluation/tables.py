"""What was measured, as tables of text: for the screen, the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Records = Sequence[Mapping[str, Any]]
Table = tuple[list[str], list[list[str]]]
"""The head and the rows."""


def perplexity_table(records_by_name: Mapping[str, Records]) -> Table:
    """A row for each name, a column for each length, of what `perplexity_by_length` returned."""
    lengths = sorted({record["length"] for records in records_by_name.values() for record in records})
    rows = []
    for name, records in records_by_name.items():
        found = {record["length"]: f"{record['perplexity']:.2f}" for record in records}
        rows.append([name, *(found.get(length, "") for length in lengths)])
    return ["model", *(f"{length:,} tokens" for length in lengths)], rows


def retrieval_table(records: Records) -> Table:
    """A row for each length, a column for each depth, of what `passkey_accuracy` and its like returned."""
    depths = sorted({record["depth"] for record in records})
    rows = []
    for length in sorted({record["length"] for record in records}):
        found = {record["depth"]: f"{record['accuracy']:.0%}" for record in records if record["length"] == length}
        rows.append([f"{length:,}", *(found.get(depth, "") for depth in depths)])
    return ["tokens", *(f"{depth:.0%}" for depth in depths)], rows


def ruler_table(records: Records) -> Table:
    """A row for each length, a column for each task and their mean, of what `ruler_accuracy` returned."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    rows = []
    for length in sorted({record["length"] for record in records}):
        found = {record["task"]: record["accuracy"] for record in records if record["length"] == length}
        mean = sum(found.values()) / len(found)
        rows.append([f"{length:,} tokens", *(f"{found[task]:.1%}" for task in tasks), f"{mean:.1%}"])
    return ["tokens", *tasks, "mean"], rows


def long_ppl_table(records: Records) -> Table:
    """LongPPL and the share of key tokens, a column for each length, of what `long_perplexity` returned."""
    values = ["no key token" if record["perplexity"] is None else f"{record['perplexity']:.2f}" for record in records]
    shares = [f"{record['key_tokens'] / record['tokens']:.2%} of {record['tokens']:,}" for record in records]
    head = ["", *(f"{record['length']:,} tokens" for record in records)]
    return head, [["LongPPL", *values], ["key tokens", *shares]]


def basis(records: Records) -> str:
    """What each number rests on, `"1,280 tokens of 12 documents"` or `"10 texts"`; `""` if records don't tell."""
    if all("trials" in record for record in records):
        return _counted("trials", "text", records)
    if all("tokens" in record and "documents" in record for record in records):
        return f"{_counted('tokens', 'token', records)} of {_counted('documents', 'document', records)}"
    return ""


def _counted(key: str, what: str, records: Records) -> str:
    """`12 documents`, `1 document`, `3 to 12 documents`."""
    counts = sorted({record[key] for record in records})
    numbers = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    return f"{numbers} {what}" + ("" if counts[-1] == 1 else "s")
