"""`attn_implementation="s2attn"` in models of transformers."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import create_causal_mask

from hf_longlora import S2AttentionConfig, s2_attention, s2_attention_mode, set_s2_attention
from hf_longlora.attention import Documents, get_s2_attention, interface, switch
from hf_longlora.attention.reference import reference_kernel
from hf_longlora.modules import attention_modules

from .oracle import Largest, oracle

GROUP = 8


@pytest.fixture
def models(tiny_llama):
    """A model with s2attn and its twin with sdpa."""
    sdpa = tiny_llama()
    s2 = copy.deepcopy(sdpa)
    set_s2_attention(s2, S2AttentionConfig(group_size=GROUP))
    assert sdpa.config._attn_implementation == "sdpa"
    return s2, sdpa


def ids(batch=2, length=37, vocab=128):
    return torch.randint(3, vocab, (batch, length))


def left_padded(batch=2, length=37):
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        mask[row, : 4 * row + 3] = 0
    return mask


def spy(monkeypatch):
    """Record, for each call of the attention core, the group size that it ran with."""
    calls = []
    real = Documents.parts

    def record(documents, heads, kv_heads, group_size, *args):
        calls.append((documents, group_size))
        return real(documents, heads, kv_heads, group_size, *args)

    monkeypatch.setattr(Documents, "parts", record)
    return calls


def test_registered_by_import_and_idempotent():
    assert AttentionInterface._global_mapping["s2attn"] is interface.s2_attention_forward
    interface.register()
    assert AttentionInterface._global_mapping["s2attn"] is interface.s2_attention_forward


def test_all_ways_to_ask_for_it(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2attn")
    made = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="s2attn")
    model.set_attn_implementation("s2attn")
    for each in (loaded, made, model):
        assert each.config._attn_implementation == "s2attn"
        # without set_s2_attention: the default, a quarter of the longest document
        assert get_s2_attention(each).config == S2AttentionConfig()
        each.train()(input_ids=ids(), labels=ids()).loss.backward()


def test_a_saved_model_loads_without_the_package(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    assert "s2" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("mask", [None, left_padded(), left_padded().flip(1)], ids=["none", "left", "right"])
def test_training_is_the_reference_layer_by_layer(models, monkeypatch, mask):
    """Outputs and gradients of the whole model, kernel against the dense-mask reference."""
    model = models[0].train()
    reference = copy.deepcopy(model)
    set_s2_attention(reference, S2AttentionConfig(group_size=GROUP, kernel="reference"))
    x = ids()
    labels = x if mask is None else x.masked_fill(mask == 0, -100)
    losses = [m(input_ids=x, attention_mask=mask, labels=labels).loss for m in (model, reference)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_training_is_sparse_and_inference_dense(models):
    s2, sdpa = models
    x = ids()
    expected = sdpa(input_ids=x).logits
    assert torch.equal(s2.eval()(input_ids=x).logits, expected)
    trained = s2.train()(input_ids=x).logits
    assert torch.allclose(trained[:, : GROUP // 2], expected[:, : GROUP // 2], atol=1e-6)  # inside the first segments
    assert not torch.allclose(trained[:, GROUP:], expected[:, GROUP:], atol=1e-3)


def test_modes(models):
    s2, sdpa = models
    x, mask = ids(), left_padded()
    real = mask.bool()
    expected = sdpa(input_ids=x, attention_mask=mask).logits
    s2.train()
    trained = s2(input_ids=x, attention_mask=mask).logits
    with s2_attention_mode(s2, "dense"):
        assert torch.allclose(s2(input_ids=x, attention_mask=mask).logits[real], expected[real], atol=1e-6)
    s2.eval()
    with s2_attention_mode(s2, "s2"):
        assert torch.allclose(s2(input_ids=x, attention_mask=mask).logits[real], trained[real], atol=1e-6)
    with pytest.raises(RuntimeError, match="inside"), s2_attention_mode(s2, "s2"):
        raise RuntimeError("inside")
    assert torch.equal(s2(input_ids=x, attention_mask=mask).logits, expected)  # restored, after an exception too
    with pytest.raises(ValueError, match="mode"), s2_attention_mode(s2, "sparse"):
        pass
    with pytest.raises(ValueError, match="set_s2_attention"), s2_attention_mode(sdpa, "s2"):
        pass


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_that_of_sdpa(models, cache):
    x, mask = ids(), left_padded()
    options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache)
    for training in (False, True):
        assert torch.equal(*(m.train(training).generate(x, **options) for m in models))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_is_generated_in_training_mode_is_what_dense_attention_thinks(models, cache):
    """As GRPO's rollouts are: the log-probabilities of the tokens when they were drawn, and when they are scored."""
    model = models[0].train()
    x, mask = ids(), left_padded()
    options = dict(max_new_tokens=12, do_sample=False, cache_implementation=cache, return_dict_in_generate=True)
    drawn = model.generate(x, attention_mask=mask, output_logits=True, **options)
    assert torch.equal(drawn.sequences, models[0].eval().generate(x, attention_mask=mask, **options).sequences)
    with_answer = torch.cat([mask, torch.ones(2, 12, dtype=torch.long)], 1)
    logits = torch.stack(drawn.logits, 1).log_softmax(-1)

    def scored(**kwargs):
        found = model(drawn.sequences, attention_mask=with_answer, **kwargs).logits[:, x.shape[1] - 1 : -1]
        return found.log_softmax(-1)

    assert torch.allclose(scored(), logits, atol=1e-5)
    model.train()
    with s2_attention_mode(model, "dense"):
        assert torch.allclose(scored(use_cache=False), logits, atol=1e-5)
    assert not torch.allclose(scored(use_cache=False), logits, atol=1e-3)  # the pattern


