"""Checkpoints of the original LongLoRA, made as its scripts make them, and its own pipeline beside ours."""

import copy
import json
import math
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from hf_longlora.cli import main
from hf_longlora.cli.evaluate import load

from ..tuner.helpers import nudge

LENGTH = 64
"""Of the base. Extended to 160 tokens, the scripts' factor is 3, not 2.5."""
TARGET = 160


def rope_as_the_scripts_set_it(config, model_max_length):
    """fine-tune.py and eval.py, in the config's present form."""
    factor = config.rope_parameters.get("factor", 1)
    length = config.max_position_embeddings * factor
    if model_max_length > length:
        scaling = {"rope_type": "linear", "factor": float(math.ceil(model_max_length / length))}
        config.rope_parameters = {**config.rope_parameters, **scaling}
    return config


def trained(base, folder, target, resize=True, trainable=("embed", "norm"), base_name="base", **options):
    """fine-tune.py on a base, with weights as if it had been trained; then get_trainable_weights.py."""
    config = rope_as_the_scripts_set_it(AutoConfig.from_pretrained(base), target)
    model = AutoModelForCausalLM.from_pretrained(base, config=config)
    if resize:
        _resize(model)
    model.name_or_path = base_name
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0, bias="none", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if any(part in name for part in trainable):
            parameter.requires_grad_()
    nudge(model)
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(folder)
    torch.save(get_peft_model_state_dict(model, save_embedding_layers=False), folder / "adapter_model.bin")
    state = {k: v for k, v in model.state_dict().items() if "lora" not in k and any(part in k for part in trainable)}
    whole = {k[17:].replace(".base_layer", ""): v for k, v in state.items()}
    if whole:
        torch.save(whole, folder / "trainable_params.bin")


