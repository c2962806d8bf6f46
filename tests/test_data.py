"""Data as published: files as they come, in the columns that TRL reads."""

import bz2
import gzip
import json
import lzma
import re
import shutil

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from packaging.version import Version
from trl import SFTTrainer

from hf_longlora import LongLoraSFTConfig, LongLoraSFTTrainer
from hf_longlora.cli import main
from hf_longlora.cli.data import ALPACA, as_trl_reads, load_data, load_documents, texts_of
from hf_longlora.trainer.columns import check_columns, check_rows, check_tokens, read_columns

QUESTION, ANSWER = "What color is the sky?", "It is blue."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
PAIR = {"prompt": CHAT[:1], "completion": CHAT[1:]}
LONG = "The quick brown fox jumps over the lazy dog, and a long book has many chapters. " * 12


@pytest.fixture
def folder(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    """A base with a chat template and a run's file, to stand in."""
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    (tmp_path / "run.yaml").write_text(
        "{model_name_or_path: base, output_dir: out, stages: [{max_length: 128, max_steps: 1}], use_cpu: true,\n"
        "bf16: false, report_to: none, report: false, per_device_train_batch_size: 1, lora_r: 2}\n"
    )
    return tmp_path


def train(dataset, *arguments):
    return main(["train", "--config", "run.yaml", "--dataset_name", dataset, *arguments])


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"text": QUESTION, "meta": 1}, {"text": QUESTION}),
        ({"conversations": SHAREGPT, "id": "a"}, {"messages": CHAT}),
        ({"conversations": CHAT}, {"messages": CHAT}),
        ({"messages": SHAREGPT}, {"messages": CHAT}),
        ({"messages": json.dumps(CHAT)}, {"messages": CHAT}),
        ({"messages": CHAT, "prompt": QUESTION, "prompt_id": "7"}, {"messages": CHAT}),  # ultrachat_200k
        ({"prompt": QUESTION, "response": ANSWER}, {"prompt": QUESTION, "completion": ANSWER}),
        ({"prompt": CHAT[:1], "response": CHAT[1:]}, PAIR),
        ({"prompt": SHAREGPT[:1], "completion": SHAREGPT[1:]}, PAIR),
        ({"instruction": QUESTION, "output": ANSWER}, PAIR),
        ({"instruction": QUESTION, "input": "", "output": ANSWER, "file": "a.txt"}, PAIR),
        (
            {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]},
            {"messages": CHAT},
        ),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_as_published(tmp_path, row, read, streaming):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    found = as_trl_reads(load_data(str(tmp_path / "rows.jsonl"), streaming=streaming)["train"])
    assert list(found) == [read, read]


def test_instructions_with_an_input_and_without_a_template():
    rows = Dataset.from_list([{"instruction": "Add.", "input": "1 2", "output": "3"}])
    assert as_trl_reads(rows)[0]["prompt"] == [{"role": "user", "content": "Add.\n\n1 2"}]
    plain = as_trl_reads(rows, chat=False)[0]
    assert plain == {"prompt": ALPACA.format("Add.\n\n1 2"), "completion": "3"}


