"""Streams: what is read of them, and that a run that is resumed reads on where it stopped."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset

from hf_longlora import ContextStage
from hf_longlora.trainer import last_checkpoint, streams
from hf_longlora.trainer.data import evaluation_data

from .helpers import TEXT, Stop, texts, weights

FILES = 3


@pytest.fixture
def stream(tmp_path):
    """The documents of `texts`, in files."""

    def make(documents=12, repeat=6, name="data"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        data = texts(documents, repeat)
        for number in range(FILES):
            data.shard(FILES, number, contiguous=True).to_json(folder / f"{number}.jsonl")
        return load_dataset("json", data_dir=str(folder), split="train", streaming=True)

    return make


class Batches:
    """The tokens of each batch, as the trainer trains on them."""

    def __init__(self, trainer):
        self.rows, step = [], trainer.training_step

        def training_step(model, inputs, *args, **kwargs):
            assert "stream" in inputs
            self.rows += inputs["input_ids"].tolist()
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step


def same(trainer, other):
    ours, theirs = weights(trainer), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (1, {"packing_strategy": "wrapped", "shuffle_buffer": 3}),
        pytest.param(3, {"packing_strategy": "wrapped", "shuffle_buffer": 3}, marks=pytest.mark.slow),
        (4, {"packing_strategy": "bfd", "shuffle_buffer": 5, "dataloader_num_workers": 1}),
        (2, {"packing": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}),
        (5, {"packing": False, "shuffle_buffer": 4, "max_examples": 5}),
        (4, {"sparse": "windows", "dense_every": 2, "shuffle_buffer": 3}),
        pytest.param(4, {"sparse": "pose", "dense_every": 2, "shuffle_buffer": 3}, marks=pytest.mark.slow),
    ],
    ids=["block", "stage", "worker", "unpacked", "passes", "windows", "pose"],
)
def test_resumed_as_the_unbroken_run(make, stream, options, stop, monkeypatch):
    """Within a block, at a stage's end (3) and after it, in a later pass: bit by bit, the account of the data too."""
    monkeypatch.setattr(streams, "FILLED", 1)  # a stage is of several blocks
    whole_run = make(dataset=stream(), output="whole", **options)
    whole_run.train()
    make(dataset=stream(), callbacks=[Stop(stop)], save_strategy="no", **options).train()
    resumed = make(dataset=stream(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole_run.state.global_step == 6
    assert same(resumed, whole_run) and resumed.stage_data == whole_run.stage_data
    losses = [
        [(log["epoch"], log["loss"]) for log in run.state.log_history if "loss" in log] for run in (whole_run, resumed)
    ]
    assert losses[0] == losses[1]


def test_a_resumed_run_reads_one_block_again(make, stream, tmp_path):
    read = []

    def seen(row):
        read.append(int(row["text"].partition(":")[0]))
        return row

    def run(**options):
        data = stream(documents=40).map(seen)
        return make(dataset=data, packing=False, shuffle_buffer=4, stages=[ContextStage(256, 12)], **options)

    run(callbacks=[Stop(9)]).train()
    assert json.loads(Path(last_checkpoint(str(tmp_path / "out")), "stream.json").read_text())["mark"]["read"] == 16
    resumed = run()
    read.clear()
    resumed.train(resume_from_checkpoint=True)
    assert read == list(range(16, 24))  # of 24 rows: the block of the 18th, and the one after it


def test_stages_read_on_and_no_more_than_they_need(make, stream):
    """No document is seen twice before all have been, and a stage's last block is as short as it may be."""
    trainer = make(dataset=stream(documents=40), packing=False, shuffle_buffer=5)
    batches = Batches(trainer)
    trainer.train()
    starts = [trainer.processing_class.decode(row[:3]) for row in batches.rows]
    assert len(starts) == 12 and len(set(starts)) == 12
    given = [int(line.split(" of ")[1].split()[0]) for line in trainer.stage_data.values()]
    assert given == [6, 6]
    first = [trainer.processing_class.decode(row) for row in batches.rows[:6]]
    assert {int(text.split(":")[0].replace(" ", "")) for text in first} == set(range(6))


def test_blocks_are_shuffled_and_a_short_stream_is_read_again(make, stream):
    order = {}
    for strategy in ("random", "sequential"):
        trainer = make(
            dataset=stream(documents=7),
            packing=False,
            per_device_train_batch_size=1,
            stages=[ContextStage(256, 14)],
            train_sampling_strategy=strategy,
            output=strategy,
        )
        batches = Batches(trainer)
        trainer.train()
        texts_of = [trainer.processing_class.decode(row) for row in batches.rows]
        order[strategy] = [int(text.split(":")[0].replace(" ", "")) for text in texts_of]
    assert order["sequential"] == [*range(7), *range(7)]
    assert sorted(order["random"][:7]) == sorted(order["random"][7:]) == list(range(7))
    assert order["random"][:7] != order["random"][7:] != list(range(7))


@pytest.mark.parametrize("packing", [None, "bfd", "bfd_split", "wrapped"])
def test_what_is_trained_on_is_that_of_a_dataset(make, stream, packing):
    """One block of all, in order: the rows of TRL's own cutting and packing, in the first pass."""
    options = {"packing": packing is not None, "train_sampling_strategy": "sequential"}
    if packing is not None:
        options["packing_strategy"] = packing
    data, stages = stream(), [ContextStage(256, 12)]
    rows = []
    for number, dataset in enumerate((data, Dataset.from_list(list(data)))):
        trainer = make(dataset=dataset, stages=stages, output=str(number), **options)
        rows.append([row for batch in trainer.get_train_dataloader() for row in batch["input_ids"].tolist()])
    once = trainer._stage_examples[0]
    if packing in ("bfd", "bfd_split"):  # a batch is a row
        once //= 2
    assert 6 <= once <= len(rows[1]) and rows[0][:once] == rows[1][:once]


@pytest.mark.parametrize("packing", ["bfd", "bfd_split", "wrapped"])
def test_short_texts_fill_rows_whatever_the_buffer(make, packing):
    """Blocks of 2 texts, of some 20 tokens each, would make rows of 40."""
    data = Dataset.from_dict({"text": [f"{number}: {TEXT[:20]}" for number in range(400)]}).to_iterable_dataset()
    options = {"packing_strategy": packing, "shuffle_buffer": 2, "sparse": "s2", "per_device_train_batch_size": 1}
    if packing == "wrapped":
        stages = [ContextStage(128, 16)]
    else:  # which keep each text apart, and see no distance that is new
        stages = [ContextStage(128, 16, rope_type=None)]
    rows = [
        batch["input_ids"].numel() for batch in make(dataset=data, stages=stages, **options).get_train_dataloader()
    ]
    assert len(rows) == 16 and sum(size > 128 - 40 for size in rows) >= 16 * 8 // 9


def test_the_account_is_of_what_was_read(make, stream, tmp_path):
    options = dict(packing=False, stages=[ContextStage(256, 3)], max_examples=20, report=True)
    trainer = make(dataset=stream(documents=40), **options)
    assert trainer.stage_data["data of stage 1"].startswith("16 of 16 examples (16 cut), 4,096 of ")
    trainer.train()
    trainer.save_model()
    line = trainer.stage_data["data of stage 1"]
    assert line.startswith("6 of 6 examples (6 cut), 1,536 of ") and line.endswith(", as streamed")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- data of stage 1: {line}\n" in card and "- data: the first 20 examples of a stream\n" in card
    assert line in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("own", [True, False], ids=["of some", "TRL's, of all"])
def test_a_stream_with_a_buffer_of_its_own_is_replayed(make, stream, caplog, own):
    """`datasets` keeps no buffer: where the state brings other examples, the stream is read from its start."""

    def data():
        return stream(documents=30).shuffle(seed=1, buffer_size=7) if own else stream(documents=30)

    options = dict(packing=False, shuffle_buffer=4, shuffle_dataset=not own)
    whole_run = make(dataset=data(), output="whole", **options)
    whole_run.train()
    make(dataset=data(), callbacks=[Stop(4)], **options).train()
    resumed = make(dataset=data(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed, whole_run)


def test_a_stream_of_other_examples_is_not_resumed(make, stream, tmp_path):
    options = dict(packing=False, shuffle_buffer=4, per_device_train_batch_size=4)
    make(dataset=stream(documents=60), callbacks=[Stop(5)], **options).train()
    with pytest.raises(ValueError, match="the training data are others"):
        make(dataset=stream(documents=60, repeat=7), **options).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="streamed was"):
        make(dataset=stream(documents=60), **options | {"shuffle_buffer": 5}).train(resume_from_checkpoint=True)
    file = tmp_path / "data" / "0.jsonl"  # its first examples, which are looked at first, are the same
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:17], lines[18], lines[17], *lines[19:]]) + "\n")
    changed = make(
        dataset=load_dataset("json", data_dir=str(tmp_path / "data"), split="train", streaming=True), **options
    )
    with pytest.raises(ValueError, match="other examples than it gave"):
        changed.train(resume_from_checkpoint=True)
    (Path(last_checkpoint(str(tmp_path / "out"))) / "stream.json").unlink()
    with pytest.raises(ValueError, match=r"lacks the place in the stream \(stream.json\)"):
        make(dataset=stream(documents=60), **options).train(resume_from_checkpoint=True)


