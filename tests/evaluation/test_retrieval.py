import copy
import re
from functools import partial

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from hf_longlora import long_perplexity, loss_by_position, passkey_accuracy, perplexity_by_length
from hf_longlora.evaluation import multi_needle_accuracy, multi_needle_example, passkey_example
from hf_longlora.evaluation.retrieval import NAMED_NEEDLE, NAMED_QUESTION, NEEDLE, TASK


class Reader(nn.Module):
    """Finds the passkey if it lies among the last `reach` tokens, by looking for its announcement."""

    def __init__(self, tokenizer, reach):
        super().__init__()
        self.embedding = nn.Embedding(len(tokenizer), 1)
        self.marker = tokenizer("The pass key is ", add_special_tokens=False)["input_ids"][:-1]
        self.reach = reach
        self.lengths = []

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache=None, **kwargs):
        (ids,) = input_ids.tolist()
        self.lengths.append(len(ids))
        logits = torch.zeros(1, len(ids), self.embedding.num_embeddings)
        n = len(self.marker)
        asked = max(i for i in range(len(ids) - n) if ids[i : i + n] == self.marker) + n  # the question's end
        told = [i for i in range(max(0, asked - self.reach), asked - n) if ids[i : i + n] == self.marker]
        if told:
            for offset in range(len(ids) - asked):
                logits[0, asked - 1 + offset, ids[told[0] + n + offset]] = 1.0
        return CausalLMOutput(logits=logits)


def test_examples_have_the_length_and_the_depth_asked_for(tiny_tokenizer):
    needle = tiny_tokenizer(NEEDLE.format(key="90210"), add_special_tokens=False)["input_ids"]
    starts = []
    for depth in (0.0, 0.3, 1.0):
        prompt, answer = passkey_example(tiny_tokenizer, 700, depth, "90210")
        assert len(prompt) + len(answer) == 700 and prompt[0] == tiny_tokenizer.bos_token_id
        text = tiny_tokenizer.decode(prompt + answer)
        assert text.endswith("What is the pass key? The pass key is 90210") and text.count("90210") == 3
        starts.append(next(i for i in range(700) if prompt[i : i + len(needle)] == needle))
    first, third, last = starts
    assert third == first + round(0.3 * (last - first)) and last > first + 100


def test_the_shortest_text_has_no_filler(tiny_tokenizer):
    with pytest.raises(ValueError, match=r"at least \d+ tokens") as error:
        passkey_example(tiny_tokenizer, 20, 0.5, "90210")
    shortest = int(re.search(r"at least (\d+)", str(error.value))[1])
    for length in (shortest, shortest + 1):
        prompt, answer = passkey_example(tiny_tokenizer, length, 0.5, "90210")
        assert len(prompt) + len(answer) == length
    with pytest.raises(ValueError, match=f"at least {shortest} tokens"):
        passkey_example(tiny_tokenizer, shortest - 1, 0.5, "90210")


def test_a_text_begins_once(tiny_tokenizer):
    """Whatever the tokenizer puts around each text that it is given."""
    example = passkey_example(tiny_tokenizer, 700, 0.5, "90210")
    backend = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a")["input_ids"][0] == 1
    assert passkey_example(tokenizer, 700, 0.5, "90210") == example
    assert example.prompt_ids.count(1) == 1
    without = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert passkey_example(without, 699, 0.5, "90210").prompt_ids == example.prompt_ids[1:]


def test_accuracy_by_length_and_depth(tiny_tokenizer):
    model = Reader(tiny_tokenizer, reach=400).train()
    records = passkey_accuracy(model, tiny_tokenizer, [450, 900], (0.0, 0.5, 1.0), trials=3, progress=False)
    assert [(r["length"], r["depth"], r["accuracy"]) for r in records] == [
        (450, 0.0, 1.0),
        (450, 0.5, 1.0),
        (450, 1.0, 1.0),
        (900, 0.0, 0.0),
        (900, 0.5, 0.0),
        (900, 1.0, 1.0),
    ]
    assert model.lengths == [450] * 9 + [900] * 9
    assert model.training


