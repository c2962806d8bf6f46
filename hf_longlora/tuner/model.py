"""LongLoRA as a PEFT tuner: LoRA's, with norms, embeddings and RoPE resolved when an adapter is put on a model."""

from __future__ import annotations

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from .. import rope
from ..rope import RopeScaling
from . import masters
from .config import LongLoraConfig, check_finite, refuse_head
from .modules import attention_projections, is_norm, language_modules, walk
from .stored import check_fit

# On the base model, so that it outlives the tuner: transformers' own `load_adapter` builds one per adapter.
_BASE_ROPE = "_longlora_base_rope"
_FOLLOWER = "_longlora_follower"
_TRANSFORMERS_KEEPS_ALL = Version(transformers.__version__) >= Version("5.18")


class LongLoraModel(LoraModel):
    """Puts LongLoRA adapters on a model.

    Everything is resolved in `inject_adapter`: `get_peft_model`, `add_adapter`, loading through PEFT and transformers'
    `model.load_adapter` all pass there. What can fail is checked before the model is touched.
    """

    # Class-level defaults: BaseTuner.__init__ injects before a subclass could set anything.
    _adapters_off = False
    _save_state: masters.SaveState | None = None

    # -- putting an adapter on -------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As PEFT's, with modules and RoPE resolved first. A failure leaves the model and its RoPE as they were.

        Raises:
            ValueError: the head is targeted, the base has another RoPE than the adapter was trained on, or another
                adapter on the model has another RoPE.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, LongLoraConfig):
            raise TypeError(f"LongLoraModel needs a LongLoraConfig, got {type(config).__name__}.")
        before = copy.deepcopy(vars(config))
        children = [(module, dict(module._modules)) for module in model.modules()]
        trainable = [(p, p.requires_grad) for p in model.parameters()]
        weights: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            self._resolve_modules(model, config)
            self._resolve_rope(model, config, adapter_name)
            self._check_ranks(config)
            if _changes_base(config):
                targeted = [m for n, m in walk(model) if self._check_target_module_exists(config, n)]
                weights = [(p, p.detach().clone()) for m in targeted for p in m.parameters()]
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            self._tie(adapter_name)
            stored = vars(config).pop("_stored_shapes", None)
            if stored is not None:
                check_fit(self, adapter_name, stored)
            if config.rope is not None and getattr(model, _BASE_ROPE, None) is None:
                setattr(model, _BASE_ROPE, rope.current_rope(model.config))
            config.resolved = True
            self._sync_rope()
            if (config.rope is not None or not _TRANSFORMERS_KEEPS_ALL) and not hasattr(model, _FOLLOWER):
                setattr(model, _FOLLOWER, model.register_forward_pre_hook(_follow_layers))
        except Exception as error:
            for module, modules in children:
                module._modules.clear()
                module._modules.update(modules)
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module._adapters.discard(adapter_name)
            for parameter, weight in weights:
                parameter.data.copy_(weight)
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)
            vars(config).clear()
            vars(config).update(before)
            self.peft_config.pop(adapter_name, None)
            if not self.peft_config:
                _forget(model)
            from_file = "_stored_shapes" in before
            if from_file and not isinstance(error, (ImportError, ValueError, torch.OutOfMemoryError)):
                raise ValueError(
                    f"the adapter_config.json does not go with this model ({type(error).__name__}: {error}). It is "
                    "damaged, or of another version of PEFT."
                ) from error
            raise

    def _resolve_modules(self, model: nn.Module, config: LongLoraConfig) -> None:
        if config.target_modules is None and not config.target_parameters:
            found: Any = attention_projections(model) or None
            config.target_modules = found
        if config.embedding_rank is not None and not config.resolved:
            self._target_embeddings(model, config, config.embedding_rank)
        get_head: Any = getattr(model, "get_output_embeddings", None)
        head = get_head() if get_head is not None else None
        if config.target_modules is not None:
            for name, module in walk(model):
                if head is not None and module is head and self._check_target_module_exists(config, name):
                    refuse_head(name)
        if config.resolved:
            return
        wanted = list(config.modules_to_save or [])
        users = tuple(wanted)
        train_embeddings = config.train_embeddings and config.trainable_token_indices is None
        inside: list[str] = []  # names that are trained already, by LoRA or with a module the user named
        for name, module in language_modules(model):
            if name and name.startswith(tuple(f"{taken}." for taken in inside)):
                continue
            targeted = config.target_modules is not None and self._check_target_module_exists(config, name)
            if name and (targeted or (users and name.endswith(users))):
                inside.append(name)
                continue
            if not name:
                continue
            if (config.train_norms and is_norm(module)) or (train_embeddings and isinstance(module, nn.Embedding)):
                wanted.append(name)
        config.modules_to_save = wanted or None

    def _check_ranks(self, config: LongLoraConfig) -> None:
        """Refuse ranks that a file's weights don't have, before memory is taken for them."""
        stored = vars(config).get("_stored_shapes")
        if stored is None:
            return
        pattern: Any = config.rank_pattern
        ranks = [config.r, *(pattern.values() if isinstance(pattern, dict) else ())]
        widest = max((size for shape in stored.values() for size in shape), default=0)
        most = max((shape[0] for key, shape in stored.items() if ".lora_" in key and "_A" in key), default=widest)
        if any(type(rank) is not int or not 0 < rank <= (widest if pattern else most) for rank in ranks):
            raise ValueError(
                f"the ranks of adapter_config.json (r={config.r!r}, rank_pattern={pattern!r}) are not those of the "
                f"weights, which have {most} at most."
            )

    def _target_embeddings(self, model: nn.Module, config: LongLoraConfig, rank: int) -> None:
        """Add the embeddings to what LoRA targets, with a rank of their own and the others' scaling."""
        _maybe_include_all_linear_layers(config, model)
        names = [name for name, module in language_modules(model) if isinstance(module, nn.Embedding)]
        ratio = rank / config.r
        alpha = config.lora_alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
        targets: Any = config.target_modules
        if isinstance(targets, str):
            targets = "|".join([f"({targets})", *map(re.escape, names)])
        else:
            targets = {*(targets or ()), *names}
        config.target_modules = targets
        config.rank_pattern = {**(config.rank_pattern or {}), **dict.fromkeys(names, rank)}
        config.alpha_pattern = {**(config.alpha_pattern or {}), **dict.fromkeys(names, alpha)}
        missed = [name for name in names if not self._check_target_module_exists(config, name)]
        if missed:
            raise ValueError(
                f"embedding_rank can't reach {missed[0]}, which exclude_modules leaves out. Leave one of them away."
            )

    def _check_tied_modules(self, model: nn.Module, peft_config: LongLoraConfig) -> None:
        """PEFT ties by the names embed_tokens and lm_head only; this goes by what is the input embedding."""
        saved = tuple(peft_config.modules_to_save or ())
        get_embedding: Any = getattr(model, "get_input_embeddings", None)
        inside = re.compile(r"\.(modules_to_save\.[^.]+|original_module)$")
        embedding: Any = get_embedding() if get_embedding is not None else None
        if isinstance(embedding, AuxiliaryTrainingWrapper):
            embedding = embedding.original_module
        elif isinstance(embedding, BaseTunerLayer):
            embedding = embedding.get_base_layer()
        name = next((n for n, m in walk(model) if embedding is not None and m is embedding), None)
        targeted = name is not None and self._check_target_module_exists(peft_config, name)
        if name is None or not (targeted or name.endswith(saved)):
            return super()._check_tied_modules(model, peft_config)
        # PEFT finds what is tied by names only, and nothing on a model that has an adapter; modules tell at any time.
        tied = set(self._get_module_names_tied_with_embedding())
        tied = {inside.sub("", n) for n in tied}
        tied |= {n for n, m in walk(model) if m._parameters.get("weight") is embedding.weight}
        tied.discard(name)
        if tied and targeted:
            # PEFT would warn that a merge changes the head too; `_part_from_head` sees to it that it doesn't.
            if peft_config.ensure_weight_tying:
                refuse_head(f"{sorted(tied)[0]} by ensure_weight_tying")
        elif tied:
            peft_config.ensure_weight_tying = True
            peft_config.modules_to_tie = tied
            peft_config.target_modules_to_tie = None
            peft_config.modules_to_save = [m for m in saved if not any(t.endswith(m) for t in tied)]

    def _part_from_head(self) -> None:
        """Give an embedding that LoRA is about to be merged into weights of its own, apart from a head tied to it."""
        get_embedding: Any = getattr(self.model, "get_input_embeddings", None)
        get_head: Any = getattr(self.model, "get_output_embeddings", None)
        embedding = get_embedding() if get_embedding is not None else None
        head = get_head() if get_head is not None else None
        if isinstance(embedding, LoraLayer) and head is not None:
            base: Any = embedding.get_base_layer()
            if base.weight is head.weight:
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)

    def _refuse_repacked(self) -> None:
        """bitsandbytes repacks 4-bit weights for some CPUs when they first evaluate, and PEFT then reads them wrongly.

        Seen with bitsandbytes 0.50.2 and PEFT 0.21.2, on a CPU with AVX512-BF16.
        """
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                state = getattr(getattr(module.get_base_layer(), "weight", None), "quant_state", None)
                if getattr(state, "packing_format_for_cpu", False):
                    raise RuntimeError(
                        "bitsandbytes has repacked the 4-bit weights for this CPU, and a merge would garble them. "
                        "Load the adapter on the base without quantization and merge there (it is more exact, too)."
                    )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_repacked()
        self._part_from_head()
        super().merge_adapter(*args, **kwargs)

    def _tie(self, adapter_name: str) -> None:
        tied = getattr(self.peft_config[adapter_name], "modules_to_tie", None) or ()
        for name in tied:
            embedding = self.model.get_input_embeddings().modules_to_save[adapter_name]
            # Over PEFT's copy, which shares the parameter only until someone assigns the embedding another.
            self.model.get_submodule(name).modules_to_save[adapter_name] = masters.TiedHead(embedding)
        get_head: Any = getattr(self.model, "get_output_embeddings", None)
        head: Any = get_head() if get_head is not None else None
        if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
            vars(head)["bias"] = None  # fused losses ask for weight and bias, and the wrapper has the weight only

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As PEFT's; weights that can't be loaded are refused before any is (torch loads what it can)."""
        state: Any = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        for key, tensor in state.items():
            if key in own and own[key].shape != tensor.shape:
                raise ValueError(
                    f"the weights don't fit the adapter {adapter_name!r}: {key} has shape {tuple(tensor.shape)} there "
                    f"and {tuple(own[key].shape)} here."
                )
            check_finite(key, tensor, "the adapter's weights")
        return state

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: Any, peft_config: Any, path: str, output_state_dict: Any, kwargs: dict[str, Any]
    ) -> Any:
        """PiSSA and its like as plain LoRA. PEFT does it for peft_type LORA alone, and drops what is not LoRA's."""
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        lora = super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, output_state_dict, kwargs)
        return {k: v for k, v in output_state_dict.items() if "lora_" not in k} | lora

    # -- RoPE ------------------------------------------------------------------------------------------------------

    @property
    def base_rope(self) -> RopeScaling | None:
        """The RoPE of the base model, whatever an adapter has made of it; None if the model has none."""
        snapshot = getattr(self.model, _BASE_ROPE, None)
        if snapshot is not None:
            return snapshot
        config = getattr(self.model, "config", None)
        return rope.current_rope(config) if _has_rope(config) else None

    def _resolve_rope(self, model: nn.Module, config: LongLoraConfig, adapter_name: str) -> None:
        if config.rope is not None or config.base_rope is not None:
            base = self._base_of(model)
            if config.base_rope is not None and RopeScaling.from_dict(config.base_rope) != base:
                raise ValueError(
                    "this adapter was trained on a base with another RoPE: "
                    f"{config.base_rope['rope_parameters']} at {config.base_rope['max_position_embeddings']} tokens, "
                    f"but the model has {base.rope_parameters} at {base.max_position_embeddings}. A merged or "
                    "otherwise extended model is no base for it; load the original one. (A config that has been used "
                    "on one model holds that model's RoPE: make a fresh one for another.)"
                )
        elif config.resolved:
            pass  # on a model without RoPE
        elif config.target_length is not None or config.rope_parameters is not None:
            base = self._base_of(model)
            scaling = rope.scaled_rope(
                model.config,
                config.target_length,
                config.rope_type,
                config.rope_parameters,
                config.base_length,
                base=base,
            )
            config.rope, config.base_rope = scaling.to_dict(), base.to_dict()
        else:
            # Nothing to scale; what the adapter is trained on is written down all the same, if it can be read.
            with contextlib.suppress(ValueError, AttributeError):
                config.base_rope = self._base_of(model).to_dict()
        if config.rope is not None and not rope.rotary_modules(model):
            raise ValueError(f"{type(model).__name__} has no rotary module: its RoPE can't be scaled.")
        self._refuse_other_rope(config.rope, adapter_name)

    def _base_of(self, model: nn.Module) -> RopeScaling:
        snapshot = getattr(model, _BASE_ROPE, None)
        return snapshot if snapshot is not None else rope.current_rope(getattr(model, "config", None))

    def _refuse_other_rope(self, wanted: dict[str, Any] | None, adapter_name: str) -> None:
        for name, other in self.peft_config.items():
            if name != adapter_name and getattr(other, "rope", None) != wanted:
                raise ValueError(
                    f"adapter {adapter_name!r} has another RoPE than {name!r}, which is on the model already, and one "
                    "model has one RoPE. Unload the other first, or load this one on a model of its own."
                )

    def _sync_rope(self) -> None:
        """Put on the model what its active adapters need: theirs, or the base's without any."""
        _put_rope(self.model, self.peft_config, [] if self._adapters_off else self.active_adapters)

    def set_rope(
        self,
        scaling: RopeScaling | dict[str, Any] | None = None,
        adapter_name: str | None = None,
        *,
        target_length: int | None = None,
        rope_type: str = rope.AUTO,
        rope_parameters: dict[str, Any] | None = None,
        base_length: int | None = None,
    ) -> RopeScaling:
        """Give an adapter another RoPE, on the live model and in its config, and return it resolved.

        Either a resolved `scaling`, or what `LongLoraConfig` takes; neither means the base's. Always computed from the
        base, so that calling it twice is calling it once. RoPE types whose modules remember the lengths they have seen
        are re-initialised even if nothing changes: what a step computes then depends on that step alone.
        """
        name = adapter_name or self.active_adapters[0]
        config: Any = self.peft_config[name]
        base = self._base_of(self.model)
        if isinstance(scaling, dict):
            scaling = RopeScaling.from_dict(scaling)
        if scaling is None:
            scaling = base
            if target_length is not None or rope_parameters is not None:
                scaling = rope.scaled_rope(
                    self.model.config, target_length, rope_type, rope_parameters, base_length, base=base
                )
        stored = None if scaling == base else scaling.to_dict()
        self._refuse_other_rope(stored, name)
        before = rope.current_rope(self.model.config)
        if getattr(self.model, _BASE_ROPE, None) is None:
            setattr(self.model, _BASE_ROPE, base)
        previous = config.rope, config.base_rope
        config.rope, config.base_rope = stored, base.to_dict()
        try:
            self._sync_rope()
        except Exception:
            config.rope, config.base_rope = previous
            raise
        # What a person reads in adapter_config.json says the same.
        config.target_length = None if stored is None else rope.reach(scaling)[1]
        if scaling.rope_type in rope.ROPE_TYPES:
            config.rope_type = scaling.rope_type
        after = rope.current_rope(self.model.config)
        if after == before and after.rope_type in rope.WITH_HISTORY:
            rope.apply_rope(self.model, after)
        return scaling

    # -- switching and taking off ----------------------------------------------------------------------------------

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._adapters_off = not enabled
        self._sync_rope()
        if not enabled:
            self._warn_of_changed_base()

    def _warn_of_changed_base(self) -> None:
        for name, config in self.peft_config.items():
            if _changes_base(config):
                start = getattr(config, "init_lora_weights", None)
                warnings.warn(
                    f"the start of adapter {name!r} ({start!r}) took a part out of the base's weights: "
                    "what is left without the adapter is not the base. Load the base again to have it.",
                    stacklevel=4,
                )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_rope()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._sync_rope()
        if not self.peft_config:
            _forget(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_repacked()
        for name, wrapper, module in list(self._copies()):
            masters.demote(module, masters.base_dtype(wrapper.original_module))
            if isinstance(module, masters.TiedHead):
                wrapper.modules_to_save[name] = module.to_linear()
        self._adapters_off = not merge
        if merge:
            self._part_from_head()
        else:
            self._warn_of_changed_base()
            # PEFT hands back the trained copies even then; what was asked for is the base.
            for module in self.model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    module.set_adapter([])
        self._sync_rope()
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        _forget(self.model)
        return model

    # -- fp32 masters ----------------------------------------------------------------------------------------------

    def _copies(self, adapter_name: str | None = None) -> Iterator[tuple[str, ModulesToSaveWrapper, nn.Module]]:
        for wrapper in self.model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                for name, module in wrapper.modules_to_save.items():
                    if adapter_name in (None, name):
                        yield name, wrapper, module

    @property
    def save_state(self) -> masters.SaveState:
        if self._save_state is None:
            self._save_state = masters.SaveState()
        return self._save_state

    @property
    def full_precision_state(self) -> bool:
        """Whether state dicts hold masters in fp32 (a run's checkpoints) or in the base's dtype (the default)."""
        return self.save_state.full_precision

    @full_precision_state.setter
    def full_precision_state(self, value: bool) -> None:
        self.save_state.full_precision = value

    def upcast_masters(self, adapter_name: str | None = None) -> None:
        """Make fp32 masters of what is trained whole. Call it again if something has cast the weights down."""
        for _, wrapper, module in self._copies(adapter_name):
            masters.promote(module, masters.base_dtype(wrapper.original_module), self.save_state)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT calls this after an adapter is added, and again after its weights are loaded. Only a PeftModel does, and
        # it tells the tuner of every switch.
        _unfollow(self.model)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype and not self.peft_config[adapter_name].inference_mode:
            self.upcast_masters(adapter_name)
            return
        for _, wrapper, module in self._copies(adapter_name):
            if not masters.is_promoted(module):
                masters.demote(module, masters.base_dtype(wrapper.original_module))


def _changes_base(config: Any) -> bool:
    """Whether LoRA's start takes a part out of the base's weights."""
    start = getattr(config, "init_lora_weights", True)
    taking = isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))
    return taking or getattr(config, "kasa_config", None) is not None