def _resize(model):
    """`smart_tokenizer_and_embedding_resize` for one added token."""
    model.resize_token_embeddings(model.config.vocab_size + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data[-1] = module.weight.data[:-1].mean(0)


def original_logits(base, folder, target, ids, resize=True):
    """The pipeline of merge_lora_weights_and_save_hf_model.py and eval.py."""
    config = rope_as_the_scripts_set_it(AutoConfig.from_pretrained(base), target)
    model = AutoModelForCausalLM.from_pretrained(base, config=config)
    if resize:
        _resize(model)
    if os.path.isfile(folder / "trainable_params.bin"):
        whole = torch.load(folder / "trainable_params.bin", weights_only=True)
        assert not model.load_state_dict(whole, strict=False).unexpected_keys
    model = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        return model(ids).logits


def edit(file, values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def base(tiny_llama, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    tiny_tokenizer.save_pretrained("base")
    (tmp_path / "theirs").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("case", "target", "resize"),
    [
        ("untied", TARGET, True),
        ("tied", TARGET, False),
        ("scaled", 4 * LENGTH + 1, True),
        ("lora", TARGET, True),
        ("neox", TARGET, False),
        ("short", LENGTH, True),
        ("modules_to_save", TARGET, False),
    ],
)
def test_the_logits_are_the_original_pipelines(base, tiny_llama, case, target, resize, caplog):
    options, trainable = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, ("embed", "norm")
    if case == "tied":
        tiny_llama(tie_word_embeddings=True).save_pretrained("base")
    elif case == "scaled":  # the scripts take its factor of 4 away, and so it was trained
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
        tiny_llama(rope_parameters=rope).save_pretrained("base")
    elif case == "neox":
        sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = GPTNeoXConfig(**sizes, intermediate_size=64, max_position_embeddings=LENGTH)
        GPTNeoXForCausalLM(config).save_pretrained("base")
        options = {"target_modules": ["query_key_value"]}
    elif case == "lora":
        trainable = ()
    elif case == "modules_to_save":  # as LLaMA-Factory's additional_target and axolotl's lora_modules_to_save
        trainable, options = (), options | {"modules_to_save": ["embed_tokens", "lm_head"]}
    theirs = base / "theirs"
    trained("base", theirs, target, resize, trainable, **options)
    if case == "modules_to_save":  # and as PEFT writes it by now
        file = theirs / "adapter_model.bin"
        weights = {key: weight.clone() for key, weight in torch.load(file, weights_only=True).items()}
        save_file(weights, file.with_suffix(".safetensors"))
        file.unlink()
    assert main(["import", "theirs", "ours", "--target-length", str(target)]) == 0
    assert ("are left out" in caplog.text) == (resize and bool(trainable))
    assert ("LoRA alone is taken" in caplog.text) == (case == "lora")

    ids = torch.arange(2 * target).reshape(2, target) % 120 + 4
    expected = original_logits("base", theirs, target, ids, resize)
    model, _ = load("ours", "auto", "cpu")
    with torch.no_grad():
        found = model.eval()(ids).logits
        plain = AutoModelForCausalLM.from_pretrained("base").eval()(ids).logits
    torch.testing.assert_close(found, expected[..., :128], rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 0.1
    assert sorted(os.listdir("ours")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_base_that_has_the_added_rows_keeps_them(base):
    trained("base", base / "theirs", TARGET, target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained("base")
    _resize(model)
    model.save_pretrained("resized")
    AutoTokenizer.from_pretrained("base").save_pretrained("resized")
    assert main(["import", "theirs", "ours", "--target-length", str(TARGET), "--base", "resized"]) == 0
    assert len(load_file("ours/adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]) == 129
    model, _ = load("ours", "auto", "cpu")
    ids = torch.arange(TARGET)[None] % 125 + 4
    with torch.no_grad():
        found = model.eval()(ids).logits
    torch.testing.assert_close(found, original_logits("base", base / "theirs", TARGET, ids), rtol=0, atol=1e-5)


def test_the_whole_command_line_says_what_such_a_folder_is(base, capsys):
    trained("base", base / "theirs", TARGET, target_modules=["q_proj"])
    (base / "one.txt").write_text("words " * 200)
    (base / "run.yaml").write_text(
        "{model_name_or_path: theirs, dataset_name: one.txt, output_dir: out, use_cpu: true, bf16: false,"
        " stages: [{max_length: 128, max_steps: 1}]}"
    )
    for arguments in (
        ["evaluate", "theirs", "--documents", "one.txt", "--lengths", "64", "--device", "cpu"],
        ["check", "theirs"],
        ["plan", "theirs", "--gpu", "H100"],
        ["merge", "theirs", "merged"],
        ["train", "--config", "run.yaml"],
    ):
        assert main(arguments) == 1
        assert "hf-longlora import theirs OUT --target-length N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("code", "holds more than weights"),
        ("mlp", "holds model.layers.0.mlp.up_proj whole, which in base is neither a norm nor an embedding"),
        ("norm", "the adapter's weights are not what"),
        ("rank", "the adapter does not fit this model"),
        ("nan", "theirs/trainable_params.bin is damaged or from a run that diverged"),
        ("nothing", "it has no adapter_config.json"),
        ("no base", "pass base"),
        ("weights", "adapter_model.bin does not exist"),
        ("type", "theirs is an adapter of type LONGLORA, not a LoRA"),
        ("rope", "the base has RoPE of type 'yarn', which the original LongLoRA's scripts never had"),
    ],
)
def test_what_is_none_is_refused(base, capsys, change, message):
    theirs = base / "theirs"
    trained("base", theirs, TARGET, target_modules=["q_proj"], base_name="" if change == "no base" else "base")
    whole, lora = (
        torch.load(theirs / name, weights_only=True) for name in ("trainable_params.bin", "adapter_model.bin")
    )
    if change == "code":
        whole["model.norm.weight"] = copy.copy  # anything but weights
    elif change == "mlp":
        whole["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 32)
    elif change == "norm":
        del whole["model.norm.weight"]
    elif change == "rank":
        lora = {key: weight[:2] for key, weight in lora.items()}
    elif change == "nan":
        whole["model.norm.weight"] = whole["model.norm.weight"] * math.nan
    torch.save(whole, theirs / "trainable_params.bin")
    torch.save(lora, theirs / "adapter_model.bin")
    if change == "type":
        edit(theirs / "adapter_config.json", {"peft_type": "LONGLORA"})
    if change == "rope":
        rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}
        edit(base / "base" / "config.json", {"rope_parameters": rope})
    if change in ("nothing", "weights"):
        (theirs / ("adapter_config.json" if change == "nothing" else "adapter_model.bin")).unlink()
    assert main(["import", "theirs", "ours", "--target-length", str(TARGET)]) == 1
    assert message in capsys.readouterr().err
    assert not (base / "ours").exists()
