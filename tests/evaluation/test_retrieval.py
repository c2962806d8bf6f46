import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from hf_longlora import passkey_accuracy
from hf_longlora.evaluation import passkey_example
from hf_longlora.evaluation.retrieval import NEEDLE


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
    (record,) = passkey_accuracy(model, tiny_tokenizer, 450, (0.5,), trials=2, progress=False)
    assert record["accuracy"] == float(generated.tolist() == answer) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": 20}, "at least .* tokens"),
        ({"depths": (1.5,)}, "depth"),
        ({"trials": 0}, "trials"),
        ({"digits": 0}, "digits"),
    ],
)
def test_bad_arguments(tiny_llama, tiny_tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        passkey_accuracy(tiny_llama(), tiny_tokenizer, **{"lengths": 450, "progress": False} | arguments)
