"""What of the data a stage sees, and that it says so."""

import json
import re

import pytest
from datasets import Dataset

from hf_longlora import ContextStage
from hf_longlora.trainer import data
from hf_longlora.trainer.data import StageData, lengths

STAGES = [ContextStage(128, 3), ContextStage(256, 3)]
ROWS = [50, 100, 128, 129, 300, 600, 40, 30]  # 1,377 tokens


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(data.logger, "info", lines.append)
    monkeypatch.setattr(data.logger, "warning", lines.append)
    return lines


def rows(sizes):
    return Dataset.from_dict({"input_ids": [[3 + (i + j) % 100 for j in range(size)] for i, size in enumerate(sizes)]})


@pytest.mark.parametrize(
    ("packing", "kept", "used"),
    [
        (None, "8 of 8 examples (3 cut)", [732, 1116 - 84]),
        ("bfd", "8 of 8 examples (3 cut)", [732, 1116 - 84]),
        ("bfd_split", "8 of 8 examples", [1377, 1377]),
        ("wrapped", "8 of 8 examples", [1377, 1377]),
    ],
)
def test_a_line_a_stage(make, said, packing, kept, used, tmp_path):
    used = [sum(min(size, length) for size in ROWS) if packing in (None, "bfd") else 1377 for length in (128, 256)]
    options = {"packing": False} if packing is None else {"packing_strategy": packing}
    trainer = make(dataset=rows(ROWS), stages=STAGES, report=True, **options)
    kept = [kept, kept.replace("3 cut", "2 cut")]  # at 256 tokens
    for number, line in enumerate(said, start=1):
        served = 6 / trainer._stage_examples[number - 1]
        share = f"{used[number - 1] / 1377:.0%}"
        assert line == (
            f"Stage {number}: {kept[number - 1]}, {used[number - 1]:,} of 1,377 tokens ({share}), {served:.3g} passes"
        )
    assert len(said) == 2
    trainer.train()
    trainer.save_model()
    card, page = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    for number, line in enumerate(said, start=1):
        words = line.partition(": ")[2]
        assert facts[f"data of stage {number}"] == words
        assert f"- data of stage {number}: {words}\n" in card
        assert f"<td>data of stage {number}</td><td>{words}</td>" in page


def test_examples_whose_answers_lie_past_a_stage_s_length_are_counted(make, said):
    """They were dropped, and the card had all of them."""
    pairs = {"prompt": ["q" * (200 if i < 36 else 20) for i in range(40)], "completion": ["a" * 30] * 40}
    stages = [ContextStage(64, 3, rope_type=None), ContextStage(256, 3)]
    trainer = make(dataset=Dataset.from_dict(pairs), packing=False, stages=stages)
    first, second = trainer._stage_data.values()
    assert (first.given, first.dropped, first.cut, first.masked) == (40, 36, 0, True)
    assert (second.given, second.dropped, second.cut) == (40, 0, 0)
    assert first.used * 10 == first.tokens == second.used == second.tokens
    assert re.fullmatch(
        r"Stage 1 uses less than half of the data: 4 of 40 examples \(36 dropped\), [\d,]+ of [\d,]+ tokens to learn "
        r"from \(10%\), 1.5 passes\. A longer stage sees more; packing=True .*",
        said[0],
    )
    assert said[1].startswith("Stage 2: 40 of 40 examples, ")


def test_of_conversations_the_answers_are_counted(make, said):
    chat = [{"role": "user", "content": "q" * 20}, {"role": "assistant", "content": "a" * 30}]
    options = {"dataset": Dataset.from_dict({"messages": [chat] * 4}), "packing": False, "assistant_only_loss": True}
    (found,) = make(stages=[ContextStage(128, 1)], **options)._stage_data.values()
    assert found.masked and found.used == found.tokens == 4 * 31  # with the end of the answer
    assert "124 of 124 tokens to learn from" in said[0]


def test_of_token_ids_with_a_mask_the_answers_are_counted(make, said):
    """TRL makes labels of `assistant_masks` whatever the arguments say."""
    tokens = Dataset.from_dict({"input_ids": [[5] * 100] * 4, "assistant_masks": [[0] * 60 + [1] * 40] * 4})
    (found,) = make(dataset=tokens, packing=False, stages=[ContextStage(128, 1)])._stage_data.values()
    assert found.masked and found.used == found.tokens == 4 * 40
    assert "160 of 160 tokens to learn from" in said[0]


def test_answers_that_packing_cuts_off_are_no_tokens_to_learn_from(make, said):
    """TRL packs them all the same."""
    pairs = {"prompt": ["q" * 200] * 39 + ["q"], "completion": ["a" * 30] * 40}
    options = dict(packing_strategy="bfd", stages=[ContextStage(128, 1)])
    make(dataset=Dataset.from_dict(pairs), **options)
    assert "40 of 40 examples (39 cut), " in said[0] and "tokens to learn from (2%)" in said[0]
    for packing in (True, False):  # which leaves rows, or none
        with pytest.raises(ValueError, match=r"Stage 1.*would see nothing to learn from"):
            make(dataset=Dataset.from_dict(pairs).select(range(39)), packing=packing, **options)


@pytest.mark.parametrize("options", [{"packing": False}, {"packing_strategy": "bfd"}], ids=str)
def test_a_stage_that_uses_less_than_half_says_so(make, said, options):
    make(dataset=rows([1000] * 8), stages=[ContextStage(128, 1), ContextStage(512, 1)], **options)
    assert said[0].startswith(
        "Stage 1 uses less than half of the data: 8 of 8 examples (8 cut), 1,024 of 8,000 tokens"
    )
    assert 'packing_strategy="bfd_split" or "wrapped"' in said[0]
    assert said[1].startswith("Stage 2: 8 of 8 examples (8 cut), 4,096 of 8,000 tokens (51%), ")


def test_lengths_are_those_of_a_part_too():
    dataset = rows(ROWS).shuffle(seed=1).select(range(5))
    assert list(lengths(dataset)) == [len(ids) for ids in dataset["input_ids"]]
    assert list(lengths(dataset.select([]))) == []


def test_what_there_is_none_of_is_left_out():
    assert str(StageData(3, 0, 0, 30, 30, False, 2.0)) == "3 of 3 examples, 30 of 30 tokens (100%), 2 passes"
