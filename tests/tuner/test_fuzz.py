"""Damaged, foreign and future adapter files: one clear error each, and the model stays as it was.

Each test says how many cases it has tried, and how many of them were refused.
"""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_longlora.rope import current_rope
from hf_longlora.tuner import LongLoraConfig
from hf_longlora.tuner.config import check_finite

from .helpers import LENGTH, TARGET, llama, logits, perturbed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of a good adapter. Tests copy it."""
    folder = tmp_path_factory.mktemp("adapter")
    perturbed(llama()).save_pretrained(folder)
    return folder


def state(model):
    """All that loading could change."""
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        sum(p.double().abs().sum().item() for p in model.parameters()),
        current_rope(model.config),
        {key: value for key, value in vars(model).items() if key.startswith("_longlora")},
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    )


class Cases:
    """Loads adapters on one model, which every refusal has to leave as it was."""

    def __init__(self):
        self.model = llama()
        self.before = state(self.model)
        self.tried = self.refused = 0

    def load(self, folder, errors=(ValueError,)):
        """The adapted model, or the error that it was refused with."""
        self.tried += 1
        try:
            return PeftModel.from_pretrained(self.model, folder)
        except errors as error:
            self.refused += 1
            assert str(error)
            assert state(self.model) == self.before
            return error

    def take_off(self, model):
        self.model = model.unload()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.before = state(self.model)

    def say(self, capsys, what):
        with capsys.disabled():
            print(f"\n{self.tried} cases of {what}, {self.refused} refused", end="")


def test_truncated_weights(adapter, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    whole = (adapter / WEIGHTS).read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    cases = Cases()
    for length in [
        *range(16),
        *range(16, header + 64, 97),
        *range(header, len(whole), len(whole) // 40),
        len(whole) - 1,
    ]:
        (tmp_path / WEIGHTS).write_bytes(whole[:length])
        assert WEIGHTS in str(cases.load(tmp_path))
    assert cases.refused == cases.tried > 80
    cases.say(capsys, "truncated weights")


def test_flipped_bits(adapter, tmp_path, capsys):
    """A flip is refused, or the numbers in the file are what the model gets: a file has no checksum."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    whole = (adapter / WEIGHTS).read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    cases = Cases()

    @settings(
        max_examples=150,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(st.one_of(st.integers(0, header - 1), st.integers(0, len(whole) - 1)), st.integers(0, 7))
    def flip(position, bit):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        (tmp_path / WEIGHTS).write_bytes(damaged)
        model = cases.load(tmp_path)
        if not isinstance(model, ValueError):
            assert all(p.isfinite().all() for p in model.parameters())
            stored = load_file(tmp_path / WEIGHTS)
            parameter = model.get_parameter("base_model.model.model.norm.modules_to_save.default.weight")
            assert torch.equal(parameter, stored["base_model.model.model.norm.weight"])
            cases.take_off(model)

    flip()
    assert cases.refused > 30
    cases.say(capsys, "flipped bits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(adapter, tmp_path, value, capsys):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    cases = Cases()
    for key in load_file(adapter / WEIGHTS):
        weights = load_file(adapter / WEIGHTS)
        weights[key].view(-1)[-1] = value
        save_file(weights, tmp_path / WEIGHTS)
        error = cases.load(tmp_path)
        assert "not finite" in str(error)
        assert key.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".weight") in str(error)
    assert cases.refused == cases.tried == 22
    cases.say(capsys, f"weights with {value}")


def test_finite_weights_whose_sum_is_not_are_finite():
    check_finite({"a": torch.full((2,), 3e38)}, "file")
    with pytest.raises(ValueError, match=r"file is damaged .* a has values"):
        check_finite({"a": torch.tensor([3e38, torch.inf])}, "file")


@pytest.mark.parametrize("change", ["drop", "add", "rename", "reshape"])
def test_weights_of_another_adapter(adapter, tmp_path, change, capsys):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    cases = Cases()
    for key in load_file(adapter / WEIGHTS):
        weights = load_file(adapter / WEIGHTS)
        if change == "drop":
            del weights[key]
        elif change == "add":
            weights[key.replace("model.layers.0", "model.layers.7").replace(".norm.", ".other_norm.")] = (
                weights[key] * 1
            )
            weights["base_model.model.model.layers.9.extra.weight"] = torch.ones(2)
        elif change == "rename":
            weights[f"{key}.renamed"] = weights.pop(key)
        else:
            weights[key] = torch.cat([weights[key], weights[key]])
        save_file(weights, tmp_path / WEIGHTS)
        assert "adapter" in str(cases.load(tmp_path))
    assert cases.refused == cases.tried == 22
    cases.say(capsys, f"weights of another adapter ({change})")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_configs(adapter, tmp_path, capsys):
    """Any value under any key: refused, or an adapter that loads and saves."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    good = json.loads((adapter / CONFIG).read_text())
    keys = sorted(good.keys() - {"peft_type"})
    rope = sorted(good["rope"]["rope_parameters"])
    cases = Cases()

    @settings(
        max_examples=250,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,  # pytest takes minutes to print them
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from([*keys, *(("rope", k) for k in rope), *(("base_rope", k) for k in rope)]), JSON)
    def change(key, value):
        stored = json.loads(json.dumps(good))
        if isinstance(key, tuple):
            stored[key[0]]["rope_parameters"][key[1]] = value
        else:
            stored[key] = value
        (tmp_path / CONFIG).write_text(json.dumps(stored))
        model = cases.load(tmp_path, (ValueError, ImportError))  # megatron_config needs megatron
        if not isinstance(model, Exception):
            assert logits(model).isfinite().all()
            cases.take_off(model)

    change()
    assert cases.refused > 80
    cases.say(capsys, "changed configs")


def test_a_config_that_is_cut_short(adapter, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    whole = (adapter / CONFIG).read_text()
    cases = Cases()
    for length in range(0, len(whole) - 1, len(whole) // 60):
        (tmp_path / CONFIG).write_text(whole[:length])
        assert isinstance(cases.load(tmp_path), ValueError)
    assert cases.refused == cases.tried > 50
    cases.say(capsys, "configs cut short")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention_sinks": 4}, "does not know"),
        (
            {"rope": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}, "max_position_embeddings": 9}},
            "RoPE",
        ),
        ({"rope": {"theta": 1e4}}, "no stored RoPE"),
        ({"target_modules": ["c_attn"]}, "No modules were targeted"),
        ({"peft_type": "LORA"}, "rope|no stored|LORA"),
    ],
)
def test_foreign_and_future_configs(adapter, tmp_path, change, words):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    stored = json.loads((adapter / CONFIG).read_text()) | change
    (tmp_path / CONFIG).write_text(json.dumps(stored))
    if change == {"peft_type": "LORA"}:
        with pytest.warns(UserWarning, match="Unexpected keyword arguments"):  # PEFT's own reader says what it drops
            PeftModel.from_pretrained(llama(), tmp_path)
        return
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_what_a_future_config_leaves_unset_is_ignored(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    stored = json.loads((adapter / CONFIG).read_text()) | {"a_new_switch": False, "a_new_pattern": {}, "new": None}
    (tmp_path / CONFIG).write_text(json.dumps(stored))
    with pytest.warns(UserWarning, match="a_new_switch"):
        model = PeftModel.from_pretrained(llama(), tmp_path)
    assert model.config.max_position_embeddings == TARGET


BASES = {
    "wider": {"hidden_size": 48},
    "deeper": {"num_hidden_layers": 3},
    "shallower": {"num_hidden_layers": 1},
    "other heads": {"num_key_value_heads": 4},
    "another RoPE base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
}


@pytest.mark.parametrize("base", BASES)
def test_another_base(adapter, base):
    model = llama(**BASES[base])
    before = state(model)
    with pytest.raises(ValueError, match=r"does not fit|call for|another RoPE"):
        PeftModel.from_pretrained(model, adapter)
    assert state(model) == before


@pytest.mark.parametrize("tokens", [127, 129, 256])
def test_another_vocabulary(adapter, tokens):
    model = llama()
    model.resize_token_embeddings(tokens)
    before = state(model)
    with pytest.raises(ValueError, match=f"trained with 128 tokens, and this model has {tokens}"):
        PeftModel.from_pretrained(model, adapter)
    assert state(model) == before


@settings(max_examples=200, database=None, derandomize=True)
@given(st.sampled_from(["target_length", "base_length", "rope_type", "rope_parameters", "embedding_rank"]), JSON)
def test_what_a_user_writes_is_taken_or_refused(key, value):
    try:
        config = LongLoraConfig(**{key: value})
    except ValueError as error:
        assert key in str(error)
    else:
        assert getattr(config, key) == value


def test_no_pickle_is_read(adapter, tmp_path, monkeypatch):
    """Nor through a name that PEFT looks for next."""
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(adapter / WEIGHTS), tmp_path / "adapter_model.bin")

    def load(*args, **kwargs):
        raise AssertionError("a pickle was read")

    monkeypatch.setattr(torch, "load", load)
    assert PeftModel.from_pretrained(llama(), tmp_path).config.max_position_embeddings == TARGET != LENGTH
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="pickle"):
        PeftModel.from_pretrained(llama(), tmp_path)
