"""What would be done to a model, before any weight is downloaded: what `hf-longlora check MODEL` prints.

The model is built from its config on the meta device, where tensors have shapes and no numbers, given the adapter, and
run once. What is reported is what the layers themselves asked for: a family that nobody has tested is checked by the
same rules as any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..attention import S2AttentionConfig, check_skipping, set_s2_attention
from ..attention.interface import left_alone, refuse_sparse, refuse_unknown
from ..attention.kernels import KERNELS, OPTIONS
from ..attention.mask import READS_MASK, S2Mask, s2_mask
from ..families import Family, find_family
from ..lookup import adapter_values, read_config
from ..modules import is_norm, language_modules, meta_model, walk
from ..parallel import check_shardable
from ..rope import ABF, AUTO, RopeScaling, current_rope, native_window, reach, readings, rotary_modules, type_over
from ..tuner import LongLoraConfig

_PROBE = "s2attn_probe"
_TOKENS = 16


@dataclass(frozen=True)
class Layer:
    """An attention layer, as it asked for attention in a training forward."""

    name: str
    heads: int
    kv_heads: int
    left_alone: str | None
    """Why it is dense in training as well; `None` if it is sparse."""
    needs: tuple[str, ...] = ()
    """The options (`hf_longlora.attention.kernels.OPTIONS`) that its kernel has to take."""


@dataclass
class ModelCheck:
    """What would be done to a model."""

    name: str
    model_type: str
    model_class: str = "unknown"
    family: Family | None = None
    layers: list[Layer] = field(default_factory=list)
    other_layers: int = 0
    """Layers without softmax attention."""
    attention: S2AttentionConfig | None = None
    """Groups at `length`."""
    window: int | None = None
    """Tokens in a window (`sparse="windows"` or "pose"); `None` if it can't be trained in any."""
    shared: bool = False
    """Whether several processes can share its sequences (`sequence_parallel`)."""
    length: int | None = None
    rope: tuple[RopeScaling, RopeScaling] | None = None
    """Before and after; `None` without RoPE."""
    reaches: tuple[list[tuple[int, int]], ...] = ()
    """For each of the two: (original length, length reached), twice where the config can be read in two ways."""
    targets: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    """Trained, and in all."""
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Why the model, or what was asked of it, is refused. Empty: nothing is."""

    @property
    def sparse(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.left_alone is None]

    def refuse(self, reason: object) -> None:
        """Add a reason, once."""
        if str(reason) not in self.refused:
            self.refused.append(str(reason))


def check_model(
    model: str | PreTrainedConfig,
    *,
    target_length: int | None = None,
    rope_type: str = AUTO,
    base_length: int | None = None,
    attention: S2AttentionConfig | None = None,
    trust_remote_code: bool = False,
) -> ModelCheck:
    """Say what LongLoRA would do to a model, without its weights.

    A model that is refused is no error here: `refused` says why.

    Args:
        model: A name on the Hub, a folder, or a config. A LONGLORA adapter's: its base is checked, with that adapter.
        target_length, rope_type, base_length: As in `LongLoraConfig`.
        attention: Default: what the adapter was trained with, or else the trainer's default.
        trust_remote_code: Run the code that comes with a model whose class is not in transformers.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is an adapter of another type, or a length or RoPE is given beside the adapter's own.
    """
    adapter, source, revision = None, model, None
    if isinstance(model, str) and (adapter := _adapter(model)) is not None:
        source, revision = str(adapter.base_model_name_or_path), adapter.revision
        if target_length is not None or rope_type != AUTO or base_length is not None:
            raise ValueError(f"{model} is an adapter and has its RoPE. For another one check its base, {source}.")
        attention = attention or adapter.trained_attention
    if isinstance(source, str):
        config: Any = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
        name = source if adapter is None else f"{model}, an adapter of {source}"
    else:
        config, name = copy.deepcopy(source), type(source).__name__
    found = ModelCheck(name, config.model_type, family=find_family(config))
    if isinstance(source, str):
        _theta(PreTrainedConfig.get_config_dict(source, revision=revision)[0], config, found)
    built = _build(config, found, trust_remote_code)
    if built is None:
        return found
    found.model_class = type(built).__name__
    try:
        set_s2_attention(built)
    except ValueError as error:
        found.refuse(error)
        return found
    wanted = adapter or LongLoraConfig(target_length=target_length, rope_type=rope_type, base_length=base_length)
    native = native_window(built, wanted.base_length)
    found.window = native if _can(found, "steps in windows", check_skipping, type(built), config) else None
    _put_adapter(built, found, wanted)
    found.shared = _can(found, "sequence_parallel", check_shardable, type(built), built.config)  # with its new RoPE
    _group_size(found, built.config, native, target_length, attention or S2AttentionConfig())
    _run(built, found)
    _judge(found, built.config)
    return found


def _adapter(name: str) -> LongLoraConfig | None:
    """The config of an adapter, none of its weights; `None` if it is no adapter's name."""
    values = adapter_values(name)
    if values is None:
        return None
    base = values.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"the adapter {name} doesn't name its base model (base_model_name_or_path)")
    try:
        adapter = PeftConfig.from_peft_type(**values | {"inference_mode": False})  # for training, as it was made
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the adapter_config.json of {name} is not valid: {error!r}") from error
    if not isinstance(adapter, LongLoraConfig):
        kind = values.get("peft_type")
        raise ValueError(f"{name} is an adapter of type {kind}, not LONGLORA: check its base, {base}")
    return adapter


