"""What was measured, as tables of text: for the screen, the report and the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Records = Sequence[Mapping[str, Any]]
Table = tuple[list[str], list[list[str]]]
"""The head and the rows."""
NAMED = 4
"""Documents that a heading names, at most."""
RETRIEVAL = {"passkey": "Passkeys found", "needles": "Passkeys found among several"}


class Section(NamedTuple):
    """What was measured of one kind, as reports and cards show it.

    Args:
        title: Its heading.
        table: The numbers.
        note: What they rest on, papers as "arXiv 2404.06654"; "" if nothing says it.
        picture: The file that `hf-longlora evaluate` draws of it, if it draws one.
    """

    title: str
    table: Table
    note: str
    picture: str | None = None


def perplexity_of(results: Mapping[str, Any]) -> dict[str, Mapping[str, Records]]:
    """The perplexities among `hf-longlora evaluate`'s results, by the documents that they are of."""
    records, names = results.get("perplexity"), results.get("documents") or ["documents"]
    more = [f"{len(names) - NAMED:,} more"] if len(names) > NAMED else []
    return {", ".join([*names[:NAMED], *more]): records} if records else {}


def sections(perplexity: Mapping[str, Mapping[str, Records]], results: Mapping[str, Any]) -> Iterator[Section]:
    """All that was measured, in order.

    Args:
        perplexity: For each text, what `compare_attention` returned.
        results: `hf-longlora evaluate`'s others, by what was measured; what is missing or empty is left out.
    """
    for text, by_name in perplexity.items():
        measured = basis([record for records in by_name.values() for record in records])
        note = f"Each is over {measured}." if measured else ""
        yield Section(f"Perplexity on {text}", perplexity_table(by_name), note, "perplexity.png")
    if records := results.get("long_ppl"):
        judge = records[0].get("evaluator")
        note = (
            "Perplexity of key tokens (arXiv 2410.23771): those that the context of "
            f"{records[0]['short']:,} tokens does not tell and the longer one does, found by "
            f"{f'`{judge}`' if judge else 'the model itself'}."
        )
        yield Section("LongPPL", long_ppl_table(records), note)
    for kind, title in RETRIEVAL.items():
        if records := results.get(kind):
            note = f"Each is of {basis(records)}." if basis(records) else ""
            title = f"{title}, by length of the text and depth of the passkey"
            yield Section(title, retrieval_table(records), note, f"{kind}.png")
    if records := results.get("ruler"):
        chat = " in the tokenizer's chat template" if all(record["chat_template"] for record in records) else ""
        note = (
            f"Each is of {basis(records)}{chat}: tasks of RULER (arXiv 2404.06654) as lm-eval makes and scores them."
        )
        yield Section("RULER, by length of the text", ruler_table(records), note)


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