def test_a_real_model_answers_as_it_generates(tiny_llama, tiny_tokenizer):
    """One forward tells what greedy decoding would give."""
    model = tiny_llama(max_position_embeddings=1024, vocab_size=128).eval()
    prompt, answer = passkey_example(tiny_tokenizer, 450, 0.5, "12345")
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False)[0, len(prompt) :]
    (record,) = passkey_accuracy(model, tiny_tokenizer, 450, (0.5,), trials=1, progress=False)
    assert record["accuracy"] == float(generated.tolist() == answer) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": 20}, "at least .* tokens"),
        ({"depths": (1.5,)}, "depth"),
        ({"trials": 0}, "trials"),
    ],
)
def test_bad_arguments(tiny_llama, tiny_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        passkey_accuracy(tiny_llama(), tiny_tokenizer, **{"lengths": 450, "progress": False} | arguments)


def test_several_needles_stand_at_their_depths(tiny_tokenizer):
    names, keys = ["the baker", "the farmer", "the doctor"], ["11111", "22222", "33333"]
    prompt, answer = multi_needle_example(tiny_tokenizer, 1500, (0.0, 0.5, 1.0), keys, names, asked=1)
    assert len(prompt) + len(answer) == 1500
    text = tiny_tokenizer.decode(prompt + answer)
    assert text.endswith("What is the pass key of the farmer? The pass key of the farmer is 22222")
    at = [text.index(f"The pass key of {name} is {key}") for name, key in zip(names, keys, strict=True)]
    whole = at[2] - at[0]
    assert at == sorted(at) and abs((at[1] - at[0]) / whole - 0.5) < 0.05
    assert text[: at[0]].count("grass") == 0 and text[at[2] :].count("grass") == 0


class NamedReader(Reader):
    """As `Reader`, but it takes the first passkey it sees, or the one of the name that is asked for."""

    def __init__(self, tokenizer, by_name):
        super().__init__(tokenizer, reach=10**6)
        self.tokenizer, self.by_name = tokenizer, by_name

    def forward(self, input_ids, use_cache=None, **kwargs):
        text = self.tokenizer.decode(input_ids[0])
        name = re.findall(r"The pass key of ([a-z ]+) is", text)[-1]
        told = re.search(rf"The pass key of {name if self.by_name else '[a-z ]+'} is (\d+)", text)[1]
        expected = self.tokenizer(f" {told}", add_special_tokens=False)["input_ids"]
        logits = torch.zeros(1, input_ids.shape[1], self.embedding.num_embeddings)
        for offset, token in enumerate(expected):
            logits[0, offset - len(expected) - 1, token] = 1.0
        return CausalLMOutput(logits=logits)


def test_the_needle_that_is_asked_for_is_what_counts(tiny_tokenizer):
    depths = (0.0, 0.5, 1.0)
    for by_name, expected in ((True, [1.0, 1.0, 1.0]), (False, [1.0, 0.0, 0.0])):
        model = NamedReader(tiny_tokenizer, by_name)
        records = multi_needle_accuracy(model, tiny_tokenizer, 900, depths, trials=4, progress=False)
        assert [record["accuracy"] for record in records] == expected
        assert {record["needles"] for record in records} == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depths": (0.5,)}, "2 to 16 different depths"),
        ({"depths": (0.0, 1.5)}, "depth must lie"),
        ({"depths": tuple(i / 16 for i in range(17))}, "2 to 16 different depths"),
        ({"lengths": 100}, "at least .* tokens"),
        ({"trials": 0}, "trials"),
    ],
)
def test_bad_arguments_of_needles(tiny_llama, tiny_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        multi_needle_accuracy(tiny_llama(), tiny_tokenizer, **{"lengths": 900, "progress": False} | arguments)


@pytest.mark.parametrize(
    ("depths", "keys", "message"),
    [((0.5, 0.1), ["11111", "22222"], "must rise"), ((0.1, 0.5), ["11111"], "zip")],
)
def test_bad_arguments_of_an_example(tiny_tokenizer, depths, keys, message):
    with pytest.raises(ValueError, match=message):
        multi_needle_example(tiny_tokenizer, 1500, depths, keys, ["the baker", "the farmer"], asked=0)


@pytest.mark.parametrize("count", [2, 16])
def test_fewest_and_most_needles(tiny_tokenizer, count):
    model, depths = NamedReader(tiny_tokenizer, True), [index / count for index in range(count)]
    records = multi_needle_accuracy(model, tiny_tokenizer, 3000, depths, trials=1, progress=False)
    assert [(record["depth"], record["accuracy"]) for record in records] == [(depth, 1.0) for depth in depths]


def test_needles_stand_where_their_depths_say_to_the_token(tiny_tokenizer):
    names, keys, depths = ["the baker", "the farmer", "the doctor"], ["11111", "22222", "33333"], (0.1, 0.25, 0.9)
    prompt, answer = multi_needle_example(tiny_tokenizer, 1500, depths, keys, names, asked=2)
    needles = [
        tiny_tokenizer(NAMED_NEEDLE.format(name=name, key=key), add_special_tokens=False)["input_ids"]
        for name, key in zip(names, keys, strict=True)
    ]
    starts = [next(i for i in range(1500) if prompt[i : i + len(n)] == n) for n in needles]
    head = 1 + len(tiny_tokenizer(TASK, add_special_tokens=False)["input_ids"])
    question = NAMED_QUESTION.format(name="the doctor") + " 33333"
    room = 1500 - head - sum(map(len, needles)) - len(tiny_tokenizer(question, add_special_tokens=False)["input_ids"])
    before = [start - head - sum(map(len, needles[:index])) for index, start in enumerate(starts)]  # filler alone
    assert before == [round(depth * room) for depth in depths]
    assert len(prompt) + len(answer) == 1500


def test_each_depth_of_needles_is_asked_for_once_a_trial(tiny_tokenizer):
    """What is found is what stands in the text's first half."""

    class FirstHalf(NamedReader):
        def forward(self, input_ids, use_cache=None, **kwargs):
            text = self.tokenizer.decode(input_ids[0])
            name = re.findall(r"The pass key of ([a-z ]+) is", text)[-1]
            self.by_name = text.index(f"The pass key of {name} is") < len(text) / 2
            return super().forward(input_ids, use_cache, **kwargs)

    depths = (0.9, 0.0, 0.3, 0.8)
    model = FirstHalf(tiny_tokenizer, False)
    records = multi_needle_accuracy(model, tiny_tokenizer, [2000], depths, trials=3, progress=False)
    assert [(r["depth"], r["accuracy"]) for r in records] == [(0.0, 1.0), (0.3, 1.0), (0.8, 0.0), (0.9, 0.0)]


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize(
    ("measure", "steps"),
    [
        (partial(perplexity_by_length, lengths=[16, 8], stride=8, batch_size=2), 2 * 7),
        (partial(loss_by_position, length=16, buckets=2, batch_size=2), 3),
        (partial(long_perplexity, lengths=[16, 32], short=4, batch_size=2), 3 + 1),
        (partial(passkey_accuracy, lengths=[450, 500], depths=(0, 1), trials=3), 2 * 2 * 3),
        (partial(multi_needle_accuracy, lengths=[500, 600], depths=(0, 1), trials=3), 2 * 2 * 3),
    ],
    ids=["perplexity", "positions", "long_ppl", "passkey", "needles"],
)
def test_a_bar_is_full_when_all_is_measured(tiny_llama, tiny_tokenizer, capfd, measure, steps, progress):
    """A step for each window at each length, and for each text."""
    measured = tiny_tokenizer if "trials" in measure.keywords else [[5] * 60]
    measure(tiny_llama(num_hidden_layers=1), measured, progress=progress)
    shown = capfd.readouterr().err
    assert re.findall(r"(\d+)/(\d+)", shown)[-1:] == [(str(steps), str(steps))] * progress