def _theta(written: dict[str, Any], config: Any, found: ModelCheck) -> None:
    """Note a scaled RoPE whose file names no base of the frequencies: transformers puts the class's default there."""
    written = written.get("text_config") or written
    rope = written.get("rope_parameters") or written.get("rope_scaling") or {}
    flat = {**written, **rope}
    nested = any(isinstance(value, dict) for value in rope.values())
    if rope and not nested and "rope_theta" not in flat and "rotary_emb_base" not in flat:
        default = config.get_text_config().default_theta
        found.notes.append(
            f"config.json scales RoPE and names no rope_theta: transformers takes {default:g}. If the model was "
            "trained with another (assigning config.rope_scaling drops it), set it there: reported for a lost one, "
            "perplexity 13.8 -> 11,316."
        )


def _build(config: Any, found: ModelCheck, trust_remote_code: bool) -> PreTrainedModel | None:
    if getattr(config, "is_encoder_decoder", False):
        found.refuse(
            f"{config.model_type} is an encoder-decoder; shifted sparse attention is for decoders. Train it with "
            'attn_implementation="sdpa".'
        )
        return None
    auto: Any = AutoModelForCausalLM
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        auto = AutoModelForImageTextToText
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            found.refuse(f"transformers has no causal language model of type {config.model_type!r}.")
            return None
    try:
        return meta_model(config, auto, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a family's code makes of a config that lacks something
        found.refuse(f"transformers can't build the model from this config: {type(error).__name__}: {error}")
        return None


def _put_adapter(model: PreTrainedModel, found: ModelCheck, wanted: LongLoraConfig) -> None:
    """Norms, embeddings, targets and RoPE, by putting the adapter on."""
    before, why = _rope_of(model)
    if before is None and wanted.target_length is None:  # else putting the adapter on says it
        found.notes.append(why)
    tuned: Any = None
    for config in wanted, LongLoraConfig():
        try:
            tuned = get_peft_model(model, config)
            break
        except ValueError as error:
            found.refuse(error)
    if before is not None:
        after = current_rope(model.config)
        found.rope = before, after
        had = readings(model.config, before, wanted.base_length)
        # What has been scaled here is clear.
        original, longest = reach(after)
        if type_over(after, before) == ABF:  # which keeps no original length
            original = had[0][0]
        found.reaches = had, had if after == before else [(original, longest)]
    if tuned is None:
        return
    adapter = tuned.peft_config["default"]
    found.targets = sorted(adapter.target_modules or ())
    whole = set(adapter.modules_to_save or ())
    for name, module in walk(model):
        if any(name == kept or name.endswith(f".{kept}") for kept in whole):
            (found.norms if is_norm(module) else found.embeddings).append(name)
    found.parameters = tuned.get_nb_trainable_parameters()


def _can(found: ModelCheck, what: str, check: Callable[..., None], *args: Any) -> bool:
    """Whether a check passes; why it doesn't is noted."""
    try:
        check(*args)
    except ValueError as error:
        found.notes.append(f"No {what}: {error}")
        return False
    return True


def _rope_of(model: PreTrainedModel) -> tuple[RopeScaling | None, str]:
    """The RoPE of a model, or why it has none that can be scaled."""
    try:
        rope = current_rope(model.config)
    except ValueError as error:
        return None, str(error)
    if rotary_modules(model):
        return rope, ""
    # Granite hybrids may have the parameters and no positions.
    return None, f"{type(model).__name__} has no rotary module: there is no RoPE to scale."


def _group_size(
    found: ModelCheck, config: Any, native: int | None, target_length: int | None, attention: S2AttentionConfig
) -> None:
    if found.reaches:
        reached = found.reaches[1][0][1] if len(found.reaches[1]) == 1 else None
    else:
        reached = getattr(config.get_text_config(), "max_position_embeddings", None)
    found.length = target_length or reached
    if found.length is not None:
        found.attention = attention.resolved(found.length, native)


# --------------------------------------------------------------------------------------------------------------------
# One forward on the meta device


class _Probe:
    """Stands for the attention of a model, and notes what the layers of its language model ask for in training."""

    def __init__(self, model: PreTrainedModel, found: ModelCheck) -> None:
        self.found = found
        self.names = {id(module): name for name, module in language_modules(model)}
        self.calls: list[Layer] = []
        self.untold: set[str] = set()
        """Classes of layers that aren't told where documents end."""

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: S2Mask | torch.Tensor | None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if id(module) in self.names:
            causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
            alone = left_alone(module, query, key, attention_mask, causal, kwargs.get("sliding_window"))
            if "cu_seq_lens_q" not in kwargs:
                self.untold.add(type(module).__name__)
            try:
                refuse_unknown(module, kwargs)
                if alone is None:
                    refuse_sparse(module, kwargs)
            except ValueError as error:
                self.found.refuse(error)
            asked = (("softcap", "softcap"), ("learned_sinks", "s_aux"))
            needs = tuple(what for what, name in asked if kwargs.get(name) is not None)
            self.calls.append(Layer(self.names[id(module)], query.shape[1], key.shape[1], alone, needs))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _run(model: PreTrainedModel, found: ModelCheck) -> None:
    """The layers of the language model, as they call for attention in training."""
    rotary: Any
    for rotary in rotary_modules(model):  # dynamic and longrope look how long the text is; the shapes are the same
        kinds = getattr(rotary, "rope_type", None)
        rotary.rope_type = dict.fromkeys(kinds, "default") if isinstance(kinds, dict) else "default"
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    probe = _Probe(model, found)
    # Some families read the values of the mask, some those of the positions: one of these three works for each.
    masks = (torch.ones(1, _TOKENS, dtype=torch.long), torch.ones_like(ids), None)
    with _registered(model, probe), torch.no_grad():
        for attempt, mask in enumerate(masks, start=1):
            try:
                model.train()(input_ids=ids, attention_mask=mask, use_cache=False, cu_seq_lens_q=None)
                break
            except Exception as error:  # whatever a family's code does with tensors that have no numbers
                probe.calls.clear()
                if str(error).startswith(READS_MASK):
                    found.refuse(f"{found.model_class}: {error}")
                    break
                if attempt == len(masks):
                    found.notes.append(
                        f"The forward of {found.model_class} can't be followed without numbers ({error}), so that its "
                        "layers are not listed: run a training step of a tiny model of the family."
                    )
    if probe.untold and found.window is not None:
        found.window = None
        found.notes.append(
            f"No steps in windows: {', '.join(sorted(probe.untold))} doesn't get `cu_seq_lens_q`, and would not see "
            'where they end. Train it with sparse="s2".'
        )
    found.layers = list(dict.fromkeys(probe.calls))  # some models go through a layer more than once
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if probe.calls and isinstance(total, int):
        found.other_layers = max(0, total - len(probe.calls))


@contextmanager
def _registered(model: PreTrainedModel, probe: Callable[..., Any]) -> Iterator[None]:
    """Have the model call `probe` for attention."""
    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, s2_mask)
    try:
        model.set_attn_implementation(_PROBE)
        if model._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # the default looks at which experts were chosen
        yield
    finally:
        AttentionInterface._global_mapping.pop(_PROBE, None)
        AttentionMaskInterface._global_mapping.pop(_PROBE, None)