def test_a_text_field_that_is_named_comes_first():
    rows = Dataset.from_list([{"messages": CHAT, "story": LONG, "text": QUESTION}])
    assert as_trl_reads(rows, "story").column_names == ["story"]
    assert as_trl_reads(rows).column_names == read_columns(rows.column_names, "text") == ["messages"]  # as TRL


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": QUESTION, "rejected": ANSWER}, "TRL's DPOTrainer"),
        ({"body": LONG, "title": "a"}, "the columns are 'body', 'title', and what is read is 'text' (dataset_text_"),
        ({"prompt": QUESTION}, "the columns are 'prompt'"),
        ({"messages": LONG}, "Row 0 has no messages in 'messages' but 'The quick"),
        ({"messages": []}, "'messages' of the dataset has no message with content in 1 of 2 rows, such as row 1"),
        ({"conversations": []}, "'messages' of the dataset has no message with content in 1 of 2 rows, such as row 1"),
        (
            {"prompt": CHAT[:1], "completion": []},
            "'completion' of the dataset has no message with content in 1 of 2 rows",
        ),
        ({"prompt": QUESTION, "response": None}, "'completion' of the dataset has no text in 1 of 2 rows"),
        (
            {"messages": [{"rolle": "user", "content": QUESTION}]},
            "not a list of messages in each row, with 'role' and",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            "has no message with content in 1 of 2 rows, such as row 1",
        ),
        ({"conversations": [{"from": "gpt", "value": None}]}, "no message with content in 1 of 2 rows, such as row 1"),
        ({"prompt": CHAT[:1], "completion": [{"role": "assistant", "content": None}]}, "no message with content in 1"),
        ({"instruction": QUESTION, "output": None}, "Row 1 has no text in 'output' but 'None'"),
        ({"instruction": None, "input": LONG, "output": ANSWER}, "Row 1 has no text in 'instruction' but 'None'"),
        ({"instruction": QUESTION, "output": [ANSWER]}, "Row 0 has no text in 'output' but"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]}, "other parts than text"),
        ({"input_ids": "5 6 7"}, "'input_ids' of the dataset holds Value('string'), not lists of token ids"),
        ({"input_ids": [5.0]}, "not lists of token ids"),
        ({LONG: 1}, f"the columns are '{LONG[:40]}...', and"),
    ],
)
def test_what_can_not_be_read_is_said(folder, capsys, row, message):
    full = {"messages": CHAT, "conversations": SHAREGPT, "completion": CHAT[1:], "response": ANSWER}
    full |= {"output": ANSWER, "instruction": QUESTION}
    first = "null" in json.dumps(row) or not all(row.values())
    rows = [{name: full.get(name, value) for name, value in row.items()} if first else row, row]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train("rows.jsonl") == 1
    printed = capsys.readouterr().err
    assert message in printed and printed.count("hf-longlora: error:") == 1
    assert main(["evaluate", "base", "--documents", "rows.jsonl", "--lengths", "64", "--device", "cpu"]) == 1
    assert f"rows.jsonl: {message}" in capsys.readouterr().err or message in printed


def as_stream(rows):
    return check_rows(Dataset.from_list(rows).to_iterable_dataset(), ["messages"])


def as_dataset(rows):
    dataset = Dataset.from_list(rows)
    check_columns(dataset, "text")
    return dataset


def as_json(rows):
    feature = getattr(datasets, "Json", None) or pytest.skip("this datasets has no Json")
    dataset = Dataset.from_list(rows, features=Features({"messages": List(feature())}))
    check_columns(dataset, "text")
    return dataset


@pytest.mark.parametrize("held", [as_stream, as_dataset, as_json])
def test_messages_say_something(held):
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    for turn in SHAREGPT[0], SHAREGPT[0] | {"weight": 1.0}, CHAT[0] | {"content": ""}, called:
        assert list(held([{"messages": [turn]}])) == [{"messages": [turn]}]
    for nothing in None, [], [SHAREGPT[0], {"from": "gpt", "value": None}], [SHAREGPT[0], None]:
        with pytest.raises(ValueError, match=r"\b1\b.*Leave"):
            list(held([{"messages": SHAREGPT}, {"messages": nothing}]))


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_the_trainer_refuses_what_trl_would_stumble_over(tiny_llama, tiny_tokenizer, tmp_path, column):
    args = LongLoraSFTConfig(
        output_dir=str(tmp_path), stages=[{"max_length": 128, "max_steps": 1}], use_cpu=True, bf16=False
    )

    def make(rows):
        data = Dataset.from_list(rows)
        return LongLoraSFTTrainer(tiny_llama(), args, train_dataset=data, processing_class=tiny_tokenizer)

    with pytest.raises(ValueError, match="no message with content in 1 of 2 rows, such as row 1"):
        make([{column: CHAT}, {column: []}])
    with pytest.raises(ValueError, match="not a list of messages in each row"):
        make([{column: QUESTION}])
    with pytest.raises(ValueError, match="has a 'prompt' and no 'completion'"):
        make([{column: CHAT, "prompt": QUESTION}])


@pytest.mark.parametrize("template", [True, False])
def test_long_alpaca_is_trained_on_its_answers(folder, tiny_tokenizer, monkeypatch, template):
    """LongLoRA's own format: a JSON array whose instructions hold the long document."""
    rows = [{"instruction": f"{LONG} {QUESTION}", "output": ANSWER, "file": "a.pdf"}] * 2
    (folder / "LongAlpaca-12k.json").write_text(json.dumps(rows))
    if not template:
        tiny_tokenizer.chat_template = None
        (folder / "base" / "chat_template.jinja").unlink()
        tiny_tokenizer.save_pretrained("base")
    seen = []
    compute_loss = SFTTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append({name: inputs[name][0] for name in ("input_ids", "labels")})
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", watched)
    assert train("LongAlpaca-12k.json", "--stages", '[{"max_length": 4096, "max_steps": 1}]') == 0
    text = tiny_tokenizer.decode(seen[0]["input_ids"])
    learned = tiny_tokenizer.decode(seen[0]["labels"][seen[0]["labels"] != -100])
    assert learned == f"{ANSWER}</s>" and text.count(LONG.strip()) == 1
    assert ("### Response:" in text) == (not template) and ("user: " in text) == template


