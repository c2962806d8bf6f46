"""MLPs by tiles, compiled layers, and what training saves for the backward."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import trl
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_longlora import ContextStage, LongLoraConfig
from hf_longlora.attention import interface
from hf_longlora.attention.kernels import in_place
from hf_longlora.trainer.compiling import compiled_layers
from hf_longlora.trainer.offload import PartialOffload
from hf_longlora.trainer.tiles import tile_mlps

from .helpers import weights

TOKENS = 37
STAGES = [ContextStage(128, 3)]


def gradients(model, autocast=False):
    """The loss and all gradients of one step with gradient checkpointing."""
    ids = torch.arange(2 * TOKENS, device=model.device).view(2, TOKENS) % model.config.vocab_size
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def seen(monkeypatch):
    """The tokens in each call of an MLP."""
    calls, forward = [], LlamaMLP.forward

    def spy(self, x):
        calls.append(x.shape[-2])
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", spy)
    return calls


@pytest.mark.parametrize("trained", ["everything", "lora in the MLP", "lora, nothing before it"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tile", [1, 10, TOKENS])
def test_tiles_change_no_gradient(tiny_llama, trained, autocast, tile):
    plain = tiny_llama()
    if trained != "everything":
        targets = ["q_proj", "gate_proj", "down_proj"] if "MLP" in trained else ["gate_proj"]
        plain = get_peft_model(plain, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    tiled = copy.deepcopy(plain)
    tile_mlps(tiled, tile)
    loss, wanted = gradients(plain, autocast)
    loss_in_tiles, found = gradients(tiled, autocast)
    close = {"rtol": 2e-2, "atol": 2e-3} if autocast else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss_in_tiles, loss, **close)
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert list(tiled.state_dict()) == list(plain.state_dict())


def test_tiles_cost_no_computation_beside_checkpointing(tiny_llama, seen):
    model = tiny_llama()
    gradients(model)
    assert sum(seen) == 2 * 2 * TOKENS  # layers; the forward, and once more in the backward
    seen.clear()
    tile_mlps(model, 10)
    gradients(model)
    assert sum(seen) == 2 * 2 * TOKENS
    assert max(seen) == 10


def test_intermediates_of_a_tile_are_hidden_from_outer_hooks(tiny_llama):
    """TRL's activation offloading would send each to the host and back."""
    shapes = []
    model = tiny_llama(intermediate_size=96)
    tile_mlps(model, 10)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
        gradients(model)
    assert shapes
    assert not any(96 in shape and 32 not in shape for shape in shapes)


def test_a_model_without_gradients_is_tiled_too(tiny_llama, seen):
    model = tiny_llama().eval()
    ids = torch.arange(TOKENS).view(1, TOKENS)
    with torch.no_grad():
        plain = model(ids).logits
        tile_mlps(model, 10)
        seen.clear()
        torch.testing.assert_close(model(ids).logits, plain)
    assert max(seen) == 10


