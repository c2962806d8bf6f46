"""One test for each bug that another implementation of LongLoRA has or had.

One stands elsewhere: that the vocabulary is not resized unasked, in `trainer/test_sft_trainer.py`.
"""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from hf_longlora import LongLoraConfig, S2AttentionConfig, s2_attention, set_s2_attention
from hf_longlora.attention.kernels import KERNELS

GROUP = 8


def qkv(batch=1, length=40):
    return [torch.randn(batch, heads, length, 16) for heads in (4, 2, 2)]


def attend(tensors, **kwargs):
    return s2_attention(*tensors, group_size=GROUP, **kwargs)


def test_every_path_is_one_algorithm():
    """Reference repo: with and without flash attention, two different patterns."""
    tensors = qkv()
    outputs = [attend(tensors, kernel=name) for name, kernel in KERNELS.items() if kernel.devices is None]
    assert len(outputs) > 1
    assert all(torch.allclose(outputs[0], other, atol=1e-6) for other in outputs[1:])


def test_the_first_tokens_do_not_see_the_last():
    """Reference repo without flash attention: the sequence is rolled, and its end becomes its beginning's past."""
    tensors = qkv()
    before = attend(tensors)
    for x in tensors:
        x[:, :, -GROUP // 2 :] += 1.0
    assert torch.equal(attend(tensors)[:, :, : -GROUP // 2], before[:, :, : -GROUP // 2])


def test_heads_answer_for_their_own_tokens():
    """LLaMA-Factory: the shift back is computed and thrown away, so shifted heads answer half a group too early."""
    tensors = qkv()
    dense_start = s2_attention(*tensors, group_size=None)
    # Inside the first half group, a shifted head sees what a dense one sees.
    assert torch.allclose(attend(tensors)[:, 2:, : GROUP // 2], dense_start[:, 2:, : GROUP // 2], atol=1e-6)
    before = attend(tensors)
    tensors[2][:, :, 20] += 1.0
    moved = (attend(tensors) - before).abs().sum((0, 3)) > 0
    assert [moved[3, i].item() for i in (19, 20, 27, 28)] == [False, True, True, False]  # shifted: groups end at 28
    assert [moved[0, i].item() for i in (19, 20, 23, 24)] == [False, True, True, False]  # plain: at 24


def test_rows_of_a_batch_do_not_mix():
    """Reference repo: a batch of rows with unequal padding mixes them."""
    tensors = qkv(batch=3)
    mask = torch.ones(3, 40)
    mask[0, 33:], mask[1, :5], mask[2, 11:] = 0, 0, 0
    together = attend(tensors, attention_mask=mask)
    for row, (start, end) in enumerate([(0, 33), (5, 40), (0, 11)]):
        alone = attend([x[row : row + 1, :, start:end] for x in tensors])
        assert torch.allclose(together[row, :, start:end], alone[0], atol=1e-6)


def test_right_padding_is_not_attended():
    """Reference repo without flash attention: pads on the right are seen by the shifted heads."""
    tensors = qkv()
    mask = torch.ones(1, 40)
    mask[:, 30:] = 0
    before = attend(tensors, attention_mask=mask)
    for x in tensors:
        x[:, :, 30:] = 1e4
    assert torch.equal(attend(tensors, attention_mask=mask), before)


def test_padding_of_the_first_group_is_not_that_of_all():
    """ms-swift: the mask of the first group serves every group."""
    tensors = qkv()
    mask = torch.ones(1, 40)
    mask[:, :3] = 0
    alone = attend([x[:, :, 3:] for x in tensors])
    assert torch.allclose(attend(tensors, attention_mask=mask)[:, :, 3:], alone, atol=1e-6)


def test_gpt_neox_is_not_scrambled():
    """Reference repo: the flash path of GPT-NeoX reshapes heads and tokens the wrong way round."""
    config = GPTNeoXConfig(
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    dense = GPTNeoXForCausalLM(config).train()
    model, reference = copy.deepcopy(dense), copy.deepcopy(dense)
    x = torch.randint(0, 128, (2, 40))
    set_s2_attention(model, S2AttentionConfig(group_size=40))
    assert torch.allclose(model(input_ids=x).logits, dense(input_ids=x).logits, atol=1e-5)
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    set_s2_attention(reference, S2AttentionConfig(group_size=GROUP, kernel="reference"))
    assert torch.allclose(model(input_ids=x).logits, reference(input_ids=x).logits, atol=1e-5)


def test_evaluation_is_dense(tiny_llama):
    """Reference repo without flash attention: sparse in evaluation, too."""
    model = tiny_llama().eval()
    x = torch.randint(0, 128, (1, 40))
    expected = model(input_ids=x).logits
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    assert torch.equal(model(input_ids=x).logits, expected)
    assert torch.equal(model.generate(x, max_new_tokens=1, do_sample=False)[0, -1], expected[0, -1].argmax())


def test_the_adapter_is_one_file(tiny_llama, tmp_path):
    """Reference repo: embeddings and norms are written to a second file, and easily lost."""
    model = get_peft_model(tiny_llama(), LongLoraConfig(target_length=256))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == len(trained)
    for part in ("lora_A", "lora_B", "embed_tokens", "input_layernorm", "post_attention_layernorm", "model.norm"):
        assert any(part in name for name in names), part


def test_merging_writes_rope(tiny_llama, tmp_path):
    """Reference repo: the merged model's config has no RoPE scaling."""
    model = get_peft_model(tiny_llama(), LongLoraConfig(target_length=256)).merge_and_unload()
    model.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert config.rope_parameters["rope_theta"] == tiny_llama().config.rope_parameters["rope_theta"] * 4**1.5
    assert config.max_position_embeddings == 256


def test_rope_scaling_is_cumulative(tiny_llama, tmp_path):
    """Reference repo: a 4k base at factor 8, extended to 64k, gets factor 2 and not 16."""
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    base = tiny_llama(max_position_embeddings=4096, rope_parameters=rope)
    with pytest.raises(ValueError, match="base_length=4096 or base_length=512"):  # 4,096 may count the factor
        get_peft_model(base, LongLoraConfig(target_length=65536))
    model = get_peft_model(base, LongLoraConfig(target_length=65536, base_length=4096))
    assert model.config.rope_parameters["factor"] == 16.0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(max_position_embeddings=4096, rope_parameters=rope), str(tmp_path))
    assert again.config.rope_parameters["factor"] == 16.0
    with pytest.raises(ValueError, match="reaches 32768 tokens already"):
        get_peft_model(
            tiny_llama(max_position_embeddings=4096, rope_parameters=rope),
            LongLoraConfig(target_length=32768, base_length=4096),
        )
