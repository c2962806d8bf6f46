"""A model on shards of its sequences is the model on whole ones: losses and the gradient of every weight, in fp64."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from hf_longlora import LongLoraConfig, S2AttentionConfig, set_s2_attention
from hf_longlora.attention import set_attention_mode
from hf_longlora.parallel import shard_sequences

from .processes import Processes

TINY = {
    "vocab_size": 64,
    "hidden_size": 36,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 128,
}


def make(config: Any, adapter: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2attn").double()
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, LongLoraConfig(r=2, init_lora_weights=False)).double()
    set_s2_attention(model, S2AttentionConfig(group_size=8))
    return model.train()


def batch_of(length: int, documents: Any = (), pads: Any = ()) -> dict[str, Any]:
    """Token ids, shifted labels and positions `[B, S]`; rows of packed documents, or with padding left and right."""
    rows = len(documents or pads or [0, 0])
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    labels, positions = ids.clone(), torch.arange(length).repeat(rows, 1)
    labels[:, : length // 3] = -100  # all labels of the first of three processes or more
    batch = {"input_ids": ids}
    for row, sizes in enumerate(documents):
        positions[row] = torch.cat([torch.arange(size) for size in sizes])
        labels[row, positions[row] == 0] = -100
    if pads:
        batch["attention_mask"] = torch.ones_like(ids)
        for row, (left, right) in enumerate(pads):
            padding = torch.zeros(length, dtype=torch.bool)
            padding[:left], padding[length - right :] = True, True
            batch["attention_mask"][row, padding], labels[row, padding] = 0, -100
            positions[row] = (torch.arange(length) - left).clamp(min=0)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return batch | {"position_ids": positions, "labels": shifted}


def loss_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The sum of a batch's losses."""
    labels = batch["labels"].flatten()
    # without a cache, which hides from transformers that rows are packed
    logits = model(**{key: x for key, x in batch.items() if key != "labels"}, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")


def losses(model: Any, batches: list[dict[str, Any]], modes: list[str]) -> list[torch.Tensor]:
    """Those of training, whose gradients add up, and then those of evaluation."""
    found = []
    for batch, mode in zip(batches, modes, strict=True):
        set_attention_mode(model, mode)
        loss = loss_of(model, batch)
        loss.backward()
        found.append(loss.detach())
    set_attention_mode(model, "auto")
    model.eval()
    with torch.no_grad():
        return found + [loss_of(model, batch) for batch in batches]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_a_process(
    group: dist.ProcessGroup,
    config: Any,
    batches: list[dict[str, Any]],
    lengths: list[list[int]],
    modes: list[str],
    adapter: bool,
    checkpoint: bool,
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients, summed over the group."""
    model = make(config, adapter)
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shard_sequences(model, group)
    rank = dist.get_rank(group)
    own = [
        {key: x.split(sizes, dim=1)[rank] for key, x in batch.items()}
        for batch, sizes in zip(batches, lengths, strict=True)
    ]
    found = losses(model, own, modes)
    named = gradients(model)
    for x in (*found, *named.values()):
        dist.all_reduce(x, group=group)
    return found, named


def check(
    processes: Processes,
    config: Any,
    batches: list[dict[str, Any]],
    lengths: list[list[int]],
    modes: list[str],
    adapter: bool = False,
    checkpoint: bool = False,
) -> None:
    whole = make(config, adapter)
    expected = losses(whole, batches, modes)
    named = gradients(whole)
    arguments = (config, batches, lengths, modes, adapter, checkpoint)
    for found, own in processes.run(len(lengths[0]), in_a_process, *arguments):
        for a, b in zip(found, expected, strict=True):
            assert abs(a - b) <= 1e-9 * b
        assert own.keys() == named.keys()
        for name, gradient in named.items():
            assert gradient.abs().max() > 0, name
            assert (own[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), name


STEPS = ["auto", "dense", "auto", "dense"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoints"])
def test_sparse_and_dense_steps(processes, size, checkpoint):
    """One document, packed ones and padded ones, of equal shards and of others; labels on some processes alone."""
    batches = [batch_of(48), batch_of(48), batch_of(48, [[9, 30, 1, 8], [48]]), batch_of(47, pads=[(5, 0), (0, 30)])]
    equal = [48 // size] * size
    other = [47 - 5 * (size - 1)] + [5] * (size - 1)
    check(processes, LlamaConfig(**TINY), batches, [equal, equal, equal, other], STEPS, checkpoint=checkpoint)


@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config"])
def test_an_adapter(processes, kind):
    config = {"LlamaConfig": LlamaConfig, "Qwen3Config": Qwen3Config}[kind](**TINY)
    batches = [batch_of(40), batch_of(40, [[11, 29]])]
    check(processes, config, batches, [[10] * 4] * 2, ["auto", "dense"], adapter=True)


def refusals(group: dist.ProcessGroup) -> list[str]:
    found = []
    for config, change in (
        (MistralConfig(**TINY, sliding_window=16), None),
        (Qwen3Config(**TINY, use_sliding_window=True, sliding_window=16, max_window_layers=1), None),
        (LlamaConfig(**TINY), "windows"),
        (LlamaConfig(**TINY), "positions"),
        (LlamaConfig(**TINY), "rows"),
    ):
        model = make(config)
        batch = {key: x for key, x in batch_of(16).items() if key != "labels"}
        try:
            shard_sequences(model, group)
            if change == "windows":
                set_attention_mode(model, "windows")
            if change == "positions" and dist.get_rank(group) == 1:
                del batch["position_ids"]
            if change == "rows" and dist.get_rank(group) == 1:
                batch = {key: x[:1] for key, x in batch.items()}
            model(**batch)
        except ValueError as error:
            found.append(str(error))
        else:
            found.append("nothing")
    return found


def test_what_cannot_be_sharded_is_refused(processes):
    for messages in processes.run(2, refusals):
        assert "a window of 16 tokens" in messages[0] and "sliding_attention" in messages[1]
        assert "positions that skip" in messages[2]
        assert messages[3] == "nothing"  # transformers counts them, from the shard's beginning
        assert "Processes of a group hold the same rows" in messages[4]


def whole_again(group: dist.ProcessGroup) -> bool:
    """Whether a model that has been told of whole rows again is as before."""
    model, rank = make(LlamaConfig(**TINY)), dist.get_rank(group)
    batch = {key: x for key, x in batch_of(24).items() if key != "labels"} | {"use_cache": False}
    batch["position_ids"] += 24 * rank
    with torch.no_grad():
        before = model(**batch).logits
        shard_sequences(model, group)
        set_s2_attention(model, S2AttentionConfig(group_size=8))  # as each step of a trainer does
        assert torch.allclose(model(**batch).logits, before) == (rank == 0)  # the second half of a row, now
        shard_sequences(model, None)
        return torch.equal(model(**batch).logits, before)


def test_whole_rows_again(processes):
    assert processes.run(2, whole_again) == [True, True]