def _logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(TOKENS).view(1, TOKENS)).logits.float()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_in_tiles_can_be_copied_pickled_and_sent(tiny_llama, adapted):
    model = tiny_llama()
    if adapted:
        model = get_peft_model(model.to(torch.bfloat16), LongLoraConfig(r=2, target_length=128))
    tile_mlps(model, 10)
    plain, file = _logits(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    sent = pickle.loads(ForkingPickler.dumps(model))  # as multiprocessing does
    for twin in (copy.copy(model), copy.deepcopy(model), torch.load(file, weights_only=False), sent):
        tiled = [m for m in twin.modules() if isinstance(m, LlamaMLP)]
        assert [m.mlp_tile for m in tiled] == [10, 10] and all(type(m) is not LlamaMLP for m in tiled)
        assert torch.equal(_logits(twin), plain)
        assert list(twin.state_dict()) == list(model.state_dict())


def test_tiles_of_what_they_do_not_fit_are_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["up_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="dropout"):
        tile_mlps(model, 10)
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    with pytest.raises(ValueError, match="one MLP"):
        tile_mlps(experts, 10)
    with pytest.raises(ValueError, match="no decoder layers"):
        tile_mlps(nn.Linear(2, 2), 10)


def test_a_run_in_tiles_ends_as_one_without(make, tiny_llama, seen):
    runs = {}
    for tile in (None, 50):
        torch.manual_seed(1)
        trainer = make(model=tiny_llama(), stages=STAGES, mlp_tile=tile, gradient_checkpointing=True)
        seen.clear()
        trainer.train()
        assert max(seen) == (tile or 128)
        runs[tile] = weights(trainer)
    for name, value in runs[None].items():
        torch.testing.assert_close(runs[50][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="TRL has it from 1.15 on")
@pytest.mark.parametrize("options", [{}, {"mlp_tile": 50}, {"compile_layers": True}, {"dense_every": 2}], ids=str)
def test_selective_checkpointing_computes_attention_once(make, tiny_llama, monkeypatch, options):
    """TRL's, which keeps attention's output: it knows our operator by its name."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="aot_eager"))
    calls, engine = [], in_place.ENGINES["sdpa"]

    def forward(launch, *rest):
        calls.append(launch)
        engine.forward(launch, *rest)

    monkeypatch.setitem(in_place.ENGINES, "sdpa", engine._replace(forward=forward))
    runs, counts = [], []
    for selective in (False, True):
        torch.manual_seed(1)
        trainer = make(
            model=tiny_llama(),
            stages=STAGES,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"selective": selective},
            **options,
        )
        calls.clear()
        trainer.train()
        counts.append(len(calls))
        runs.append(weights(trainer))
    assert counts[0] == 2 * counts[1] > 0
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-4, atol=1e-5)


def test_layers_are_compiled_for_the_run_and_no_longer(make, tiny_llama, monkeypatch):
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="aot_eager"))
    runs, graphs = {}, {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(1)
        trainer = make(model=tiny_llama(), stages=STAGES, compile_layers=compiled, gradient_checkpointing=True)
        trainer.train()
        runs[compiled] = weights(trainer)
        graphs[compiled] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert not any(module._compiled_call_impl for module in trainer.model.modules())
        assert ALL_ATTENTION_FUNCTIONS[interface.NAME] is interface.s2_attention_forward
    # A norm, an MLP, what is before attention and what is after it: one graph each, for both layers.
    assert graphs == {False: 0, True: 4}
    for name, value in runs[False].items():
        torch.testing.assert_close(runs[True][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_part_that_can_not_be_compiled_leaves_nothing_behind(tiny_llama, monkeypatch, number):
    model, compile, calls = tiny_llama(), nn.Module.compile, []

    def failing(self):
        calls.append(self)
        if len(calls) > number:
            raise RuntimeError("no compiler")
        compile(self, backend="eager")

    own = model.model.layers[0].mlp  # compiled by someone else
    compile(own, backend="eager")
    before = own._compiled_call_impl
    monkeypatch.setattr(nn.Module, "compile", failing)
    with pytest.raises(RuntimeError, match="no compiler"), compiled_layers(model):
        pytest.fail("it was entered")
    assert ALL_ATTENTION_FUNCTIONS[interface.NAME] is interface.s2_attention_forward
    assert own._compiled_call_impl is before
    assert [m for m in model.modules() if m._compiled_call_impl] == [own]


def test_what_has_no_layers_can_not_be_compiled():
    with pytest.raises(ValueError, match="no decoder layers"), compiled_layers(nn.Linear(2, 2)):
        pass


def test_under_autocast_adapters_read_the_hidden_states_as_they_are(make, tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    trainer = make(model=model, stages=STAGES, bf16=True)
    dtypes = set()
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, args: dtypes.add(args[0].dtype))
    trainer.train()
    assert dtypes == {torch.bfloat16}
    dtypes.clear()
    trainer.model.eval()(torch.arange(8).view(1, 8))  # without autocast they have to be cast
    assert dtypes == {torch.float32}


def test_masters_of_norms_compute_as_the_base_does(tiny_llama):
    base: LlamaForCausalLM = tiny_llama().to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    ids = torch.arange(TOKENS).view(1, TOKENS)
    plain = base(ids).logits
    model = get_peft_model(base, LongLoraConfig(r=2))
    assert model.get_base_model().model.norm.weight.dtype == torch.float32
    assert torch.equal(model(ids).logits, plain)


def test_a_tile_is_computed_again_under_the_autocast_of_the_forward(tiny_llama):
    model, dtypes = tiny_llama(), []
    tile_mlps(model, 10)
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    gradients(model, autocast=True)
    assert set(dtypes) == {torch.bfloat16}


def test_offloading_without_an_accelerator_is_one_clear_error(make, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="activation_offloading"):
        make(stages=STAGES, activation_offloading=True)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_of_nothing_or_of_more_than_all_is_refused(make, share):
    with pytest.raises(ValueError, match=r"`offload_share` must be a number in \(0, 1\]"):
        make(stages=STAGES, activation_offloading=True, offload_share=share)


def test_a_share_without_offloading_is_refused(make):
    with pytest.raises(ValueError, match="switch that on"):
        make(stages=STAGES, offload_share=0.5)


@pytest.mark.parametrize(("share", "expected"), [(0.5, [0, 1, 0, 1, 0, 1]), (0.7, [0, 1, 1, 0, 1, 1]), (1, [1] * 6)])
def test_a_share_goes_to_the_host(monkeypatch, share, expected):
    """Every so many of equal tensors, in each forward alike; and all come back."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch, "get_device_module", lambda name: torch.cpu)
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # for TRL beside bitsandbytes
    context = PartialOffload(share, use_pin_memory=False, use_streams=False)
    host: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(context, "_send", lambda x: host.setdefault(len(host), x.clone()) is None or len(host) - 1)
    monkeypatch.setattr(context, "_fetch", host.pop)
    for _ in range(2):
        inputs = [torch.randn(5, requires_grad=True) for _ in expected]
        sent, outs = [], []
        with context:
            for x in inputs:
                before = len(host)
                outs.append(torch.sin(x))  # which saves x alone
                sent.append(len(host) - before)
        assert sent == expected
        torch.stack(outs).sum().backward()
        assert not host
        assert all(torch.equal(x.grad, x.detach().cos()) for x in inputs)


def test_a_trainer_offloads_its_share(make, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: "TRL's, of all")

    class Fake:
        def __init__(self, share):
            self.share = share

        def update_model_params(self, model):
            seen.append(model)

    monkeypatch.setattr("hf_longlora.trainer.sft_trainer.PartialOffload", Fake)
    trainer = make(stages=STAGES, activation_offloading=True, offload_share=0.6)
    assert trainer.maybe_activation_offload_context.share == 0.6 and seen == [trainer.model]
    assert make(stages=STAGES, activation_offloading=True).maybe_activation_offload_context == "TRL's, of all"


@pytest.mark.gpu
def test_gradients_with_a_share_on_the_host_are_those_without(tiny_llama):
    plain = tiny_llama().to("cuda")
    moved = copy.deepcopy(plain)
    context = PartialOffload(0.5)
    context.update_model_params(moved)
    with context:
        loss, found = gradients(moved)
    expected_loss, expected = gradients(plain)
    assert context._sent > 0
    torch.testing.assert_close((loss, found), (expected_loss, expected))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")  # TRL >= 1.16
@pytest.mark.parametrize("tile", [None, 50])
def test_liger_trains_the_masters_of_norms(make, tiny_llama, tile):
    """In a bf16 base the norms' masters are fp32, and Liger's kernels read both."""
    pytest.importorskip("liger_kernel")
    runs = {}
    for liger in (False, True):
        torch.manual_seed(1)
        model = tiny_llama(hidden_size=64, rms_norm_eps=1e-5).to("cuda", torch.bfloat16)
        arguments = {"use_cpu": False, "bf16": True, "use_liger_kernel": liger, "mlp_tile": tile}
        trainer = make(model=model, stages=STAGES, **arguments)
        trainer.train()
        runs[liger] = weights(trainer)
    norms = [name for name in runs[True] if "norm" in name]
    assert norms and all(runs[True][name].dtype == torch.float32 for name in norms)
    for name, value in runs[False].items():
        torch.testing.assert_close(runs[True][name], value, rtol=5e-2, atol=2e-3)
