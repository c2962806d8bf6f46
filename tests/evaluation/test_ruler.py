"""RULER by lm-eval, where that is installed (`make test-eval`); what is refused without it, everywhere."""

import json
import re
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_longlora import LongLoraConfig, ruler_accuracy
from hf_longlora.cli import main
from hf_longlora.evaluation.ruler import TASKS, require_lm_eval

from ..conftest import ASCII, CHAT_TEMPLATE
from ..tuner.helpers import nudge

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: make test-eval")
WORDS = 700


@pytest.fixture(scope="module")
def words():
    """A tokenizer to which RULER's words are few tokens: as real ones have it, and not one a letter."""
    require_lm_eval(list(TASKS))
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils
    from lm_eval.tasks.ruler.prepare_niah import NEEDLE, get_haystack

    texts = [module.TEMPLATE for module in (cwe_utils, fwe_utils, niah_utils, vt_utils)] * 20
    texts += [get_haystack("repeat"), NEEDLE] * 20 + ["\n".join(cwe_utils.WORDS), ASCII]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture
def tokenizer(words):
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=CHAT_TEMPLATE, **special)


def solve(prompt: str) -> str:
    """The right answer to a text of RULER, found by reading it."""
    if "Find all variables" in prompt:
        value = re.findall(r"assigned the value (\d+) in the text above", prompt)[-1]
        text = prompt[prompt.rindex("Memorize and track") :]
        found = re.findall(rf"VAR (\w+) = {value}\b", text)
        for left, right in re.findall(r"VAR (\w+) = VAR (\w+)", text) * 5:
            found += [left] if right in found and left not in found else []
        return " ".join(found)
    if "numbered list of words" in prompt:
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |\n|$)", prompt.split("most often.")[1].split("Question")[0])
        return " ".join(word for word, _ in Counter(words).most_common(10))
    if "coded text" in prompt:
        words = re.findall(r"\b[a-z]{6}\b", prompt.split("coded words. ")[1].split("\nQuestion")[0])
        return " ".join(word for word, _ in Counter(words).most_common(3))
    kind, key = re.findall(r"special magic (\w+) for (\S+) mentioned", prompt)[0]
    assert prompt.count("special magic") >= 3  # the task, needles and the question: nothing is cut
    return re.findall(rf"special magic {kind}s for {key} is: (\S+)\.", prompt)[-1]