def test_limits(make, stream):
    data = texts(documents=10)
    assert make(dataset=data, packing=False, max_examples=4)._stage_examples == [4, 4]
    assert len(make(eval_dataset=data, max_eval_examples=3, packing=False).eval_dataset) == 3
    both = make(eval_dataset={"a": stream(), "b": data}, max_eval_examples=2, packing=False).eval_dataset
    assert {name: len(part) for name, part in both.items()} == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="`max_eval_examples`"):
        evaluation_data(stream(), None)
    with pytest.raises(ValueError, match="`shuffle_buffer` must be a whole number"):
        make(shuffle_buffer=0)


def test_an_evaluation_of_a_stream_is_of_the_same_text_each_time(make, stream):
    trainer = make(dataset=stream(), eval_dataset=stream(), max_eval_examples=5, eval_strategy="steps", eval_steps=3)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == losses[-1] != losses[0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "is empty"),
        ([{"text": TEXT * 9}, {"text": None}], {}, "'text' of the stream has nothing in row 1"),
        ([{"body": TEXT}], {}, r"no text: its columns are \['body'\]"),
        ([{"text": TEXT}], {"packing": False}, "the longest sequence it would see"),
        ([{"text": TEXT * 9}], {"dataloader_num_workers": 2}, "read in order"),
        ([{"text": TEXT * 9}], {"sequence_parallel": 2}, "doesn't take streams"),
    ],
)
def test_what_is_refused(make, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make(dataset=IterableDataset.from_generator(lambda: iter(rows)), **options)


def test_rows_of_which_a_function_makes_texts(make):
    rows = [{"body": TEXT * 9}] * 9
    for dataset in Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows)):
        trainer = make(dataset=dataset, formatting_func=lambda row: row["body"])
        assert {data.given for data in trainer._stage_data.values()} == {9}


def test_a_file_that_breaks_off_is_named_with_its_place(make, stream, tmp_path):
    data = stream(documents=60)
    (tmp_path / "data" / "2.jsonl").write_text('{"text": "whole"}\n{"te')
    trainer = make(dataset=data, packing=False, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=r"can't be read on after 4\d examples"):
        trainer.train()
