"""Other weights and another RoPE for an adapter that is on a model already."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from .base_rope import refuse_other_base
from .config import LongLoraConfig
from .merging import merged_adapters
from .model import longlora_tuner
from .stored import check_fit, differences, rope_seen_to


def hotswap_adapter(model: PeftModel, model_id: str, adapter_name: str = "default", **kwargs: Any) -> None:
    """Put the weights and the RoPE of the adapter in `model_id` in the place of `adapter_name`'s, in place.

    For a server or an evaluation that follows a run's checkpoints. PEFT's `hotswap_adapter` takes peft_type LORA
    alone, and its `load_adapter` under a name that is taken leaves the RoPE as it is, so that another one is refused
    there. No module and no parameter is replaced; a failure leaves the model as it was.

    Args:
        model: A model with a LONGLORA adapter.
        model_id: A folder or a Hub id.
        adapter_name: The adapter whose place it takes, and whose name it goes by.
        kwargs: For the download, as `PeftModel.load_adapter` takes them (`revision`, `subfolder`, `token`, ...).

    Raises:
        ValueError: there is no such adapter or it is merged, the two differ in rank, scaling or trained modules, the
            new one doesn't fit the base, or it has another RoPE than a second adapter on the model.
    """
    tuner = longlora_tuner(model)
    if tuner is None or adapter_name not in model.peft_config:
        raise ValueError(f"the model has no LONGLORA adapter {adapter_name!r} to be swapped.")
    if adapter_name in merged_adapters(tuner.model):
        raise ValueError(f"adapter {adapter_name!r} is merged into the base; call unmerge_adapter() first.")
    own: Any = model.peft_config[adapter_name]
    new: Any = LongLoraConfig.from_pretrained(model_id, **kwargs)
    differing = differences(new, own, rope=False)
    if differing:
        raise ValueError(
            f"{model_id} can't take the place of {adapter_name!r}: {'; '.join(differing)}. Load it under a name of "
            "its own (load_adapter)."
        )
    before = own.rope
    check_fit(tuner, adapter_name, new.stored_shapes or {})
    if tuner.base_rope is not None:
        refuse_other_base(new, tuner.base_rope)
    if new.base_rope is not None or tuner.base_rope is not None:
        tuner.set_rope(new.rope, adapter_name)
    try:
        with rope_seen_to():
            model.load_adapter(model_id, adapter_name, is_trainable=not own.inference_mode, **kwargs)
    except ValueError:
        if tuner.base_rope is not None:
            tuner.set_rope(before, adapter_name)
        raise
    own.schedule = new.schedule
