"""`check_model` and `hf-longlora check`: what they say is what happens, and no weights are needed for it."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, T5Config

from hf_longlora import LongLoraConfig, S2AttentionConfig
from hf_longlora.cli import main
from hf_longlora.cli.check import in_words
from hf_longlora.families import FAMILIES, find_family
from hf_longlora.modules import attention_modules
from hf_longlora.planning import check_model
from hf_longlora.rope import ROPE_TYPES, current_rope, reach, type_over
from hf_longlora.schedule import ContextStage, Schedule

from .attention.test_skipping import STATEFUL, UNTOLD
from .test_families import COMMON, EVERY, HALF_SLIDING, OUTSIDE, SHARED, TINY, build, vision_language


@pytest.mark.parametrize("family", EVERY)
def test_it_says_what_happens(family):
    """Layers as the families' training test found them sparse; modules and RoPE as the adapter takes them."""
    model = build(family)
    config = copy.deepcopy(model.config)
    known = find_family(config)
    assert known is not None and known.model_type == family
    target = 4 * reach(config)[1] if known.rope_types else None
    found = check_model(config, target_length=target)
    assert found.refused == []
    assert found.family is known
    sparse, total = TINY[family][1], config.num_hidden_layers
    assert (len(found.sparse), len(found.layers) + found.other_layers) == (sparse, total)
    assert {layer.heads for layer in found.layers} == {config.num_attention_heads}
    assert config == model.config  # a config that was passed is not changed
    # As `tests/attention/test_skipping.py` finds them in a training step.
    skips = bool(known.rope_types) and family not in STATEFUL | UNTOLD
    assert found.window == (reach(config)[0] if skips else None)
    assert any(note.startswith("No steps in windows") for note in found.notes) != skips
    assert any(note.startswith("No sequence_parallel") for note in found.notes) != found.shared
    assert not found.shared or (len(found.sparse) == total and family not in STATEFUL)

    tuned = get_peft_model(model, LongLoraConfig(target_length=target))
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad}
    for name in found.norms + found.embeddings:
        assert any(f"{name}.modules_to_save" in n for n in trained), name
    assert len(found.norms) + len(found.embeddings) == len(tuned.peft_config["default"].modules_to_save)
    assert sorted(tuned.peft_config["default"].target_modules) == found.targets
    assert found.parameters == tuned.get_nb_trainable_parameters()
    if target is None:
        assert found.rope is None
    else:
        assert found.rope is not None
        assert found.rope[1] == current_rope(model.config)
        assert reach(found.rope[1])[1] == target
        assert found.attention.group_size == min(reach(found.rope[0])[0], -(-target // 4))


def test_the_words():
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(**COMMON | {"max_position_embeddings": 512}, rope_parameters=rope)
    said = in_words(check_model(config, target_length=2048, attention=S2AttentionConfig(group_size=100)))
    for words in (
        "LlamaForCausalLM, model type llama (tested: Llama)",
        "2 of 2 layers sparse",
        "the last 1 of 2 key/value heads, with 2 of 4 query heads",
        "100 tokens and the first 4 of a document, at 2,048",
        "windows     64 tokens (sparse=",
        "shared      a sequence by several processes",
        "LoRA on     k_proj, o_proj, q_proj, v_proj",
        "5 norms",
        "1 embedding (model.embed_tokens)",
        "llama3, 512 tokens of originally 64",
        "-> llama3, 2,048 tokens of originally 64",
        "factor 32",
    ):
        assert words in said, said
    assert "REFUSED" not in said


def test_layers_that_are_left_alone_are_named():
    said = in_words(check_model(AutoConfig.for_model("gemma2", **COMMON | HALF_SLIDING | {"head_dim": 8})))
    assert "1 of 2 layers sparse" in said
    assert "a window of 16 tokens (model.layers.0.self_attn)" in said
    assert "softcap: train with one of the kernels" in said and "reference" in said
    assert "unchanged" in said
    config = build("qwen3_next").config
    assert "1 layer left alone: no softmax attention" in in_words(check_model(config))


def test_a_block_that_is_used_again_can_not_carry_an_adapter():
    """Merged, each use's LoRA would be added to the weights of all."""
    config = AutoConfig.for_model("zamba", **COMMON | SHARED | {"n_mamba_heads": 2, "mamba_dt_rank": 4})
    found = check_model(config)
    assert (len(found.sparse), found.other_layers) == (2, 2)  # attention itself is no matter
    (reason,) = found.refused
    assert "layers.3.shared_transf.self_attn.q_proj has its weights from model.layers.1." in reason
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="layers that are used again"):
        get_peft_model(model, LongLoraConfig())
    with pytest.raises(ValueError, match=r"shared_transf\.\w*norm has its weights from"):  # nor norms by themselves
        get_peft_model(model, LongLoraConfig(target_modules=["in_proj"]))
    assert model(input_ids=torch.ones(1, 8, dtype=torch.long)).logits.isfinite().all()
    tuned = get_peft_model(model, LongLoraConfig(target_modules=["in_proj"], train_norms=False))
    assert tuned.get_nb_trainable_parameters()[0] > 0


def test_layers_that_are_gone_through_again_are_counted_once():
    if "dory" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no dory")
    parts = {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1, "num_hidden_layers": 4}
    config = AutoConfig.for_model("dory", **COMMON | parts | {"head_dim": 8})
    found = check_model(config)
    modules = [name for name, _ in attention_modules(AutoModelForCausalLM.from_config(config))]
    assert sorted(layer.name for layer in found.layers) == sorted(modules) and found.other_layers == 0


def test_a_rope_that_can_not_be_read_is_no_hindrance():
    """RecurrentGemma has no length in its config; a Granite hybrid without positions has RoPE's parameters in it."""
    special = {"lru_width": 32, "head_dim": 8, "num_hidden_layers": 3}
    common = {key: value for key, value in COMMON.items() if key != "max_position_embeddings"}
    found = check_model(AutoConfig.for_model("recurrent_gemma", **common | special))
    assert found.rope is None and not found.refused
    assert "no `max_position_embeddings`" in in_words(found) and "a window of 2,048 tokens" in in_words(found)
    config = build("granitemoehybrid").config
    config.position_embedding_type = "nope"
    found = check_model(config)
    assert found.rope is None and not found.refused and len(found.sparse) == 1
    assert "there is no RoPE to scale" in in_words(found)
    (reason,) = check_model(config, target_length=256).refused
    assert "no rotary module" in reason


def test_a_decoder_layer_named_after_its_attention_is_none():
    """A JambaAttentionDecoderLayer holds an MLP, too."""
    model = build("jamba")
    assert any(type(module).__name__ == "JambaAttentionDecoderLayer" for module in model.modules())
    model.config.expert_layer_offset = 0  # so that the MLP beside the attention is no mixture
    assert check_model(model.config).targets == ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_layers_are_found_under_every_rope_type(rope_type):
    found = check_model(LlamaConfig(**COMMON), target_length=256, rope_type=rope_type)
    assert len(found.sparse) == 2 and found.rope is not None
    assert type_over(found.rope[1], found.rope[0]) == rope_type
    assert f"-> {rope_type}, 256 tokens" in in_words(found)
    assert ("vLLM doesn't scale it by itself" in in_words(found)) == (rope_type == "dynamic")


def test_a_window_in_every_layer():
    found = check_model(AutoConfig.for_model("mistral", **COMMON | {"sliding_window": 16}))
    assert not found.sparse and not found.refused
    assert "0 of 2 layers sparse" in in_words(
        found
    ) and "no layer would be sparse (a window of 16 tokens)" in in_words(found)


def test_one_key_value_head():
    said = in_words(check_model(LlamaConfig(**COMMON | {"num_key_value_heads": 1})))
    assert "shifted     2 of 4 query heads" in said


def test_a_family_that_nobody_has_tested():
    tested = {family.model_type for family in FAMILIES}
    config = AutoConfig.for_model("hunyuan_v1_dense", **COMMON | {"head_dim": 8})
    assert config.model_type not in tested
    found = check_model(config, target_length=256)
    assert found.family is None and not found.refused and len(found.sparse) == 2
    assert "not among the tested families" in in_words(found)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (T5Config(vocab_size=128, d_model=32, num_layers=1, num_heads=2), {}, "encoder-decoder"),
        (AutoConfig.for_model("bert", **COMMON), {}, "no causal attention"),
        (AutoConfig.for_model("falcon", **OUTSIDE["falcon"]), {}, "AttentionInterface"),
        (AutoConfig.for_model("vit"), {}, "no causal language model"),
        (AutoConfig.for_model("doge", **COMMON), {}, "works on the attention mask itself"),
        (LlamaConfig(**COMMON | {"head_dim": -1}), {}, "can't build the model"),
        (LlamaConfig(**COMMON), {"target_length": 64}, "reaches 64 tokens"),
        (AutoConfig.for_model("phi3", **COMMON), {"target_length": 256, "rope_type": "yarn"}, "longrope"),
        (AutoConfig.for_model("opt", **COMMON, **TINY["opt"][0]), {"target_length": 256}, "has no RoPE"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_is_refused_and_why(config, options, reason):
    found = check_model(config, **options)
    assert len(found.refused) == 1 and reason in found.refused[0]
    assert f"REFUSED     {found.refused[0]}" in in_words(found)


def test_a_vision_language_model_is_its_text_decoder():
    config = vision_language("LlavaForConditionalGeneration")[0].config
    found = check_model(config, target_length=256)
    assert not found.refused and found.family is not None and found.family.name == "Llama"
    assert [layer.name for layer in found.layers] == [f"model.language_model.layers.{i}.self_attn" for i in (0, 1)]
    assert not [name for name in found.norms + found.embeddings if "vision" in name]


def test_the_command_reads_a_config_and_nothing_else(tmp_path, capsys):
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert main(["check", str(tmp_path), "--target-length", "256"]) == 0
    said = capsys.readouterr().out
    assert "-> abf, 256 tokens of originally 64" in said
    assert main(["check", str(tmp_path), "--target-length", "256", "--rope-type", "linear", "--group-size", "32"]) == 0
    said = capsys.readouterr().out
    assert "-> linear, 256 tokens" in said and "32 tokens and the first 4 of a document, at 256" in said
    assert main(["check", str(tmp_path), "--target-length", "32"]) == 1
    output = capsys.readouterr()
    assert "REFUSED     target_length=32" in output.out and "can't be extended like this" in output.err
    assert main(["check", str(tmp_path / "nothing")]) == 1
    assert "hf-longlora: error:" in capsys.readouterr().err


def test_an_adapter_is_checked_on_its_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))
    model.name_or_path = "base"
    config = LongLoraConfig(r=4, target_length=256, target_modules=["q_proj"], train_norms=False)
    tuned = get_peft_model(model, config)
    stages = (ContextStage(128, 1, group_size=8), ContextStage(256, 1, group_size=24))
    schedule = Schedule(stages, S2AttentionConfig(), 0).to_dict()
    del schedule["sink_tokens"]
    tuned.peft_config["default"].schedule = schedule
    tuned.save_pretrained("adapter")
    get_peft_model(copy.deepcopy(tuned.unload()), LoraConfig()).save_pretrained("lora")
    LlamaConfig(**COMMON).save_pretrained("base")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()  # no weights are looked at
    assert main(["check", "adapter"]) == 0
    said = capsys.readouterr().out
    for words in (
        "adapter, an adapter of base: LlamaForCausalLM",
        "-> abf, 256 tokens of originally 64",
        "groups      24 tokens, at 256",  # and no sink tokens: none are stored
        "LoRA on     q_proj\n",
        "0 norms",
        "4,608 of",  # 128 * 32 of the embeddings, 2 * 4 * (32 + 32) of LoRA
    ):
        assert words in said, said
    for arguments, message in (
        (["check", "adapter", "--target-length", "512"], "is an adapter and has its RoPE"),
        (["check", "lora"], "of type LORA, not LONGLORA: check its base, base"),
        (["plan", "adapter"], "adapter is an adapter and no model: give its base, base"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err
    LlamaConfig(**COMMON | {"max_position_embeddings": 128}).save_pretrained("base")
    assert main(["check", "adapter"]) == 1
    assert "REFUSED     this adapter was trained" in capsys.readouterr().out
    for damage, message in (
        ("{", "is not valid"),
        ("[]", "is not valid: it holds []"),
        ("{}", "doesn't name its base"),
        ('{"base_model_name_or_path": "base"}', "of type None"),
        ('{"base_model_name_or_path": "base", "peft_type": "NEW"}', "is not valid: KeyError('NEW')"),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(damage)
        assert main(["check", "adapter"]) == 1
        assert message in capsys.readouterr().err


def test_groups_that_hold_all_are_noted():
    dense = "note        A group of 64 tokens holds all of a sequence of 64: attention is dense"
    for group_size in (63, 64):
        said = in_words(check_model(LlamaConfig(**COMMON), attention=S2AttentionConfig(group_size=group_size)))
        assert (dense in said) == (group_size == 64)


def test_a_lost_rope_theta_is_noted(tmp_path):
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    written = json.loads(file.read_text())
    for scaling, lost in (({"factor": 2.0}, True), ({"factor": 2.0, "rope_theta": 5e5}, False)):
        file.write_text(json.dumps(written | {"rope_parameters": {"rope_type": "linear", **scaling}}))
        said = in_words(check_model(str(tmp_path)))
        assert ("names no rope_theta: transformers takes 10000" in said) == lost
        assert "REFUSED" not in said


def test_a_forward_that_can_not_be_followed_is_said(monkeypatch):
    def looks(self, input_ids=None, **_):
        return bool(torch.zeros(1, device="meta").item())

    monkeypatch.setattr(type(AutoModelForCausalLM.from_config(LlamaConfig(**COMMON))), "forward", looks)
    found = check_model(LlamaConfig(**COMMON))
    assert not found.layers and "can't be followed without numbers" in in_words(found)
    assert found.norms and found.rope is not None


def test_sink_tokens_are_said(tmp_path, capsys):
    LlamaConfig(**COMMON).save_pretrained(tmp_path)
    for options, words in (
        ([], "groups      64 tokens and the first 4 of a document, at 256"),
        (["--group-size", "8"], "groups      8 tokens and the first 4 of a document, at 256"),
    ):
        assert main(["check", str(tmp_path), "--target-length", "256", *options]) == 0
        assert words in capsys.readouterr().out


def test_a_linear_config_that_may_be_read_in_two_ways_is_shown_in_both(tmp_path, capsys):
    """DeepSeek-Coder's: trained at 4,096, a factor of 4, and 16,384 max_position_embeddings."""
    linear = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
    LlamaConfig(**COMMON | {"max_position_embeddings": 16384}, rope_parameters=linear).save_pretrained(tmp_path)
    both = "RoPE        linear, 65,536 tokens of originally 16,384 or 16,384 tokens of originally 4,096"
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert both in said and "groups  " not in said and "pass base_length: 16384 or 4096" in said
    assert main(["check", str(tmp_path), "--target-length", "131072"]) == 1
    said = capsys.readouterr().out
    assert both in said and "REFUSED     this base has linear RoPE of factor 4" in said
    for length, factor, group in ((4096, 32, "4,096"), (16384, 8, "16,384")):
        assert main(["check", str(tmp_path), "--target-length", "131072", "--base-length", str(length)]) == 0
        said = capsys.readouterr().out
        assert f"RoPE        linear, {4 * length:,} tokens of originally {length:,}" in said
        assert f"-> linear, 131,072 tokens of originally {length:,} (factor {factor}, rope_theta 100000)" in said
        assert f"groups      {group} tokens and the first 4 of a document, at 131,072" in said


def test_what_processes_can_not_share_is_said():
    """By the RoPE that the model is given, not only by that it has."""
    config = LlamaConfig(**COMMON)
    assert check_model(config, target_length=4096).shared
    dynamic = check_model(config, target_length=4096, rope_type="dynamic")
    assert not dynamic.shared and not dynamic.refused
    assert any(note.startswith("No sequence_parallel: RoPE of type 'dynamic'") for note in dynamic.notes)