def _judge(found: ModelCheck, config: Any) -> None:
    """What follows from the layers and from RoPE."""
    if found.layers and not found.sparse:
        reasons = ", ".join(sorted({str(layer.left_alone) for layer in found.layers}))
        found.notes.append(
            f"no layer would be sparse ({reasons}), and training would be as without this package. A model "
            "whose config has a sliding_window can be loaded with sliding_window=None."
        )
    needs = {need for layer in found.sparse for need in layer.needs}
    if needs:
        able = [name for name, kernel in KERNELS.items() if needs <= set(kernel.options)]
        found.notes.append(
            f"{' and '.join(OPTIONS[name] for name in sorted(needs))}: train with one of the kernels "
            f"{', '.join(able)}; dense attention is the family's own eager one, in blocks of queries."
        )
    if found.attention is not None and found.length is not None:
        words = found.attention.dense_at(found.length)
        found.notes += [] if words is None else [words]
    if found.rope is None:
        return
    before, after = found.rope
    if len(found.reaches[0]) > 1:
        first, second = (original for original, _ in found.reaches[0])
        found.notes.append(
            "the config doesn't say whether its max_position_embeddings counts the factor of its linear RoPE; its "
            f"publisher does. To extend it, and to have groups of its native window, pass base_length: {first} or "
            f"{second}."
        )
    if before != after and after.rope_type == "dynamic":
        found.notes.append(
            "dynamic RoPE: vLLM doesn't scale it by itself; `merge` says what --hf-overrides it needs, by which short "
            "text has the frequencies of the full length, too. transformers has those of the text's own length."
        )
    if after.rope_type == "longrope" and after.original_max_position_embeddings is not None:
        found.notes.append(
            f"vLLM serves {after.original_max_position_embeddings:,} tokens of a longrope model unless it is given "
            f"--max-model-len {after.length}."
        )
