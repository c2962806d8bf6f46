"""The loss of every step of conversations, against a plain computation in fp64 from the texts."""

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTTrainer

SINKS, LEFT_OUT = 2, -100
WORDS = ["a", "bright", "day", "and", "the", "clocks", "were", "striking", "thirteen"]


def chats(count=24):
    """Of one to three turns, each of another length."""
    draw = torch.Generator().manual_seed(0)

    def text(most):
        numbers = torch.randint(len(WORDS), (int(torch.randint(1, most, (1,), generator=draw)),), generator=draw)
        return " ".join(WORDS[i] for i in numbers)

    return [
        [
            {"role": role, "content": text(most)}
            for _ in range(1 + chat % 3)
            for role, most in (("user", 6), ("assistant", 12))
        ]
        for chat in range(count)
    ]


def written(chat, tokenizer):
    """The ids of a conversation, and its labels: those of what the assistant says, and of where it ends."""
    text, answers = "<s>", []
    for message in chat:
        text += f"{message['role']}: {message['content']}"
        if message["role"] == "assistant":
            text += "</s>"
            answers.append((len(text) - len(message["content"]) - len("</s>"), len(text)))
        else:
            text += "\n"
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(start < to and end > at for at, to in answers) for start, end in tokens["offset_mapping"]]
    return tokens["input_ids"], [
        i if known else LEFT_OUT for i, known in zip(tokens["input_ids"], learned, strict=True)
    ]


def mask_of(positions, group, dense):
    """What each token sees, `[heads, S, S]`: as the README has it, the last two of 4 heads shifted."""
    document = (positions == 0).cumsum(0)
    own = (document[:, None] == document) & torch.ones(len(positions), len(positions)).tril().bool()
    short = document.bincount()[document] <= group
    whole = short[:, None] | (positions < SINKS) | dense
    at = torch.stack([positions + (group // 2 if head >= 2 else 0) for head in range(4)]) // group
    return own & (whole | (at[:, :, None] == at[:, None, :]))


class Checked(LongLoraSFTTrainer):
    """Computes each row's loss once more, and looks up its labels in the conversations."""

    def training_step(self, model, inputs, *args, **kwargs):
        step = self.schedule.step(self.state.global_step)
        stage = self.schedule.stages[step.stage]
        merged = copy.deepcopy(self.model).double().merge_and_unload()
        config = copy.deepcopy(merged.config)
        config._attn_implementation = "eager"
        reference = LlamaForCausalLM(config).double().eval()
        reference.load_state_dict(merged.state_dict())
        for row, ids in enumerate(inputs["input_ids"]):
            real = inputs["attention_mask"][row] == 1 if "attention_mask" in inputs else torch.ones_like(ids) == 1
            ids, labels = ids[real], inputs["labels"][row][real]
            positions = inputs["position_ids"][row] if "position_ids" in inputs else torch.arange(len(ids))
            starts = torch.nonzero(positions == 0).flatten().tolist()
            for start, end in itertools.pairwise([*starts, len(ids)]):
                assert self.known(ids[start:end].tolist(), labels[start + 1 : end].tolist())
            sees = mask_of(positions, stage.group_size, step.mode == "dense")
            bias = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)[None]
            with torch.no_grad():
                logits = reference(input_ids=ids[None], position_ids=positions[None], attention_mask=bias).logits[0]
            loss = cross_entropy(logits[:-1], labels[1:], ignore_index=LEFT_OUT, reduction="sum")
            self.seen.append((self.state.global_step, loss, (labels[1:] != LEFT_OUT).sum(), step.mode, len(ids)))
        return super().training_step(model, inputs, *args, **kwargs)

    def known(self, ids, labels):
        """Whether some conversation, or all of them in a row, have these tokens, with these labels after the first."""
        return any(
            all_ids[at : at + len(ids)] == ids and all_labels[at + 1 : at + len(ids)] == labels
            for all_ids, all_labels in self.texts
            for at in range(len(all_ids) - len(ids) + 1)
        )


@pytest.mark.parametrize("goes_on", [False, True], ids=["a new adapter", "a loaded one"])
@pytest.mark.parametrize("packing", [None, "bfd", "wrapped"])
def test_the_loss_is_that_of_the_answers(make, tiny_llama, tiny_tokenizer, tmp_path, packing, goes_on):
    options = dict(
        dataset=Dataset.from_dict({"messages": chats()}),
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        assistant_only_loss=True,
        gradient_accumulation_steps=2,
        sink_tokens=SINKS,
        dense_every=2,
        learning_rate=1e-2,
    )
    model = tiny_llama()
    if goes_on:
        before = copy.deepcopy(model)
        first = make(model=model, stages=[ContextStage(96, 2, group_size=12)], output="first", **options)
        first.train()
        first.save_model()
        model = PeftModel.from_pretrained(before, tmp_path / "first", is_trainable=True)
    stages = [ContextStage(96, 2, group_size=12), ContextStage(200, 2, group_size=24)]
    peft_config = None if goes_on else LongLoraConfig(r=4)
    trainer = make(model=model, stages=stages, peft_config=peft_config, **options)
    texts = [written(chat, tiny_tokenizer) for chat in chats()]
    if packing == "wrapped":
        texts = [tuple(list(itertools.chain(*parts)) for parts in zip(*texts, strict=True))]
    trainer.__class__, trainer.seen, trainer.texts = Checked, [], texts
    trainer.train()
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 4 and [mode for *_, mode, _ in trainer.seen] != ["dense"] * len(trainer.seen)
    for step, loss in enumerate(logged):
        losses, counts = zip(*((loss, count) for at, loss, count, *_ in trainer.seen if at == step), strict=True)
        assert sum(losses) / sum(counts) == pytest.approx(loss, rel=1e-5)
    assert max(length for *_, length in trainer.seen) > 100