def _put_rope(model: nn.Module, configs: dict[str, Any], active: list[str]) -> None:
    base = getattr(model, _BASE_ROPE, None)
    if base is None:
        return
    wanted = base
    for name in active:
        stored = getattr(configs.get(name), "rope", None)
        wanted = RopeScaling.from_dict(stored) if stored is not None else wanted
    if rope.current_rope(model.config) != wanted:
        rope.apply_rope(model, wanted)


def _follow_layers(model: nn.Module, args: Any) -> None:
    """Before a forward: give the model the RoPE its LoRA layers call for.

    transformers' own `load_adapter` throws the tuner away, and its `disable_adapters`, `set_adapter` and
    `delete_adapter` speak to the layers alone.

    Raises:
        RuntimeError: this transformers has lost part of the adapter.
    """
    if not _TRANSFORMERS_KEEPS_ALL:
        raise RuntimeError(
            f"transformers {transformers.__version__} drops an adapter's norms and embeddings in its own adapter "
            "methods, with no more than a line in the log. Put the adapter on a fresh model by get_peft_model or "
            "PeftModel.from_pretrained, or use transformers 5.18 or newer."
        )
    layer = next((m for m in model.modules() if isinstance(m, LoraLayer)), None)
    active = [] if layer is None or layer.disable_adapters else layer.active_adapters
    _put_rope(model, vars(model).get("peft_config", {}), active)


def _unfollow(model: nn.Module) -> None:
    hook = vars(model).pop(_FOLLOWER, None)
    if hook is not None:
        hook.remove()


def _forget(model: nn.Module) -> None:
    vars(model).pop(_BASE_ROPE, None)
    _unfollow(model)


def _has_rope(config: Any) -> bool:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(config, "rope_parameters", None))