@pytest.mark.parametrize(("mode", "times"), [("auto", 1), ("dense", 0), ("s2", 0)])
def test_who_scores_what_the_model_says_is_warned_where_that_is_by_another_attention(models, monkeypatch, mode, times):
    said = []
    monkeypatch.setattr(interface.logger, "warning_once", lambda message: said.append(message) if not said else None)
    model = models[0].train()
    model(ids(), use_cache=True).logits.sum().backward()
    with s2_attention_mode(model, mode):
        model.eval().generate(ids(), max_new_tokens=2)
        assert not said
        model.train().generate(ids(), max_new_tokens=2)
    assert len(said) == times and all("generates in training mode" in message for message in said)


def test_a_module_that_says_nothing_of_causality_is_causal():
    module = torch.nn.Module()
    module.config, module.layer_idx, module.num_key_value_groups = LlamaConfig(max_position_embeddings=64), 0, 2
    query, key, value = (torch.randn(1, heads, 40, 8) for heads in (4, 2, 2))

    def attend(**kwargs):
        return interface.s2_attention_forward(module, query, key, value, None, use_cache=False, **kwargs)[0]

    expected = s2_attention(query, key, value, group_size=10).transpose(1, 2)
    assert torch.allclose(attend(), expected, atol=1e-6)
    both_ways = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(attend(is_causal=False), both_ways, atol=1e-6)
    module.is_causal = False
    assert torch.allclose(attend(), both_ways, atol=1e-6)


def test_a_cache_alone_or_no_gradients_alone_is_training(models, monkeypatch):
    """A training forward with the config's `use_cache` left on; a loss in training mode; a checkpointed layer."""
    model = models[0].train()
    x = ids()
    with_cache = model(x, use_cache=True)
    assert with_cache.past_key_values is not None
    calls = spy(monkeypatch)
    model(x, use_cache=True).logits.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x, use_cache=False).logits, with_cache.logits)
    assert [group for _, group in calls] == [GROUP] * 4
    with torch.no_grad():
        model(x, use_cache=True)
    assert len(calls) == 4
    with s2_attention_mode(model, "s2"), torch.no_grad():  # asked for by name
        model(x, use_cache=True)
    assert len(calls) == 6


