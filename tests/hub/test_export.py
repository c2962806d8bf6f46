"""Exported forms: each reloads without this package, in another process, to the same logits."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from hf_longlora import LongLoraConfig, export_adapter
from hf_longlora.cli.evaluate import load
from hf_longlora.rope import current_rope, reach
from tests.tuner.helpers import SHAPE, ids, llama, logits, perturbed
from tests.vllm_rules import served

LORA_ONLY = {"train_norms": False, "train_embeddings": False}
# The model's and the adapter's options, by name.
CASES = {
    "all": ({}, {"target_length": 256, "ensure_weight_tying": True}),  # what is not tied stays so
    "tied": ({"tied": True}, {"target_length": 256, "rope_type": "linear"}),
    "lora": ({}, {"target_length": 256, "rope_type": "dynamic", **LORA_ONLY}),
    "rslora bf16": ({"dtype": torch.bfloat16}, {"target_length": 256, "rope_type": "llama3", "use_rslora": True}),
    "no rope": ({}, {"r": 4}),
    "low-rank embeddings": (
        {"tied": True},
        {"target_length": 256, "rope_type": "yarn", "embedding_rank": 4, "train_norms": False},
    ),
    "patterns": ({}, {"target_length": 256, "rope_type": "yarn", "r": 12, "rank_pattern": {"q_proj": 4}, **LORA_ONLY}),
}

RELOAD = """
import sys

class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "hf_longlora":
            raise ImportError("blocked")

sys.meta_path.insert(0, Block())
import json
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

