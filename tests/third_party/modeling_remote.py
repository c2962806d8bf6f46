"""A model whose code comes with it, as TRL's tests of `trust_remote_code` want one (`trl_hub.py`)."""

from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig


RemoteConfig.register_for_auto_class()
RemoteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
