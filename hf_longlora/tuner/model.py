"""LongLoRA as a PEFT tuner: LoRA's, with norms, embeddings and RoPE resolved when an adapter is put on a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from .. import rope
from ..modules import is_norm, output_head, walk
from ..rope import RopeScaling
from . import masters
from .base_rope import (
    find_rope_of_base,
    follow,
    forget,
    put_rope,
    refuse_other_rope,
    remember,
    resolve_rope,
    rope_of_base,
    unfollow,
    warn_of_reference,
)
from .config import LongLoraConfig, check_finite
from .merging import (
    adapters_to_merge,
    changes_base,
    merged_adapters,
    part_from_head,
    refuse_repacked,
    under_others,
    warn_of_changed_base,
)
from .resolve import refuse_offloaded, resolve_modules, tie_by_module
from .stored import check_fit, check_tokens, refuse_foreign_rope
from .undo import undone_if_refused, undone_on_failure


class LongLoraModel(LoraModel):
    """Puts LongLoRA adapters on a model.

    Everything is resolved in `inject_adapter`: `get_peft_model`, `add_adapter`, loading through PEFT and transformers'
    `model.load_adapter` all pass there. What can fail is checked before the model is touched.
    """

    # Class-level defaults: BaseTuner.__init__ injects before a subclass could set anything.
    _adapters_off = False
    _with_masters: frozenset[str] = frozenset()  # adapters whose weights are to be fp32 in training

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "the model has an adapter already, whose LoRA get_peft_model would write over. To train that one "
                "further, load it by PeftModel.from_pretrained(base, adapter, is_trainable=True); for one on top of "
                "it, merge it first (merge_and_unload); for one beside it, call add_adapter."
            )
        super().__init__(model, *args, **kwargs)

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
            ValueError: the head is targeted, biases would be trained in bf16 or fp16, what the adapter is put on is
                offloaded, the base has another RoPE than the adapter was trained on, or another adapter on the model
                has another RoPE.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, LongLoraConfig):
            raise TypeError(f"LongLoraModel needs a LongLoraConfig, got {type(config).__name__}.")
        with undone_on_failure(model, self.peft_config, adapter_name) as undo:
            resolve_modules(model, config)
            refuse_offloaded(model, config, first=len(self.peft_config) == 1)
            resolve_rope(model, config)
            refuse_other_rope(self.peft_config, config.rope, adapter_name)
            check_tokens(model, config)
            if not config.inference_mode:
                masters.refuse_biases(model, config.bias)
            if changes_base(config):
                targeted = [m for n, m in walk(model) if self._check_target_module_exists(config, n)]
                undo.weights += [(p, p.detach().clone()) for m in targeted for p in m.parameters()]
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            self._tie(adapter_name)
            if config.stored_shapes is not None:
                check_fit(self, adapter_name, vars(config).pop("_stored_shapes"))
            if config.rope is not None:
                remember(model, config.base_length)
            stored, config.resolved = config.resolved, True
            self._sync_rope()
            follow(model, adapter_name, dora=stored and config.use_dora)

    def _check_tied_modules(self, model: nn.Module, peft_config: LongLoraConfig) -> None:
        if not tie_by_module(model, peft_config):
            super()._check_tied_modules(model, peft_config)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's. Adapters with norms or embeddings of their own have to be active."""
        names = adapters_to_merge(self, adapter_names)
        if under_others(self, names):
            raise ValueError(
                f"merge_adapter would merge the LoRA of {', '.join(names)} under the norms and embeddings of the "
                f"active adapter, {', '.join(self.active_adapters)}. Call set_adapter first, or merge_and_unload."
            )
        refuse_repacked(self.model)
        part_from_head(self.model)
        super().merge_adapter(adapter_names, safe_merge)

    def _tie(self, adapter_name: str) -> None:
        tied = getattr(self.peft_config[adapter_name], "modules_to_tie", None) or ()
        for name in tied:
            embedding = self.model.get_input_embeddings().modules_to_save[adapter_name]
            # Over PEFT's copy, which shares the parameter only until someone assigns the embedding another.
            self.model.get_submodule(name).modules_to_save[adapter_name] = masters.TiedHead(embedding)
        head = output_head(self.model)
        if isinstance(head, TrainableTokensWrapper) and getattr(head.original_module, "bias", None) is None:
            vars(head)["bias"] = None  # fused losses ask for weight and bias, and the wrapper has the weight only

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As the model's own. A head that an adapter has a copy of is tied already, and has no weight to assign to.

        lm-eval calls it on each model that it gets.
        """
        if not isinstance(output_head(self.model), AuxiliaryTrainingWrapper):
            self.model.tie_weights(*args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As PEFT's, but weights that don't fit are refused before any is loaded (torch loads what it can)."""
        if not vars(config).pop("_weights_due", False):
            refuse_foreign_rope(model, config, adapter_name)
        state: Any = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        with undone_if_refused(model, adapter_name):
            for key, tensor in state.items():
                if key in own and own[key].shape != tensor.shape:
                    raise ValueError(
                        f"the weights don't fit the adapter {adapter_name!r}: {key} has shape {tuple(tensor.shape)} "
                        f"there and {tuple(own[key].shape)} here."
                    )
            check_finite(state, "the adapter's file")
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
        """The RoPE of the base model, whatever an adapter has made of it; None if it has none that can be read."""
        return find_rope_of_base(self.model)

    def _sync_rope(self) -> None:
        """Put on the model what its active adapters need: theirs, or the base's without any."""
        put_rope(self.model, self.peft_config, [] if self._adapters_off else self.active_adapters)

    def set_rope(self, scaling: RopeScaling | dict[str, Any] | None = None, adapter_name: str | None = None) -> None:
        """Give an adapter (the active one by default) another RoPE, on the live model and in its config.

        `None` is the base's. RoPE types whose modules remember the lengths they have seen are re-initialised even if
        nothing changes: what a step computes then depends on that step alone.

        Raises:
            ValueError: the model doesn't take it, or another adapter on it has another one. Nothing has changed then.
        """
        name = adapter_name or self.active_adapters[0]
        config: Any = self.peft_config[name]
        base = rope_of_base(self.model)
        if isinstance(scaling, dict):
            scaling = RopeScaling.from_dict(scaling)
        if scaling is None:
            scaling = base
        stored = None if scaling == base else scaling.to_dict()
        refuse_other_rope(self.peft_config, stored, name)
        before = rope.current_rope(self.model.config)
        previous = config.rope, config.base_rope
        config.rope, config.base_rope = stored, base.to_dict()
        remember(self.model, config.base_length)
        try:
            self._sync_rope()
        except Exception:
            config.rope, config.base_rope = previous
            raise
        # What a person reads in adapter_config.json says the same.
        config.target_length = None if stored is None else scaling.length
        named = rope.type_over(scaling, base)
        if named in rope.ROPE_TYPES:
            config.rope_type = named
        if rope.current_rope(self.model.config) == before:
            rope.forget_lengths(self.model)

    # -- switching and taking off ----------------------------------------------------------------------------------

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._adapters_off = not enabled
        self._sync_rope()
        if not enabled:
            warn_of_changed_base(self.peft_config)
            warn_of_reference(self.model, self.peft_config)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._sync_rope()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._with_masters -= {adapter_name}
        self._sync_rope()
        if not self.peft_config:
            forget(self.model)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            names = adapters_to_merge(self, adapter_names)
            refuse_repacked(self.model)
            if under_others(self, names):
                self.set_adapter(names)
        elif merged_adapters(self.model):
            self.unmerge_adapter()
        for name, wrapper, module in list(self._copies()):
            masters.demote(module, masters.base_dtype(wrapper.original_module))
            if isinstance(module, masters.TiedHead):
                wrapper.modules_to_save[name] = module.to_linear()
        self._adapters_off = not merge
        if merge:
            part_from_head(self.model)
        else:
            warn_of_changed_base(self.peft_config)
            # PEFT hands back the trained copies even then; what was asked for is the base.
            for module in self.model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    module.set_adapter([])
        self._sync_rope()
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        forget(self.model)
        return model

    # -- fp32 masters ----------------------------------------------------------------------------------------------

    def _copies(self, adapter_name: str | None = None) -> Iterator[tuple[str, ModulesToSaveWrapper, nn.Module]]:
        for wrapper in self.model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                for name, module in wrapper.modules_to_save.items():
                    if adapter_name in (None, name):
                        yield name, wrapper, module

    def parts(self, adapter_name: str | None = None) -> dict[str, list[nn.Parameter]]:
        """The weights of an adapter (the active one by default) as its config names them: LoRA, norms, embeddings."""
        adapter = adapter_name or self.active_adapters[0]
        found: dict[str, list[nn.Parameter]] = {"LoRA": [], "norms": [], "embeddings": []}
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                embeds = isinstance(layer.get_base_layer(), nn.Embedding) or isinstance(layer, TrainableTokensLayer)
                found["embeddings" if embeds else "LoRA"] += masters.adapter_parameters(layer, adapter)
        for _, _, module in self._copies(adapter):
            if is_norm(module) or isinstance(module, nn.Embedding):
                found["norms" if is_norm(module) else "embeddings"] += module.parameters()
        return found

    def frozen_parts(self) -> list[str]:
        """The parts that the active adapter's config names and of which no weight is trainable."""
        config: Any = self.peft_config[self.active_adapters[0]]
        left = {"norms": not config.train_norms, "embeddings": not config.train_embeddings}
        return [
            part
            for part, parameters in self.parts().items()
            if parameters and not left.get(part) and not any(p.requires_grad for p in parameters)
        ]

    def upcast_masters(self, adapter_name: str | None = None) -> None:
        """Make fp32 masters of all that is trained. Call it again if something has cast the weights down."""
        for name in self._with_masters if adapter_name is None else (adapter_name,):
            masters.upcast(self._trained(name))
            for _, wrapper, module in self._copies(name):
                masters.promote(module, wrapper.original_module)

    def _trained(self, adapter_name: str) -> Iterator[nn.Parameter]:
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                yield from masters.adapter_parameters(layer, adapter_name)
            elif isinstance(layer, ModulesToSaveWrapper) and adapter_name in layer.modules_to_save:
                yield from layer.modules_to_save[adapter_name].parameters()

    def train(self, mode: bool = True) -> LongLoraModel:
        """As any module's. All that the adapter trains is fp32 afterwards, even if something has cast it down before.

        Raises:
            RuntimeError: something has, and several processes train.
        """
        super().train(mode)
        low = [p for name in self._with_masters for p in self._trained(name) if masters.is_low(p)] if mode else []
        if low and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # DDP would lose its hooks on these parameters, each process train for itself, and none say a word of it.
            raise RuntimeError(
                f"What the adapter trains has been cast to {low[0].dtype}, in which small steps round away: TRL's "
                "trainers do that on a quantized base. It must be cast back before DDP or FSDP takes it over: call "
                "trainer.model.base_model.upcast_masters() before trainer.train(), or use LongLoraSFTTrainer."
            )
        if low:
            self.upcast_masters()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> LongLoraModel:
        """As any module's. A cast to bf16 or fp16 leaves RoPE's frequencies in fp32, as `from_pretrained` does."""
        super()._apply(fn, recurse)
        if find_rope_of_base(self.model) is not None:
            rope.restore_frequencies(self.model)
        return self

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT calls this after an adapter is added, and again after its weights are loaded. Only a PeftModel does, and
        # it tells the tuner of every switch.
        unfollow(self.model)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype and not self.peft_config[adapter_name].inference_mode:
            self._with_masters |= {adapter_name}
            self.upcast_masters(adapter_name)
            return
        self._with_masters -= {adapter_name}
        for _, wrapper, module in self._copies(adapter_name):
            masters.demote(module, masters.base_dtype(wrapper.original_module))


def longlora_tuner(model: nn.Module) -> LongLoraModel | None:
    """The tuner of a model with a LONGLORA adapter; `None` of any other."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, LongLoraModel) else None