ids = torch.load("ids.pt")
for case in json.load(open("cases.json")):
    merged = AutoModelForCausalLM.from_pretrained(f"{case}/merged").eval()
    base = AutoModelForCausalLM.from_pretrained(
        f"{case}/source", config=AutoConfig.from_pretrained(f"{case}/plain/base")
    )
    plain = PeftModel.from_pretrained(base, f"{case}/plain").eval()
    with torch.no_grad():
        torch.save({"merged": merged(ids).logits, "plain": plain(ids).logits}, f"{case}/logits.pt")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For each case: the logits of the live adapter, and its exported forms with theirs in another process."""
    folder = tmp_path_factory.mktemp("exports")
    expected = {}
    for case, (model, adapter) in CASES.items():
        base = llama(**model)
        base.save_pretrained(folder / case / "source")
        base.name_or_path = str(folder / case / "source")
        peft_model = perturbed(base, LongLoraConfig(**adapter))
        peft_model.save_pretrained(folder / case / "adapter")
        reloaded = llama(**model)
        reloaded = PeftModel.from_pretrained(reloaded, folder / case / "adapter").eval()
        expected[case] = logits(reloaded)
        export_adapter(folder / case / "adapter", folder / case / "merged")
        export_adapter(folder / case / "adapter", folder / case / "plain", form="lora")
    torch.save(ids(), folder / "ids.pt")
    (folder / "cases.json").write_text(json.dumps(list(CASES)))
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [sys.executable, "-c", RELOAD]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, expected


@pytest.mark.parametrize("form", ["merged", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_reloads_without_this_package_to_the_same_logits(exported, case, form):
    folder, expected = exported
    found = torch.load(folder / case / "logits.pt")[form]
    half = found.dtype == torch.bfloat16
    assert (found - expected[case]).abs().max() <= (0.05 if half else 1e-5) * expected[case].abs().max()


@pytest.mark.parametrize("case", [case for case in CASES if case != "no rope"])
def test_length_and_rope_are_the_adapters_by_every_readers_rule(exported, case):
    folder, _ = exported
    for config in (folder / case / "merged", folder / case / "plain" / "base"):
        read = AutoConfig.from_pretrained(config)
        assert reach(current_rope(read)) == (256 if case == "all" else 64, 256)  # a larger theta keeps no first length
        assert served(read).default_length == 256


def test_a_plain_lora_does_not_run_on_the_unscaled_base_by_name(exported):
    folder, _ = exported
    with pytest.raises(OSError, match="base"):
        AutoPeftModelForCausalLM.from_pretrained(str(folder / "lora" / "plain"))
    said = (folder / "lora" / "plain" / "README.md").read_text()
    assert said.startswith("---\nlibrary_name: peft\n---\n")  # the base is a folder here, and no name on the Hub
    assert "--hf-config-path plain/base --hf-overrides '{" in said and "--max-lora-rank 8" in said
    assert "vLLM does not take it: it has modules_to_save" in (folder / "all" / "plain" / "README.md").read_text()
    said = (folder / "patterns" / "plain" / "README.md").read_text()
    assert "--hf-overrides" not in said and "--max-lora-rank 16" in said and "It has rank_pattern, which" in said
    assert "for some families" in (folder / "low-rank embeddings" / "plain" / "README.md").read_text()


@pytest.fixture
def adapter(tiny_tokenizer, tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.model_max_length = 64
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    perturbed(base, LongLoraConfig(target_length=256)).save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_the_tokenizer_comes_along_and_allows_the_length(adapter):
    for form, where in (("merged", "."), ("lora", "base")):
        export_adapter(adapter / "adapter", adapter / form, form=form)
        assert AutoTokenizer.from_pretrained(adapter / form / where).model_max_length == 256


def _lora(folder):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "adapter")


def _nan(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights[next(name for name in weights if "lora_B" in name)].fill_(float("nan"))
    save_file(weights, path)


def _adapted_base(folder):
    for file in (folder / "adapter").iterdir():
        shutil.copy(file, folder / "base")


def _base_rope(folder):
    config = json.loads((folder / "base" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5.0
    (folder / "base" / "config.json").write_text(json.dumps(config))


def _quantized(folder):
    config = json.loads((folder / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "base" / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["merged", "lora"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_lora, "type LORA, not LONGLORA"),
        (_nan, "NaN|not finite"),
        (_base_rope, "another RoPE"),
        (_adapted_base, "the base of .* holds an adapter itself"),
        (lambda folder: (folder / "adapter" / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda folder: (folder / "adapter" / "adapter_model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "base").rename(folder / "elsewhere"), "the base of .* can't be had"),
        (lambda folder: (folder / "out").write_text("mine"), "not empty"),
        (lambda folder: ((folder / "out").mkdir(), (folder / "out" / "mine").touch()), "not empty"),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_left(adapter, form, harm, message):
    harm(adapter)
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    with pytest.raises((ValueError, OSError), match=message):
        export_adapter(adapter / "adapter", adapter / "out", form=form)
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert not list(adapter.glob(".*"))


def test_a_base_that_has_moved_and_folders_that_are_empty_or_not_there(adapter):
    (adapter / "base").rename(adapter / "elsewhere")
    (adapter / "empty").mkdir()
    for form, out in (("merged", adapter / "empty"), ("lora", adapter / "not" / "there")):
        for _ in range(2):
            assert export_adapter(adapter / "adapter", out, form=form, base=adapter / "elsewhere") == out
            shutil.copytree(out, adapter / form, dirs_exist_ok=True)
            shutil.rmtree(out)  # its parent stays
    assert reach(current_rope(AutoConfig.from_pretrained(adapter / "merged")))[1] == 256
    assert str(adapter / "elsewhere") in (adapter / "lora" / "README.md").read_text()


def test_merging_into_a_quantized_base_is_refused(adapter):
    _quantized(adapter)
    with pytest.raises(ValueError, match="is quantized"):
        export_adapter(adapter / "adapter", adapter / "out")


def test_the_dtype_of_the_merged_model(adapter):
    (adapter / "bfloat16").mkdir()  # what is there and empty will do
    for dtype in ("bfloat16", torch.bfloat16):
        export_adapter(adapter / "adapter", adapter / str(dtype), dtype=dtype)
        assert json.loads((adapter / str(dtype) / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r'dtype must be "auto".*got \'bf16\''):
        export_adapter(adapter / "adapter", adapter / "out", dtype="bf16")


def test_names_that_are_nowhere_and_unknown_forms(adapter):
    with pytest.raises(OSError, match="can't be had from the Hub"):
        export_adapter("nobody/nothing", adapter / "out")
    with pytest.raises(ValueError, match="`form` must be"):
        export_adapter(adapter / "adapter", adapter / "out", form="gguf")


# -- added tokens ----

ADDED = {
    "whole": ({}, {}),
    "whole, tied": ({"tied": True}, {}),
    "the new tokens alone": ({}, {"trainable_token_indices": [128, 130]}),
    "the new tokens alone, tied": ({"tied": True}, {"trainable_token_indices": [128, 130]}),
    "by a rank": ({}, {"embedding_rank": 4}),
    "no embeddings": ({"tied": True}, {"train_embeddings": False}),
}


@pytest.fixture(params=ADDED)
def with_added_tokens(request, tmp_path, tiny_tokenizer):
    """A folder with an adapter whose base was resized from 128 to 131 tokens, and what the adapted model answers."""
    model, adapter = ADDED[request.param]
    source = llama(**model)
    source.generation_config.max_length = 64
    source.save_pretrained(tmp_path / "source")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    base.resize_token_embeddings(131)
    peft_model = perturbed(base, LongLoraConfig(target_length=256, **adapter))
    peft_model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "source")
    tiny_tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<a>", "<b>"]})
    assert len(tiny_tokenizer) == 131
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(peft_model, NEW)


NEW = torch.cat([ids(40), torch.tensor([[128, 129, 130]])], 1)


def test_an_adapter_with_added_tokens_is_merged(with_added_tokens):
    folder, expected = with_added_tokens
    export_adapter(folder / "adapter", folder / "merged")
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert merged.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "merged")) == 131
    assert (logits(merged, NEW) - expected).abs().max() <= 5e-5
    assert merged.generation_config.max_length == 256


def test_a_plain_lora_with_added_tokens_loads_by_its_own_readme(with_added_tokens, monkeypatch):
    folder, expected = with_added_tokens
    export_adapter(folder / "adapter", folder / "plain", form="lora")
    said = (folder / "plain" / "README.md").read_text()
    assert "vLLM does not take it" in said and "tokens that its base has not" in said
    found = {}
    monkeypatch.chdir(folder)
    exec(said.split("```python\n")[1].split("```")[0], found)
    assert (logits(found["model"].eval(), NEW) - expected).abs().max() <= 1e-5
    assert found["model"].generation_config.max_length == 256


def test_an_adapter_with_added_tokens_is_evaluated(with_added_tokens):
    folder, expected = with_added_tokens
    model, tokenizer = load(str(folder / "adapter"), "float32", "cpu")
    assert len(tokenizer) == 131
    assert (logits(model.eval(), NEW) - expected).abs().max() <= 1e-5


def test_added_tokens_without_rows_are_as_many_as_the_tokenizers(tmp_path, tiny_tokenizer, caplog, monkeypatch):
    """As PEFT saves them where it can't read the base's config: the rows of the head are gone, and that is said."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    llama().save_pretrained(tmp_path / "source")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    base.resize_token_embeddings(131)
    model = perturbed(base, LongLoraConfig(target_length=256, **LORA_ONLY))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits(model)
    tiny_tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<a>", "<b>"]})
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert "no rows of model.embed_tokens and lm_head" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert logits(merged).shape == expected.shape
    assert (logits(merged) - expected)[..., :128].abs().max() <= 5e-5
    export_adapter(tmp_path / "adapter", tmp_path / "plain", form="lora")
    assert "base.resize_token_embeddings(131)" in (tmp_path / "plain" / "README.md").read_text()


def test_an_adapter_for_another_task_is_told_where_to_go(tmp_path):
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=128, **SHAPE, num_labels=3, pad_token_id=0))
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = perturbed(base, LongLoraConfig(task_type="SEQ_CLS", target_length=4096))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    words = "for the task SEQ_CLS, .* load it by peft.AutoPeftModelForSequenceClassification.from_pretrained"
    for form in ("merged", "lora"):
        with pytest.raises(ValueError, match=words):
            export_adapter(tmp_path / "adapter", tmp_path / form, form=form)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "adapter"), "float32", "cpu")
    # ... and there it is right.
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert (logits(loaded.merge_and_unload()) - expected).abs().max() <= 1e-5