def test_a_family_that_does_not_tell_of_its_cache(monkeypatch):
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
    )
    config._attn_implementation = "s2attn"
    model = Gemma3ForCausalLM(config).train()
    x = ids(1)
    with pytest.raises(ValueError, match=r"set_s2_attention\(model\) first"):
        model.generate(x, max_new_tokens=1)
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    calls = spy(monkeypatch)
    expected = copy.deepcopy(model).eval().generate(x, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(x, max_new_tokens=8, do_sample=False), expected) and not calls
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(x).logits.sum().backward()
    assert [group for _, group in calls] == [GROUP] * 4  # forward without gradients, and again with


@pytest.mark.parametrize("family", ["something_else", "gemma3_text"])
def test_a_family_that_is_not_known_to_tell_of_its_cache(tiny_llama, monkeypatch, family):
    """Its layers' `use_cache=False` may be no more than their default (Qwen3-VL's is)."""
    model = tiny_llama()
    model.set_attn_implementation("s2attn")
    model.train()
    x = ids(1)
    with torch.no_grad():
        model(x, use_cache=False)  # Llama's layers mean it
        query = torch.randn(1, 4, 16, 8)
        with pytest.raises(ValueError, match="is not known to tell"):  # and this says nothing
            interface.s2_attention_forward(model.model.layers[0].self_attn, query, query, query, None)
    model.config.model_type = family
    sparse = model(x, use_cache=False).logits
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"is not known to tell .*set_s2_attention\(model\) first"):
            model(x, use_cache=False)
        calls = spy(monkeypatch)
        model(x, use_cache=True)
        assert not calls
        assert torch.equal(model.eval()(x, use_cache=False).logits, model(x, use_cache=True).logits) and not calls
        set_s2_attention(model)
        assert torch.allclose(model.train()(x, use_cache=False).logits, sparse, atol=1e-6) and len(calls) == 2


def test_modes_of_layers_with_states_of_their_own_are_restored(models):
    model = models[0]
    first, second = (module for _, module in attention_modules(model))
    second.s2_attention_state = dataclasses.replace(second.s2_attention_state, mode="s2")
    first.s2_attention_state.mode = "dense"
    with s2_attention_mode(model, "auto"):
        assert {first.s2_attention_state.mode, second.s2_attention_state.mode} == {"auto"}
    assert (first.s2_attention_state.mode, second.s2_attention_state.mode) == ("dense", "s2")


def test_cached_steps_are_dense_even_in_training_mode(models):
    s2, sdpa = models
    x = ids(1, 30)
    s2.train()
    with s2_attention_mode(s2, "dense"):
        cache = s2(input_ids=x[:, :20], use_cache=True).past_key_values
    got = s2(input_ids=x[:, 20:], past_key_values=cache).logits
    assert torch.allclose(got, sdpa(input_ids=x).logits[:, 20:], atol=1e-6)


def test_packing_by_cu_seqlens_by_positions_and_apart_agree(models):
    model = models[0].train()
    lengths = [5, 23, 9]
    x = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    edges = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = model(input_ids=x, position_ids=positions, cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=23)
    by_positions = model(input_ids=x, position_ids=positions, use_cache=False)
    # an all-ones mask and a cache make transformers lose the packing; a kernel of ours must not
    with_mask = model(input_ids=x, position_ids=positions, attention_mask=torch.ones_like(x))
    apart = torch.cat([model(input_ids=part).logits for part in x.split(lengths, dim=1)], dim=1)
    for outputs in (packed, by_positions, with_mask):
        assert torch.allclose(outputs.logits, apart, atol=1e-6)


def test_packed_dense_training_equals_sdpa(models):
    s2, sdpa = models
    x = ids(1, 30)
    positions = torch.cat([torch.arange(n) for n in (11, 19)])[None]
    with s2_attention_mode(s2.train(), "dense"):
        got = s2(input_ids=x, position_ids=positions, use_cache=False).logits
    assert torch.allclose(got, sdpa(input_ids=x, position_ids=positions, use_cache=False).logits, atol=1e-6)


