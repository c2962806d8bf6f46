"""The families that the tests go through, and what each can carry: the README's table and `hf-longlora check` read it.

A family that is not here is not refused: what calls its attention through transformers' interface is found by the same
rules, and `hf-longlora check` says what they find. It has not been tested, that is all.
"""

from dataclasses import dataclass
from typing import Any

from .rope import ABF, ROPE_TYPES

ATTENTION_ONLY: tuple[str, ...] = ()
_SOFTCAP = "softcap in its scores: dense attention is its own eager one; train with a kernel that has softcap"
_SINKS = "attention sinks: dense attention is its own eager one; train with a kernel that has sinks"
_HYBRID = "layers without softmax attention are left alone"


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: As the README lists it.
        model_type: Of transformers' config.
        rope_types: The RoPE types that it can be extended by; none: attention only.
        note: What is special about it.
        tells_cache: Whether its layers' `use_cache` says in every forward whether a KV cache is filled. Others pass
            none on, or a False that is the layer's default.
    """

    name: str
    model_type: str
    rope_types: tuple[str, ...] = ROPE_TYPES
    note: str | None = None
    tells_cache: bool = True


FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama", note="Llama 2 and 3, SmolLM2, and what else has its architecture"),
    Family("Llama 4 (text)", "llama4_text", note="chunked layers are left alone"),
    Family("Mistral", "mistral", note="with a sliding window every layer is left alone"),
    Family("Ministral", "ministral", note="sliding layers are left alone"),
    Family("Ministral 3", "ministral3", ("yarn",), "comes with YaRN and is extended by it"),
    Family("Mixtral", "mixtral"),
    Family("Qwen2", "qwen2", note="Qwen2.5 too"),
    Family("Qwen2-MoE", "qwen2_moe"),
    Family("Qwen3", "qwen3"),
    Family("Qwen3-MoE", "qwen3_moe"),
    Family("Qwen3-Next", "qwen3_next", note=_HYBRID),
    Family(
        "Qwen3.5 (text)",
        "qwen3_5_text",
        ("yarn", ABF),
        f"{_HYBRID}; of the scaled types vLLM keeps its position axes under YaRN only",
    ),
    Family("Gemma", "gemma"),
    Family("Gemma 2", "gemma2", note=_SOFTCAP, tells_cache=False),
    Family(
        "Gemma 3 (text)",
        "gemma3_text",
        ("linear", "yarn", "llama3", "longrope", ABF),
        "sliding layers and their RoPE are left alone; its readers take max_position_embeddings for the extended "
        "length, which dynamic RoPE takes for the original one",
        tells_cache=False,
    ),
    Family("Phi", "phi"),
    Family("Phi-3", "phi3", ("longrope", ABF), "Phi-4 too; its config takes no other scaled RoPE type"),
    Family("OLMo", "olmo"),
    Family("OLMo 2", "olmo2"),
    Family(
        "OLMo 3",
        "olmo3",
        ("yarn", "llama3", "longrope", ABF),
        "sliding layers and their RoPE are left alone; vLLM sizes the sliding layers' table by "
        "max_position_embeddings, which is the original length under linear and dynamic RoPE",
        tells_cache=False,
    ),
    Family("OLMoE", "olmoe"),
    Family("Granite", "granite"),
    Family("Granite MoE", "granitemoe"),
    Family("Granite MoE hybrid", "granitemoehybrid", note=_HYBRID),
    Family("SmolLM3", "smollm3", note="layers without RoPE are sparse as the others are"),
    Family("GPT-NeoX", "gpt_neox", note="Pythia too"),
    Family("StarCoder2", "starcoder2"),
    Family("StableLM", "stablelm", tells_cache=False),
    Family("Cohere", "cohere"),
    Family("Cohere 2", "cohere2", note="sliding layers are left alone"),
    Family("GLM", "glm"),
    Family("GLM-4", "glm4"),
    Family("GLM-4 MoE", "glm4_moe"),
    Family("Nemotron", "nemotron"),
    Family("Persimmon", "persimmon", tells_cache=False),
    Family("Helium", "helium"),
    Family("EXAONE 4", "exaone4", note="sliding layers are left alone"),
    Family("Seed-OSS", "seed_oss"),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("ERNIE 4.5 MoE", "ernie4_5_moe"),
    Family("Arcee", "arcee"),
    Family("Apertus", "apertus", ("llama3",), "comes with llama3 RoPE and is extended by it"),
    Family("DeepSeek-V3", "deepseek_v3", ("yarn", ABF), "vLLM takes any scaled RoPE of this family for YaRN"),
    Family("gpt-oss", "gpt_oss", ("yarn",), f"{_SINKS}; it comes with YaRN and is extended by it"),
    Family("Bamba", "bamba", note=_HYBRID),
    Family("Falcon-H1", "falcon_h1", note=_HYBRID),
    Family("LFM2", "lfm2", note=_HYBRID, tells_cache=False),
    Family("MiniMax", "minimax", note=_HYBRID),
    Family("GPT-2", "gpt2", ATTENTION_ONLY, "learned positions: its length is fixed"),
    Family("GPT-BigCode", "gpt_bigcode", ATTENTION_ONLY, "learned positions: its length is fixed", False),
    Family("OPT", "opt", ATTENTION_ONLY, "learned positions: its length is fixed", False),
    Family("Jamba", "jamba", ATTENTION_ONLY, f"no positions, any length; {_HYBRID}"),
    Family("Nemotron-H", "nemotron_h", ATTENTION_ONLY, f"no positions, any length; {_HYBRID}"),
)


def find_family(config: Any) -> Family | None:
    """The family of a config's language model, or `None` if it is not in the table."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    model_type = getattr(text_config, "model_type", None)
    return next((family for family in FAMILIES if family.model_type == model_type), None)
