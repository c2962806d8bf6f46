"""Every example runs: scripts and YAML files as they stand but for a tiny model, little text and few steps."""

import inspect
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.provenance import RESULTS, read_rows
from benchmarks.quality.pretrained import METHODS
from hf_longlora import LongLoraConfig, LongLoraSFTConfig, LongLoraSFTTrainer
from hf_longlora.cli import main
from hf_longlora.cli.train import make_parser
from hf_longlora.rope import current_rope, reach, scaled_rope
from hf_longlora.schedule import DENSE_EVERY
from hf_longlora.trainer.ropes import Start, stage_ropes

from .vllm_rules import lengths as served_lengths

EXAMPLES = Path(__file__).parent.parent / "examples"
LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = {
    "meta-llama/Llama-3.1-8B": LlamaConfig(
        **LLAMA,
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={**LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 8192},
    ),
    "meta-llama/Llama-2-7b-hf": LlamaConfig(
        **LLAMA, vocab_size=32000, intermediate_size=11008, max_position_embeddings=4096
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
}
"""What the examples' models have in their config.json, as far as it matters here."""
SMALLER = 512
"""How many times shorter the tiny twins' stages are."""
ON_A_CPU = [
    *("--use_cpu", "true", "--bf16", "false", "--use_liger_kernel", "false", "--dataset_num_proc", "null"),
    *("--learning_rate", "1e-3", "--warmup_steps", "0", "--logging_steps", "1", "--disable_tqdm", "true"),
]
TEXT = "The quick brown fox jumps over the lazy dog, and a long book has many chapters. "


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the examples are run: texts and conversations to train on."""
    monkeypatch.chdir(tmp_path)
    rows = {
        "books": [{"text": f"{i} " + TEXT * 20} for i in range(8)],
        "chats": [
            {
                "messages": [
                    {"role": "user", "content": f"{i} " + TEXT * (20 if i == 7 else 1)},  # cut off before the answer
                    {"role": "assistant", "content": "A fox, a dog, and a book."},
                ]
            }
            for i in range(8)
        ],
    }
    for name, lines in rows.items():
        Path(name).mkdir()
        Path(name, "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


@pytest.fixture
def base(tiny_llama, tiny_tokenizer, folder):
    """Makes a tiny model in the shape of one that an example names: its RoPE and length, `SMALLER` times shorter."""

    def make(name="meta-llama/Llama-2-7b-hf", **overrides):
        full = CONFIGS[name]
        rope = dict(full.rope_parameters)
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] //= SMALLER
        length = full.max_position_embeddings // SMALLER
        model = tiny_llama(max_position_embeddings=length, rope_parameters=rope, **overrides)
        model.save_pretrained("base")
        tiny_tokenizer.save_pretrained("base")
        return model

    return make


def run_script(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def documented(name):
    """The command in a script's docstring, as a shell would take it apart, without `python examples/NAME`."""
    text = (EXAMPLES / name).read_text()
    command = re.search(rf"python (examples/{name}.*?)\n\n", text, re.DOTALL)[1]
    return shlex.split(command.replace("\\\n", " "))[1:]


def replaced(arguments, **values):
    """The same arguments with some values replaced."""
    arguments = list(arguments)
    for option, value in values.items():
        arguments[arguments.index(f"--{option}") + 1] = value
    return arguments


def shorter(stages):
    return json.dumps([{**s, "max_length": s["max_length"] // SMALLER, "max_steps": 1} for s in stages])


def loaded(adapter):
    """An adapter that has learnt something, on its base, and its configuration."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter)
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    return model, model.active_peft_config


# --------------------------------------------------------------------------------------------------------------------
# Scripts


def test_sft(base, monkeypatch):
    base()
    arguments = documented("sft.py")
    stages = json.loads(arguments[arguments.index("--stages") + 1])
    values = {"model_name_or_path": "base", "dataset_name": "books", "output_dir": "out", "dtype": "float32"}
    run_script("sft.py", [*replaced(arguments, **values, stages=shorter(stages)), *ON_A_CPU], monkeypatch)
    model, config = loaded("out")
    assert (config.r, config.lora_alpha, config.target_length) == (8, 16, 32768 // SMALLER)
    assert current_rope(model.config) == scaled_rope(AutoConfig.from_pretrained("base"), 32768 // SMALLER)
    run_script(
        "sft.py",
        [
            *replaced(
                [a for a in arguments if a != "--use_peft"],
                **values | {"output_dir": "whole"},
                stages=shorter(stages[:1]),
            ),
            *ON_A_CPU,
        ],
        monkeypatch,
    )
    assert Path("whole", "model.safetensors").is_file()


def test_trls_own_script_with_three_names_of_ours(base, monkeypatch):
    """What `sft.py` and the README say is all that has to change."""
    import trl

    base()
    monkeypatch.setattr(trl, "SFTTrainer", LongLoraSFTTrainer)
    monkeypatch.setattr(trl, "SFTConfig", LongLoraSFTConfig)
    monkeypatch.setattr(trl, "get_peft_config", lambda model: LongLoraConfig(r=model.lora_r))
    values = {"model_name_or_path": "base", "dataset_name": "books", "output_dir": "out", "dtype": "float32"}
    arguments = documented("sft.py")
    stages = json.loads(arguments[arguments.index("--stages") + 1])
    monkeypatch.setattr(sys, "argv", ["sft", *replaced(arguments, **values, stages=shorter(stages)), *ON_A_CPU])
    monkeypatch.delitem(sys.modules, "trl.scripts.sft", raising=False)
    runpy.run_module("trl.scripts.sft", run_name="__main__")
    model, config = loaded("out")
    assert config.r == 8 and current_rope(model.config) == scaled_rope(
        AutoConfig.from_pretrained("base"), 32768 // SMALLER
    )


def test_chat_after_extension(base, monkeypatch):
    base("meta-llama/Llama-3.1-8B")
    stages = [{"max_length": 262144, "max_steps": 1}]
    values = {"model_name_or_path": "base", "dataset_name": "books", "output_dir": "extended", "dtype": "float32"}
    arguments = replaced(documented("sft.py"), **values, stages=shorter(stages))
    run_script("sft.py", [*arguments, *ON_A_CPU], monkeypatch)
    before, extension = loaded("extended")

    arguments = documented("chat_after_extension.py")
    stages = json.loads(arguments[arguments.index("--stages") + 1])
    assert [stage["rope_type"] for stage in stages] == [None]
    values = {
        "adapter": "extended",
        "dataset_name": "chats",
        "output_dir": "chat",
        "stages": shorter(stages),
        "chat_template_path": str(EXAMPLES / "chat.jinja"),
    }
    arguments = replaced(arguments, **values)
    with pytest.raises(SystemExit):
        run_script("chat_after_extension.py", [*arguments[2:], *ON_A_CPU], monkeypatch)
    run_script("chat_after_extension.py", [*arguments, "--dtype", "float32", *ON_A_CPU], monkeypatch)
    after, config = loaded("chat")
    assert config.rope == extension.rope and config.target_length == extension.target_length
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(changed) and not all(changed)
    tokenizer = AutoTokenizer.from_pretrained("chat")
    assert tokenizer.chat_template == (EXAMPLES / "chat.jinja").read_text()


@pytest.fixture
def extended(adapter):
    """The folder of an extended adapter with its tokenizer, as a run leaves it, and its weights."""
    AutoTokenizer.from_pretrained("base").save_pretrained("adapter")
    return load_file("adapter/adapter_model.safetensors")


def goes_on(extended, output):
    """The adapter in `output` is the extended one, trained further; and nothing but one adapter is there."""
    after = load_file(f"{output}/adapter_model.safetensors")
    assert after.keys() == extended.keys()
    assert sum(not torch.equal(after[name], extended[name]) for name in after) > len(after) / 2
    assert not [path for path in Path(output).iterdir() if path.is_dir() and path.name[:10] != "checkpoint"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), output)
    assert reach(current_rope(model.config))[1] == 512
    return json.loads(Path(output, "checkpoint-2", "trainer_state.json").read_text())["log_history"]


SHORT = ["--max_steps", "2", "--dtype", "float32", "--use_cpu", "true", "--bf16", "false", "--logging_steps", "1"]
SHORT += ["--disable_tqdm", "true", "--report_to", "none", "--warmup_steps", "0", "--learning_rate", "1e-3"]


@pytest.mark.parametrize("more", [[], ["--precompute_ref_log_probs", "true"]], ids=["", "precomputed"])
def test_dpo_after_extension(extended, monkeypatch, more):
    rows = [{"prompt": TEXT * (1 + i), "chosen": TEXT + f" {i}", "rejected": TEXT[::-1]} for i in range(8)]
    Path("preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"adapter": "adapter", "output_dir": "dpo", "max_length": "512", "gradient_accumulation_steps": "1"}
    run_script(
        "dpo_after_extension.py",
        [*replaced(documented("dpo_after_extension.py"), **values), *SHORT, *more],
        monkeypatch,
    )
    losses = [entry["loss"] for entry in goes_on(extended, "dpo") if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] != losses[0]


def test_grpo_after_extension(extended, monkeypatch):
    rows = [{"prompt": TEXT * 3 + f" {i}", "answer": "a"} for i in range(8)]
    Path("questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"adapter": "adapter", "output_dir": "grpo", "max_completion_length": "40"}
    values |= {"num_generations": "4", "per_device_train_batch_size": "4", "gradient_accumulation_steps": "1"}
    arguments = [*replaced(documented("grpo_after_extension.py"), **values), *SHORT]
    run_script("grpo_after_extension.py", arguments, monkeypatch)
    assert [entry["reward"] for entry in goes_on(extended, "grpo") if "reward" in entry]


def test_the_chat_template_trains_what_the_assistant_says(tiny_tokenizer):
    tiny_tokenizer.chat_template = (EXAMPLES / "chat.jinja").read_text()
    messages = [
        {"role": "user", "content": "Who jumps?"},
        {"role": "assistant", "content": "The fox."},
        {"role": "user", "content": "Over what?"},
    ]
    shown = tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == "<s>user: Who jumps?\nassistant: The fox.</s>\nuser: Over what?\nassistant: "
    ids = tiny_tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    trained = [i for i, mask in zip(ids["input_ids"], ids["assistant_masks"], strict=True) if mask]
    assert tiny_tokenizer.decode(trained) == "The fox.</s>"


# --------------------------------------------------------------------------------------------------------------------
# YAML


def options_of(name):
    return yaml.safe_load((EXAMPLES / name).read_text())


def twin(name, *more):
    """Train by an example's YAML with a tiny model."""
    stages = options_of(name)["stages"]
    arguments = ["--model_name_or_path", "base", "--dataset_name", "books", "--output_dir", "out"]
    arguments += ["--stages", shorter(stages), *ON_A_CPU, *more]
    assert main(["train", "--config", str(EXAMPLES / name), *arguments]) == 0


def test_extend_llama_pg19(base):
    base("meta-llama/Llama-3.1-8B")
    twin("extend_llama_pg19.yaml", "--mlp_tile", "100")
    model, _ = loaded("out")
    rope = current_rope(model.config)
    assert (rope.rope_type, rope.parameters["factor"], reach(rope)) == ("llama3", 32.0, (16, 512))
    twin("extend_llama_pg19.yaml", "--resume", "--mlp_tile", "100")  # nothing is left to do


def test_million_tokens(base):
    """In one process, that is: several are in `trainer/test_distributed.py`."""
    base("meta-llama/Llama-3.1-8B")
    twin("million_tokens.yaml", "--mlp_tile", "100", "--sequence_parallel", "1")
    model, _ = loaded("out")
    rope = current_rope(model.config)
    assert (rope.rope_type, rope.parameters["factor"], reach(rope)) == ("llama3", 128.0, (16, 2048))


def test_qlora_24gb(base):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    base(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16)
    twin("qlora_24gb.yaml", "--mlp_tile", "40", "--bf16", "true")
    model, config = loaded("out")
    assert current_rope(model.config) == scaled_rope(AutoConfig.from_pretrained("base"), 64)
    assert config.r == 8


def test_smollm2_32k(base):
    base("HuggingFaceTB/SmolLM2-135M-Instruct")
    twin("smollm2_32k.yaml")
    model, config = loaded("out")
    rope = current_rope(model.config)
    assert (rope.rope_type, reach(rope)[1], config.r, config.trained.pattern(0).kind) == ("default", 64, 64, "windows")
    assert rope.parameters["rope_theta"] == pytest.approx(1e5 * 4**1.5)


def test_smollm2_32k_has_the_settings_of_the_rows_that_it_names():
    """What the bench gives its trainer and what the file says, but for where the rows come from."""
    values = options_of("smollm2_32k.yaml")
    method = METHODS["windows, 2nd dense, abf 1.5"]
    rows = [row for row in read_rows(RESULTS / "pretrained.csv") if row["method"] == "windows, 2nd dense, abf 1.5"]
    [stage] = values["stages"]
    assert {(row["steps"], row["theta"]) for row in rows if row["length"] == str(stage["max_length"])} == {
        (str(stage["max_steps"]), f"{1e5 * 4**1.5:.5g}")
    }
    assert (values["lora_r"], values["lora_alpha"], values["learning_rate"]) == (
        method.rank,
        2 * method.rank,
        method.learning_rate,
    )
    assert method.stage["dense_every"] == DENSE_EVERY and not values["gradient_checkpointing"]


RUNS = ["extend_llama_pg19.yaml", "million_tokens.yaml", "qlora_24gb.yaml", "smollm2_32k.yaml"]


@pytest.mark.parametrize("name", RUNS)
def test_a_runs_options_are_known_and_its_stages_extend_its_model(name):
    values = options_of(name)
    parser = make_parser()
    known = {action.dest for action in parser._actions}
    assert not values.keys() - known
    _, _, args = parser.parse_dict({**values, "use_cpu": True, "bf16": False})
    config = CONFIGS[values["model_name_or_path"]]
    ropes = stage_ropes(Start.of(values["model_name_or_path"], config, None), args.schedule)
    assert [reach(rope)[1] for rope in ropes] == [stage["max_length"] for stage in values["stages"]]


@pytest.mark.parametrize("name", ["extend_llama_pg19.yaml", "million_tokens.yaml", "qlora_24gb.yaml"])
def test_a_plan_in_a_comment_is_what_the_planner_says(name, folder, capsys):
    """To 5%; and its command has the settings of the file."""
    values, text = options_of(name), (EXAMPLES / name).read_text()
    plans = re.findall(r"#   (hf-longlora plan .*)\n#   estimate: (.*)", text)
    assert len(plans) == text.count("hf-longlora plan") > 0
    for command, estimate in plans:
        _, *arguments = shlex.split(command)
        assert arguments[1] == values["model_name_or_path"]
        assert arguments[arguments.index("--mlp-tile") + 1] == str(values["mlp_tile"])
        sharing = arguments[arguments.index("--sequence-parallel") + 1] if "--sequence-parallel" in arguments else "1"
        assert sharing == str(values.get("sequence_parallel", 1))
        assert ("--fused" in arguments) == values.get("use_liger_kernel", False)
        assert ("--quantized" in arguments) == values.get("load_in_4bit", False)
        accumulation = arguments[arguments.index("--accumulation") + 1] if "--accumulation" in arguments else "1"
        assert accumulation == str(values["gradient_accumulation_steps"])
        CONFIGS[arguments[1]].save_pretrained("shape")
        arguments[1] = "shape"
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        (row,) = plan["lengths"]
        assert row["fits"] and row["length"] == values["stages"][-1]["max_length"]
        total, seconds, length, longest = re.fullmatch(
            r"(\S+) GiB(?: and (\S+) s a step)? at (\S+) tokens; the longest that fits: (\S+) tokens", estimate
        ).groups()
        assert number(length) == row["length"]
        assert number(total) == pytest.approx(row["total"], rel=0.05)
        assert seconds is None or number(seconds) == pytest.approx(row["seconds"], rel=0.05)
        assert number(longest) == pytest.approx(plan["longest"], rel=0.05)


def number(text):
    return float(text.replace(",", ""))


# --------------------------------------------------------------------------------------------------------------------
# Shell


@pytest.fixture
def shell(folder, monkeypatch):
    """Runs a script with commands that only say how they were called: `[[command, argument, ...], ...]`."""
    (folder / "bin").mkdir()
    for name in ("hf-longlora", "vllm", "transformers"):
        command = folder / "bin" / name
        command.write_text('#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" >> calls\nprintf "\\n" >> calls\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    for name in ("LENGTHS", "WINDOWS", "TRIALS", "LENGTH"):
        monkeypatch.delenv(name, raising=False)

    def run(name, *arguments, **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        Path("calls").write_text("")
        done = subprocess.run([EXAMPLES / name, *arguments], capture_output=True, text=True, timeout=300)
        calls = [line.split("\0")[:-1] for line in Path("calls").read_text().split("\n")[:-1]]
        return done.returncode, done.stderr, calls

    return run


@pytest.fixture
def adapter(base):
    """A saved adapter in the folder `adapter`, on `base`."""
    model = get_peft_model(base(), LongLoraConfig(target_length=512))
    model.base_model.config._name_or_path = "base"
    model.active_peft_config.base_model_name_or_path = "base"
    model.save_pretrained("adapter")


def test_evaluate(shell, adapter):
    documents = ["books/train.jsonl", "one text.txt"]
    Path("one text.txt").write_text(TEXT * 20)
    code, _, [command] = shell("evaluate.sh", "adapter", "out", *documents)
    assert code == 0 and command[-1] == "out"
    lengths = command[command.index("--lengths") + 1 : command.index("--max-windows")]
    assert lengths == ["8192", "32768", "131072", "262144"]
    code, _, [command] = shell("evaluate.sh", "adapter", "out", *documents, LENGTHS="450 500", WINDOWS="2", TRIALS="1")
    assert code == 0
    assert main([*command[1:], "--depths", "0", "1", "--device", "cpu"]) == 0
    results = json.loads(Path("out", "evaluation.json").read_text())
    assert [row["length"] for row in results["perplexity"]["dense"]] == [450, 500]
    assert {path.stem for path in Path("out").glob("*.png")} == {"perplexity", "positions", "passkey", "needles"}
    assert {row["length"] for kind in ("passkey", "needles") for row in results[kind]} == {450, 500}
    code, message, calls = shell("evaluate.sh", "adapter", "out")
    assert code == 2 and "usage" in message and not calls


def test_serve_merged(shell, adapter):
    from transformers.cli.serve import Serve

    code, _, [merge, serve] = shell("serve_merged.sh", "adapter", "merged model")
    assert code == 0 and serve == ["vllm", "serve", "merged model"]
    assert main(merge[1:]) == 0
    model = AutoModelForCausalLM.from_pretrained("merged model")
    assert reach(current_rope(model.config))[1] == 512 and served_lengths(model.config) == (512, 512)
    code, _, calls = shell("serve_merged.sh", "adapter", "merged model", "vllm", LENGTH="256")
    assert code == 0 and calls == [["vllm", "serve", "merged model", "--max-model-len", "256"]]  # merged already
    code, _, [serve] = shell("serve_merged.sh", "adapter", "merged model", "transformers")
    assert code == 0 and serve == ["transformers", "serve", "merged model"]
    inspect.signature(Serve).bind(*serve[2:])
    for arguments, said in (["adapter"], "usage"), (["adapter", "new", "nothing"], "no such server"):
        code, message, calls = shell("serve_merged.sh", *arguments)
        assert code == 2 and said in message and not calls
    Path("bin", "vllm").unlink()
    code, message, calls = shell("serve_merged.sh", "adapter", "new")
    assert code == 1 and message == "vllm is not installed\n" and not calls


# --------------------------------------------------------------------------------------------------------------------
# The notebook, and what is said of all


@pytest.mark.slow
def test_quickstart(folder, monkeypatch, capsys):
    """Its cells, one after the other in one namespace, as a reader runs them, but with fewer windows."""
    fewer = {'"max_windows": 64': '"max_windows": 8'}
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    namespace = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None  # git has no outputs
            code = "".join(cell["source"])
            for number, less in list(fewer.items()):
                if number in code:
                    code = code.replace(number, less)
                    del fewer[number]
            exec(compile(code, cell["id"], "exec"), namespace)
    assert not fewer
    base, extended = namespace["records"]["base"], namespace["records"]["extended"]
    assert [row["length"] for row in extended] == [64, 128, 256]
    assert base[-1]["perplexity"] > 1.1 * extended[-1]["perplexity"]
    expected, found = (
        scaled_rope(AutoConfig.from_pretrained(namespace["OUT"] / "base"), 256),
        current_rope(namespace["merged"].config),
    )
    assert reach(found) == reach(expected) == (256, 256)
    assert found.parameters == pytest.approx(expected.parameters)  # in two stages
    assert "extended   64:" in capsys.readouterr().out


def test_the_table_names_every_example_and_its_commands_are_there():
    table = (EXAMPLES / "README.md").read_text()
    linked = {path.rstrip("/") for path in re.findall(r"\]\(([^)]*)\)", table)}
    assert {path.name for path in EXAMPLES.iterdir() if path.name[0] not in "._"} - {"README.md"} <= linked
    files = re.findall(r"examples/[\w./]*\w", "\n".join(path.read_text() for path in EXAMPLES.glob("*.*")))
    assert files and all((EXAMPLES.parent / file).exists() for file in files)