def test_documents_are_found_once_a_forward(models, monkeypatch):
    calls = spy(monkeypatch)
    models[0].train()(input_ids=ids(), attention_mask=left_padded())
    assert len(calls) == 2 and calls[0][0] is calls[1][0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_is_exact(models, use_reentrant, monkeypatch):
    plain = models[0].train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    x, mask = ids(), left_padded()
    calls = spy(monkeypatch)
    for model in (plain, checkpointed):
        model.enable_input_require_grads()
        model(input_ids=x, attention_mask=mask, labels=x, use_cache=False).loss.backward()
    assert {group for _, group in calls} == {GROUP} and len(calls) == 2 + 4  # the recomputation is sparse, too
    for (name, p), q in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name


def test_sliding_layers_stay_as_they_are(monkeypatch):
    config = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    sliding = MistralForCausalLM(MistralConfig(**config, sliding_window=6))
    calls = spy(monkeypatch)
    x, mask = ids(), left_padded()
    expected = sliding.train()(input_ids=x, attention_mask=mask).logits
    loaded = copy.deepcopy(sliding)
    loaded.set_attn_implementation("s2attn")
    loaded.config.model_type = "something_else"  # not known to tell of its cache, which makes no difference here
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=x, attention_mask=mask, use_cache=False).logits, expected, atol=1e-6)
    set_s2_attention(sliding, S2AttentionConfig(group_size=GROUP))
    assert torch.allclose(sliding(input_ids=x, attention_mask=mask).logits, expected, atol=1e-6)
    assert calls == []
    full = MistralForCausalLM(MistralConfig(**config, sliding_window=None))
    set_s2_attention(full)
    full.train()(input_ids=x)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("window", "of_mask", "reach", "length", "alone"),
    [
        (None, None, 64, 40, None),
        (63, None, 64, 40, "a window of 63 tokens"),
        (None, 63, 64, 40, "a window of 63 tokens"),
        (64, None, 64, 40, None),
        (70, None, 64, 80, "a window of 70 tokens"),
        (100, None, None, 40, "a window of 100 tokens"),
    ],
)
def test_which_windows_leave_a_layer_alone(monkeypatch, window, of_mask, reach, length, alone):
    module, query = torch.nn.Module(), torch.randn(1, 2, length, 8)
    module.config = SimpleNamespace(max_position_embeddings=reach)
    mask = interface.s2_mask(1, length, length)
    monkeypatch.setattr(type(mask), "window", of_mask)
    assert interface.left_alone(module, query, query, mask, True, window) == alone


def test_no_square_memory_in_a_padded_training_forward(tiny_llama):
    """No tensor of a padded training step at 16k tokens grows with the square of the length."""
    model = tiny_llama(num_hidden_layers=1, max_position_embeddings=16384)
    set_s2_attention(model, S2AttentionConfig(group_size=512))
    largest = {}
    for length in (4096, 16384):
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :100] = 0
        with Largest() as mode:
            hidden = model.model.train()(input_ids=ids(2, length), attention_mask=mask, use_cache=False)
            hidden.last_hidden_state.sum().backward()
        largest[length] = mode.elements
    assert largest[16384] == 4 * largest[4096]
    assert largest[16384] <= 2 * 16384 * 64  # the MLP's intermediate, not 2 * 16384 ** 2


def test_custom_masks_are_refused_in_training(models):
    model = models[0]
    square = torch.ones(2, 1, 37, 37, dtype=torch.bool).tril()
    x = ids()
    assert torch.equal(model.eval()(input_ids=x, attention_mask=square).logits, models[1](x).logits)
    with pytest.raises(ValueError, match="custom attention mask"):
        model.train()(input_ids=ids(), attention_mask=square)
    # a mask function that transformers composes: blocks that see each other both ways
    x = torch.zeros(1, 16, 32)
    blocks = torch.tensor([[-1] * 4 + [0] * 4 + [-1] * 8])
    mask = create_causal_mask(model.config, x, None, None, block_sequence_ids=blocks)
    attention = model.model.layers[0].self_attn
    rope = model.model.rotary_emb(x, torch.arange(16)[None])
    with pytest.raises(ValueError, match="custom attention mask"):
        attention(x, rope, mask)


@pytest.mark.parametrize("training", [True, False])
def test_attention_weights_are_not_given_and_it_is_said(models, monkeypatch, training):
    said = []
    monkeypatch.setattr(interface.logger, "warning_once", said.append)
    assert not models[0].train(training)(ids(), output_attentions=True).attentions
    assert said and all("`output_attentions=True`" in words for words in said)