class Reader:
    """In the place of `model.generate`: answers by `solve`, and keeps what it was asked."""

    def __init__(self, tokenizer, answer=solve):
        self.tokenizer, self.answer, self.prompts, self.lengths = tokenizer, answer, [], []

    def __call__(self, input_ids, max_length, attention_mask, **options):
        assert options["do_sample"] is False
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            self.prompts.append(self.tokenizer.decode(ids[mask.bool()]))
            self.lengths.append(max_length - int((1 - mask).sum()))
            rows.append(self.tokenizer(" " + self.answer(self.prompts[-1]))["input_ids"])
        longest = max(map(len, rows))
        rows = [row + [self.tokenizer.eos_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


@needs_lm_eval
@pytest.mark.parametrize("chat_template", [True, False])
def test_who_reads_the_whole_text_scores_1_and_who_guesses_0(tiny_llama, tokenizer, chat_template, capfd):
    model = tiny_llama(vocab_size=WORDS)
    model.generate = reader = Reader(tokenizer)
    options = dict(trials=3, chat_template=chat_template)
    records = ruler_accuracy(model, tokenizer, [1500, 4096], batch_size=2, **options)  # 1,500 is none of lm-eval's
    assert re.findall(r"(\d+)/(\d+)", capfd.readouterr().err)[-1] == ("36", "36")
    assert [(record["task"], record["length"]) for record in records] == [(t, n) for n in (1500, 4096) for t in TASKS]
    assert {record["accuracy"] for record in records} == {1.0} and {record["error"] for record in records} == {0.0}
    for length, read in ((1500, reader.lengths[:18]), (4096, reader.lengths[18:])):
        assert len(read) == 18 and max(read) <= length  # with the answer's tokens
        assert min(read) > length * 0.4 and sorted(read)[6] > length * 0.8  # `cwe` leaves most free
    assert all(prompt.startswith("<s>user: ") == chat_template for prompt in reader.prompts)
    assert all((": The special magic" in p or "assistant: " in p) == chat_template for p in reader.prompts)

    model.generate, options["progress"] = Reader(tokenizer, lambda prompt: "no idea 123"), False
    records = ruler_accuracy(model, tokenizer, 1500, **options)
    assert not capfd.readouterr().err
    assert {record["accuracy"] for record in records} == {0.0}

    model.generate = Reader(tokenizer, lambda prompt: " ".join(solve(prompt).split()[:1]))
    found = {record["task"]: record["accuracy"] for record in ruler_accuracy(model, tokenizer, 1500, **options)}
    assert found["vt"] == pytest.approx(1 / 5) and found["fwe"] == pytest.approx(1 / 3)  # the share of what is asked


@needs_lm_eval
def test_every_model_reads_the_same_texts(tiny_llama, tokenizer):
    model = tiny_llama(vocab_size=WORDS)

    def read(tasks, **options):
        model.generate = reader = Reader(tokenizer)
        ruler_accuracy(model, tokenizer, 1500, tasks, trials=2, progress=False, **options)
        return set(reader.prompts)

    whole = read(None)
    assert len(whole) == 12
    parts = [read([task]) for task in reversed(TASKS)]
    assert set().union(*parts) == whole and all(len(part) == 2 for part in parts)
    assert not read(["cwe"], seed=1) & whole


@needs_lm_eval
def test_a_model_as_it_stands(tiny_llama, tokenizer, tmp_path):
    """An adapter with its RoPE, embeddings that are trained and tied; its tokenizer is left alone."""
    base = tiny_llama(vocab_size=WORDS, tie_word_embeddings=True)
    model = get_peft_model(base, LongLoraConfig(r=4, target_length=1024, rope_type="dynamic"))
    nudge(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(tiny_llama(vocab_size=WORDS, tie_word_embeddings=True), tmp_path)
    model.train()
    tokenizer.pad_token = None
    asked = []
    forward = model.generate

    def generate(*args, **options):
        answer = forward(*args, **options)
        asked.append((options["input_ids"], answer))
        return answer

    model.generate = generate
    records = ruler_accuracy(model, tokenizer, [1024, 700], ["niah_single_1"], trials=1, progress=False)
    assert [record["error"] for record in records] == [None, None]  # one text has none
    assert model.training and tokenizer.pad_token is None
    model.eval()
    fresh = PeftModel.from_pretrained(tiny_llama(vocab_size=WORDS, tie_word_embeddings=True), tmp_path).eval()
    (_, _), (prompt, answer) = asked  # the second after a longer one, which dynamic RoPE would remember
    assert prompt.shape[1] > 64
    fresh.get_base_model().load_state_dict(model.get_base_model().state_dict())
    expected = fresh.generate(input_ids=prompt, max_length=answer.shape[1], do_sample=False)
    assert answer.shape[1] > prompt.shape[1] and torch.equal(answer, expected)


@needs_lm_eval
def test_what_a_task_needs_is_said_before_it_runs(monkeypatch):
    require_lm_eval(list(TASKS))
    monkeypatch.setitem(sys.modules, "scipy", None)
    require_lm_eval(["vt"])
    with pytest.raises(ImportError, match=r"hf-longlora\[eval\]"):
        require_lm_eval(["vt", "fwe"])


@needs_lm_eval
def test_no_prompt_is_cut(tiny_llama, tokenizer):
    from hf_longlora.evaluation.harness import LoadedModel

    harness = LoadedModel(tiny_llama(vocab_size=WORDS), tokenizer, 100, 1, lambda count: None)
    assert harness.tok_batch_encode(["a b"], left_truncate_len=80)[0].shape[1] < 80
    with pytest.raises(ValueError, match="cut its begin off"):
        harness.tok_batch_encode(["a b c d " * 30], left_truncate_len=80)


@needs_lm_eval
@pytest.mark.parametrize("task", list(TASKS))
def test_a_length_too_short_is_refused(tiny_llama, tiny_tokenizer, task):
    """By this tokenizer a text has a token for each letter. lm-eval's generators would go on for ever."""
    with pytest.raises(ValueError, match=r"fits|Could not generate any sample"):
        ruler_accuracy(tiny_llama(), tiny_tokenizer, 512, [task], trials=1, progress=False)


def test_what_is_refused(tiny_llama, tiny_tokenizer, monkeypatch):
    model = tiny_llama()
    for tasks, message in (
        (["niah_single_1", "niah_single_2"], "niah_single_2 of RULER downloads its texts"),
        (["qa_squad"], "downloads its texts"),
        (["hellaswag"], "no task 'hellaswag'"),
        ([], "no task is given"),
    ):
        with pytest.raises(ValueError, match=message):
            ruler_accuracy(model, tiny_tokenizer, 4096, tasks)
    for lengths in ([], 100, [4096, 500]):
        with pytest.raises(ValueError, match="at least 512"):
            ruler_accuracy(model, tiny_tokenizer, lengths)
    with pytest.raises(ValueError, match="trials"):
        ruler_accuracy(model, tiny_tokenizer, 4096, trials=0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"hf-longlora\[eval\]"):
        ruler_accuracy(model, tiny_tokenizer, 4096)
    tiny_tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ruler_accuracy(model, tiny_tokenizer, 4096, chat_template=True)


@needs_lm_eval
def test_evaluate_runs_tasks_without_documents(tiny_llama, tokenizer, tmp_path, capsys):
    """And keeps what it measured of the same weights before, on the card, too."""
    base, out = str(tmp_path / "base"), tmp_path / "adapter"
    tiny_llama(vocab_size=WORDS).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = tiny_llama(vocab_size=WORDS)
    model.name_or_path = base
    get_peft_model(model, LongLoraConfig(r=4, target_length=1024)).save_pretrained(out)
    (out / "README.md").unlink()  # PEFT's
    (tmp_path / "one.txt").write_text("The grass is green. The sky is blue. " * 30)
    arguments = ["evaluate", str(out), "--output-dir", str(out), "--device", "cpu", "--lengths"]
    assert main([*arguments, "64", "--documents", str(tmp_path / "one.txt"), "--dense-only"]) == 0
    assert main([*arguments, "700", "800", "--tasks", "niah_single_1", "fwe", "--trials", "2"]) == 0
    results = json.loads((out / "evaluation.json").read_text())
    assert [(r["task"], r["length"], r["accuracy"], r["trials"]) for r in results["ruler"]] == [
        (task, length, 0.0, 2) for length in (700, 800) for task in ("niah_single_1", "fwe")
    ]
    printed = capsys.readouterr().out
    assert "RULER, by length" in printed and "700 tokens" in printed and "grass" not in printed
    card = (out / "README.md").read_text()
    assert "| 800 tokens | 0.0% | 0.0% | 0.0% |" in card and "| dense |" in card and results["perplexity"]
    assert main([*arguments, "4096"]) == 1 and "nothing to measure" in capsys.readouterr().err
    assert main([*arguments, "4096", "--tasks", "qa_squad"]) == 1 and "downloads its texts" in capsys.readouterr().err