def test_messages_without_a_template_are_refused_before_weights_are_loaded(folder, tiny_tokenizer, capsys):
    (folder / "rows.jsonl").write_text(json.dumps({"conversations": SHAREGPT}))
    (folder / "base" / "chat_template.jinja").unlink()
    assert train("rows.jsonl") == 1
    assert "no chat template to write them in" in capsys.readouterr().err


def test_a_sharegpt_file_is_trained_and_evaluated(folder, tiny_tokenizer, capsys):
    long = [{"from": "human", "value": LONG}, {"from": "gpt", "value": ANSWER}]
    (folder / "share.jsonl.gz").write_bytes(gzip.compress(json.dumps({"conversations": long, "id": 1}).encode()))
    assert train("share.jsonl.gz") == 0
    arguments = ["--lengths", "64", "--device", "cpu", "--output-dir", "seen"]
    assert main(["evaluate", "base", "--documents", "share.jsonl.gz", *arguments]) == 0
    texts = texts_of(load_documents(["share.jsonl.gz"]), tiny_tokenizer)
    assert texts == [f"<s>user: {LONG}\nassistant: {ANSWER}</s>"]


def test_documents_are_read_as_the_trainer_reads_them(tmp_path, tiny_tokenizer):
    """And never as one text of brackets and commas."""

    def read(name):
        return texts_of(load_documents([str(tmp_path / name)]), tiny_tokenizer)

    rows = [{"text": 'one,\n"two"', "n": 1}, {"text": "three", "n": 2}]
    lines = "\n".join(map(json.dumps, rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    Dataset.from_list(rows).to_csv(tmp_path / "A.TSV", index=False, sep="\t")
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "lines.ndjson").write_text(lines)
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "[1].jsonl").write_text(lines + "\n" + json.dumps({"text": "", "n": 3}))
    (tmp_path / "a.jsonl").write_text(lines)
    for name in ("a.json", "lines.json", "a.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for file in sorted(tmp_path.iterdir()):
        assert read(file.name) == [row["text"] for row in rows], file
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    (tmp_path / "a.md").write_text(rows[0]["text"])
    assert read("one.json") == read("a.md") == [rows[0]["text"]]
    Dataset.from_list([{"prompt": QUESTION, "response": ANSWER}]).to_csv(tmp_path / "pairs.csv", index=False)
    Dataset.from_list([{"input_ids": tiny_tokenizer("ids")["input_ids"]}]).to_parquet(tmp_path / "ids.parquet")
    assert read("pairs.csv") == [QUESTION + ANSWER] and read("ids.parquet") == ["ids"]
    splits = {name: Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    assert read("both") == ["train", "test"]
    for name in ("a.xls", "a.xml", "a", "a.zst"):
        (tmp_path / name).write_text("one")
        with pytest.raises(ValueError, match="of no known kind"):
            read(name)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_is_what_its_file_says(tmp_path, streaming):
    """Not less by a word that pandas takes for no value, nor more by a mark of its encoding."""
    answers = ["None", "NA", "null", "nan", ""]
    for suffix, sep in (("csv", ","), ("tsv", "\t")):
        lines = (f"{number}{sep}{answer}" for number, answer in enumerate(answers))
        (tmp_path / f"a.{suffix}").write_text("\n".join([f"prompt{sep}completion", *lines]))
        found = load_data(str(tmp_path / f"a.{suffix}"), streaming=streaming)["train"]
        assert [row["completion"] for row in found] == [*answers[:-1], None]
    (tmp_path / "bom.txt").write_text(ANSWER, encoding="utf-8-sig")
    assert list(load_data(str(tmp_path / "bom.txt"), streaming=streaming)["train"]) == [{"text": ANSWER}]


def test_data_from_files_and_folders(tmp_path):
    rows = [{"text": "one\ntwo"}, {"text": "three"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    lines = "\n".join(map(json.dumps, rows)).encode()
    for suffix, compress in (("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)):
        (tmp_path / f"rows.jsonl.{suffix}").write_bytes(compress(lines))
    for name in ("rows.parquet", "rows.json", "rows.jsonl.gz", "rows.jsonl.xz", "rows.jsonl.bz2"):
        assert load_data(str(tmp_path / name))["train"][:] == {"text": ["one\ntwo", "three"]}
    (tmp_path / "books").mkdir()
    for name, text in (("a.txt", "one\n\ntwo\n"), ("b.txt", "three")):
        (tmp_path / "books" / name).write_text(text)
    (tmp_path / "books" / "README.md").write_text("not a book")
    assert sorted(load_data(str(tmp_path / "books"))["train"]["text"]) == ["one\n\ntwo\n", "three"]
    assert load_data(str(tmp_path / "books" / "a.txt"))["train"]["text"] == ["one\n\ntwo\n"]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert load_data(str(tmp_path / "saved"))["train"]["text"] == ["one\ntwo", "three"]
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved, a folder of save_to_disk, can't be read"):
        load_data(str(tmp_path / "saved"))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": "one"}).encode()))
    assert load_data(str(tmp_path / "rows.jsonl.zst"))["train"]["text"] == ["one"]


def test_zstandard_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl.zst").write_bytes(b"not read")
    monkeypatch.setattr("hf_longlora.cli.data.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"rows.jsonl.zst needs .* pip install zstandard"):
        load_data(str(tmp_path / "rows.jsonl.zst"))


def write(path, texts):
    """Texts in a file, or a folder, of the kind that its name says."""
    rows = [{"text": text} for text in texts]
    lines = "\n".join(map(json.dumps, rows)).encode()
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(path, index=False)
    elif path.name == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    elif path.name == "many":
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number}.txt").write_text(text)
    elif path.suffix == ".zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(lines))
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(lines))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.json", "a.parquet", "a.csv", "saved", "many"]
)
def test_each_kind_of_file_is_streamed(tmp_path, name):
    texts = [f"{number}: {QUESTION}" for number in range(5)]
    write(tmp_path / name, texts)
    stream = as_trl_reads(load_data(str(tmp_path / name), streaming=True)["train"])
    assert isinstance(stream, IterableDataset) and sorted(row["text"] for row in stream) == texts


@pytest.mark.parametrize("name", ["a.jsonl.gz", "many"])
def test_a_streamed_run_from_the_command_line(folder, name, capsys):
    """Killed after a step and resumed, it ends with the unbroken run's adapter."""
    write(folder / name, [f"{number}: {LONG}" for number in range(8)])
    options = ["--dataset_streaming", "true", "--shuffle_buffer", "2", "--save_steps", "1"]
    options += ["--stages", '[{"max_length": 128, "max_steps": 2}, {"max_length": 256, "max_steps": 3}]']
    assert train(name, *options) == 0
    unbroken = (folder / "out" / "adapter_model.safetensors").read_bytes()
    for step in (3, 4, 5):
        shutil.rmtree(folder / "out" / f"checkpoint-{step}")
    (folder / "out" / "adapter_model.safetensors").unlink()
    assert train(name, *options, "--resume", "true") == 0
    assert (folder / "out" / "adapter_model.safetensors").read_bytes() == unbroken
    assert "Resuming from out/checkpoint-2." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"text": "one"}\n{"te', "can't be read as data: JSON"), (b"", "holds no data"), (b"Caf\xe9", "is not UTF-8")],
)
def test_a_stream_that_can_not_be_read_is_one_message(folder, capsys, content, message):
    name = "rows.txt" if b"Caf" in content else "rows.jsonl"
    (folder / name).write_bytes(content)
    assert train(name, "--dataset_streaming", "true") == 1
    printed = capsys.readouterr().err
    assert f"{name} {message}" in printed and printed.count("hf-longlora: error:") == 1


BAD = {
    "latin.txt": ("Café".encode("latin-1"), "is not UTF-8 text"),
    "latin.txt.gz": (gzip.compress("Café".encode("latin-1")), "is not UTF-8 text"),
    "latin.jsonl": ('{"text": "Café"}'.encode("latin-1"), "is not UTF-8 text"),
    "cut.jsonl": (b'{"text": "Caf', "can't be read as data: JSON parse error"),
    "no.jsonl.gz": (b'{"text": "one"}', "can't be read as data: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "one"}')[:-9], "can't be read as data: Compressed file ended"),
    "no.jsonl.xz": (b'{"text": "one"}', "can't be read as data: "),
    "lines.csv": (b"text\n1\n1,2,3\n", "can't be read as data: Error tokenizing"),
    "cut.parquet": (b"PAR1", "can't be read as data: "),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("alone", [True, False])
def test_a_file_that_can_not_be_read_is_named(tmp_path, name, alone):
    """Among others of its kind, too."""
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    for other in () if alone else ("a", "z"):
        write(tmp_path / f"{other}.{name.split('.')[1]}", [QUESTION])
    with pytest.raises(ValueError, match=re.escape(f"{name} {message}")):
        load_data(str(tmp_path / name if alone else tmp_path))


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_files_without_rows(tmp_path, content):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(content)
    for data in (tmp_path / "a.json", tmp_path):
        with pytest.raises(ValueError, match=re.escape(f"{data} holds no data")):
            load_data(str(data))
    write(tmp_path / "c.json", [QUESTION])
    if content:  # which has no columns, and nothing at all is none of a dataset's files
        with pytest.raises(ValueError, match=r"a\.json holds no data"):
            load_data(str(tmp_path))
    elif Version(datasets.__version__) < Version("5.1"):  # its builder stops at an empty file, which is then named
        with pytest.raises(ValueError, match=r"a\.json holds no data"):
            load_data(str(tmp_path))
    else:
        assert load_data(str(tmp_path))["train"]["text"] == [QUESTION]


def test_files_whose_columns_differ(tmp_path):
    write(tmp_path / "a.jsonl", [QUESTION])
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(ValueError, match=r"the same columns: .*a\.jsonl has text, and .*b\.jsonl has messages"):
        load_data(str(tmp_path))


def test_what_is_no_data_in_a_folder_is_left_out_and_named(tmp_path, capsys):
    """Whatever its name: a license without a suffix would be read as JSON, and other markup as a book."""
    folder = tmp_path / "books [2024]"
    folder.mkdir()
    write(folder / "train.txt", [])
    (folder / "train.txt").write_text(QUESTION)
    (folder / "test.md").write_text(ANSWER)
    data = load_data(str(folder))
    assert data["train"]["text"] == [QUESTION] and data["test"]["text"] == [ANSWER]
    assert capsys.readouterr().err.count("Not read") == 0
    for name in ("train.rst", "train-license", "train.pdf", "a.jsonl"):
        (folder / name).write_bytes(b"\xff")
    assert load_data(str(folder))["train"]["text"] == [QUESTION]
    assert ": a.jsonl, train-license, train.pdf and 1 more." in capsys.readouterr().err


def test_what_is_read_of_an_example_is_said(folder, capsys):
    rows = [{"conversations": SHAREGPT, "system": "Be kind.", "tools": "[]", "id": 1}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train("rows.jsonl")
    assert "conversations, tools; not read: system, id\n" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize("token", [-1, 128])
def test_token_ids_that_the_model_does_not_have(folder, capsys, streaming, token):
    """torch says "index out of range in self" of them, and CUDA that a kernel has failed."""
    rows = [{"input_ids": list(range(127)) * 2}, {"input_ids": [5] * 100 + [token]}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert train("rows.jsonl", "--dataset_streaming", streaming) == 1
    assert (
        f"token ids from {min(token, 0)} to {max(token, 126)}, and the model's are 0 to 127" in capsys.readouterr().err
    )


@pytest.mark.parametrize("ids", [[], [0]])
def test_the_least_token_ids_that_a_model_may_have(ids):
    check_tokens(Dataset.from_dict({"input_ids": [ids]}, features=Features({"input_ids": List(Value("int64"))})), 1)


def test_a_stream_says_where_it_can_not_be_read_on(folder, capsys):
    lines = [json.dumps({"text": LONG})] * 3
    (folder / "rows.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "Caf\xe9"}')
    assert train("rows.jsonl", "--dataset_streaming", "true") == 1
    printed = capsys.readouterr().err
    assert "The stream can't be read on after 3 examples: 'utf-8' codec can't decode" in printed
    (folder / "rows.jsonl").write_text("\n".join([*lines, json.dumps({"text": None})]))
    assert train("rows.jsonl", "--dataset_streaming", "true") == 1
    assert "after 3 examples: The column 'text' of the stream has nothing in row 3" in capsys.readouterr().err


def test_a_line_of_json_may_hold_other_line_ends(tmp_path, tiny_tokenizer):
    """Unicode's own (U+2028, U+0085) are no ends of lines in JSON Lines, and stand in texts from the web."""
    texts = ["one\u2028two\x85three", "four"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert texts_of(load_documents([str(tmp_path / "a.jsonl")]), tiny_tokenizer) == texts


@pytest.mark.parametrize("absolute", [False, True])
def test_a_missing_file_of_data_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, absolute):
    monkeypatch.setattr("datasets.load_dataset", None)
    name = str(tmp_path / "nothing") if absolute else "nothing.jsonl"
    with pytest.raises(FileNotFoundError, match=r"nothing.* does not exist"):
        load_data(name)