def test_what_no_kernel_honours_is_refused(models):
    model = models[0].train()
    q = torch.randn(1, 4, 16, 8)
    kv = torch.randn(1, 2, 16, 8)
    module = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="softcap"):
        interface.s2_attention_forward(module, q, kv, kv, None, softcap=30.0)
    with pytest.raises(ValueError, match="sinks"):
        interface.s2_attention_forward(module, q, kv, kv, None, s_aux=torch.zeros(4))
    for dropped in ({"softcap": 30.0}, {"s_aux": torch.zeros(4)}):  # Llama's own attention has neither
        with pytest.raises(ValueError, match=r"softcap|sinks"):
            interface.s2_attention_forward(module.eval(), q, kv, kv, None, **dropped)
    with pytest.raises(ValueError, match="indices"):
        interface.s2_attention_forward(module, q, kv, kv, None, indices=torch.zeros(1))
    mask = interface.s2_mask(1, 16, 16)
    with pytest.raises(ValueError, match="attends to 20 keys"):
        interface.s2_attention_forward(module, q, torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8), mask)
    with pytest.raises(ValueError, match="position bias"):
        interface.s2_attention_forward(module.train(), q, kv, kv, None, position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="2-D"):
        interface.s2_attention_forward(module, q, kv, kv, None, position_ids=torch.zeros(3, 1, 16))
    set_s2_attention(model, S2AttentionConfig(group_size=4, kernel="reference"))
    out, _ = interface.s2_attention_forward(module, q, kv, kv, None, softcap=30.0, s_aux=torch.zeros(4))
    plain = Documents.find(1, 16).parts(2, 1, 4, "none", sink_tokens=4)
    half = reference_kernel(q[:, :2], kv[:, :1], kv[:, :1], plain, softcap=30.0, learned_sinks=torch.zeros(2))
    assert torch.equal(out[:, :, :2], half)


def test_attention_dropout_runs_in_training_only(tiny_llama):
    model = tiny_llama(attention_dropout=0.5)
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    x = ids()
    first, second = (model.train()(input_ids=x).logits for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    with s2_attention_mode(model, "s2"):
        assert torch.equal(*(model(input_ids=x).logits for _ in range(2)))
        module, (query, key) = model.model.layers[0].self_attn, (torch.randn(1, heads, 16, 8) for heads in (4, 2))
        outs = (interface.s2_attention_forward(module, query, key, key, None, dropout=0.5)[0] for _ in range(2))
        assert torch.equal(*outs)  # as in families that leave it to their attention to look at the mode


@pytest.mark.parametrize(
    ("shift", "layers"),
    [("heads", ["half", "half"]), ("layers", ["none", "all"]), ("none", ["none"] * 2), ("all", ["all"] * 2)],
)
def test_what_is_shifted(models, monkeypatch, shift, layers):
    model, calls = models[0].train(), []
    parts, select = Documents.parts, interface.select_kernel

    def record(documents, heads, kv_heads, group_size, how, sink_tokens):
        calls.append(how)
        return parts(documents, heads, kv_heads, group_size, how, sink_tokens)

    def checked(*args, **kwargs):
        kernel = select(*args, **kwargs)

        def run(query, key, value, found, *, scale, **options):
            out = kernel(query, key, value, found, scale=scale, **options)
            rows = [[(0, query.shape[2])]] * query.shape[0]
            expected = oracle(query, key, value, rows, GROUP, scale, calls[-1], sink_tokens=4)
            assert torch.allclose(out.transpose(1, 2).double(), expected, atol=1e-5)
            return out

        return run

    monkeypatch.setattr(Documents, "parts", record)
    monkeypatch.setattr(interface, "select_kernel", checked)
    get_s2_attention(model).shift = shift
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    model(input_ids=ids())
    assert calls == layers
    fourth = SimpleNamespace(layer_idx=3)
    assert interface._shift(shift, fourth) == layers[1]


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.5, True), (0.5, False)])
def test_a_kernel_that_drops_weights_is_asked_for_only_where_some_are_dropped(
    tiny_llama, monkeypatch, dropout, training
):
    asked, select = [], interface.select_kernel

    def record(name, query, value, options):
        asked.append("dropout_p" in options)
        return select(name, query, value, options)

    monkeypatch.setattr(interface, "select_kernel", record)
    model = tiny_llama(attention_dropout=dropout).train(training)
    set_s2_attention(model, S2AttentionConfig(group_size=GROUP))
    with s2_attention_mode(model, "s2"):
        model(input_ids=ids())
    assert asked == [training and dropout > 0] * 2


def test_unsupported_models_are_refused():
    falcon = FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    with pytest.raises(ValueError, match="AttentionInterface"):
        set_s2_attention(falcon)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8))
    with pytest.raises(ValueError, match="encoder-decoder"):
        set_s2_attention(t5)
    with pytest.raises(ValueError, match="not a transformers model"):
        set_s2_attention(torch.nn.Linear(2, 2))


def test_a_model_without_anything_to_be_sparse_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no attention modules"):
        set_s2_attention(tiny_llama(num_hidden_layers=0))
    model = tiny_llama()
    for _, module in attention_modules(model):
        module.is_causal = False
    with pytest.raises(ValueError, match="LlamaForCausalLM has no causal attention"):
        set_s2_attention(model)
    next(attention_modules(model))[1].is_causal = True  # one is enough
    set_s2_attention(model)


@pytest.mark.parametrize(("window", "warned"), [(16, True), (63, True), (64, False), (None, False)])
def test_a_window_in_every_layer_is_warned_of_once(monkeypatch, window, warned):
    said = []
    monkeypatch.setattr(switch.logger, "warning", said.append)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)
    config = MistralConfig(**shape, num_key_value_heads=2, sliding_window=window, max_position_embeddings=64)
    model = MistralForCausalLM(config)
    for _ in range(2):
        set_s2_attention(model)
    assert len(said) == warned and all(f"a sliding window of {window} tokens" in message for message in said)
    assert not model._forward_pre_hooks  # the layers are asked for their caches, each once
    assert [len(module._forward_pre_hooks) for _, module in attention_modules(model)] == [1]


def test_setting_again_reconfigures_every_layer(models):
    model = models[0]
    set_s2_attention(model, S2AttentionConfig(group_size=4))
    states = {id(m.s2_attention_state) for _, m in attention_modules(model)}
    assert len(states) == 1 and get_s2_attention(model).config.group_size == 4


def test_bf16_training_step(tiny_llama):
    model = tiny_llama().to(torch.bfloat16).train()
    set_s2_attention(model)
    loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_groups_are_of_the_length_that_the_model_was_trained_at(tiny_llama, monkeypatch):
    """Read off the model where it is not told, whether it has been through `set_s2_attention` or not."""
    calls = spy(monkeypatch)

    def size(model, length):
        calls.clear()
        model.train()(input_ids=ids(1, length), use_cache=False)
        (found,) = {group_size for _, group_size in calls}
        return found

    def loaded(**options):
        return AutoModelForCausalLM.from_config(tiny_llama(**options).config, attn_implementation="s2attn")

    plain = loaded(max_position_embeddings=16)
    assert [size(plain, length) for length in (40, 64, 80)] == [10, 16, 16]
    told = tiny_llama(max_position_embeddings=16)
    set_s2_attention(told)
    assert [size(told, length) for length in (40, 64, 80)] == [10, 16, 16]
    scaled = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    assert size(loaded(rope_parameters=scaled), 80) == 16
    set_s2_attention(told, S2AttentionConfig(group_size_ratio=1 / 8))
    assert size(told, 80) == 10


def test_groups_of_a_model_without_rope_are_of_its_positions(monkeypatch):
    calls = spy(monkeypatch)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**shape, n_positions=64)).train()
    set_s2_attention(model)
    model(input_ids=ids(1, 64, 64), use_cache=False)
    assert get_s2_attention(model).native_window == 64
    assert [group_size for _, group_size in calls] == [16]  # a quarter: its positions end there
