"""Every code block of the README and of the guides, run as it stands but smaller.

A block stands by itself: it gets the names of `given` and the files of `folder`, in a folder of its own. Hub names are
folders there, with tiny random models; tokens are divided by `SCALE`, so that every ratio of lengths stays.
"""

import argparse
import ast
import dataclasses
import html
import importlib.util
import inspect
import itertools
import json
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    training_args,
)

import hf_longlora
from hf_longlora import ContextStage, LongLoraConfig, LongLoraSFTConfig, PushAdapterCallback, S2AttentionConfig
from hf_longlora.attention import kernels
from hf_longlora.attention.kernels import KERNELS, operators
from hf_longlora.cli import COMMANDS, main
from hf_longlora.cli.train import make_parser
from hf_longlora.evaluation import retrieval
from hf_longlora.trainer import streams

from .attention.test_compile import UNTRIED
from .conftest import ASCII
from .hub.conftest import hub, token  # noqa: F401  (fixtures)
from .hub.test_original import trained

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n+)?```(\w*)\n(.*?)^```$", re.M | re.S)
LAUNCHED = (
    "accelerate launch --config_file examples/accelerate_configs/zero2.yaml --num_processes 4 "
    "-m hf_longlora train --config million.yaml"
)
NOT_RUN = {
    "vllm serve merged --max-model-len 32768": "vLLM",
    "from transformers import BitsAndBytesConfig": "bitsandbytes",
    "hf-longlora evaluate out --tasks ruler --lengths 8192 16384 32768 --trials 100 --output-dir out": "lm-eval",
    "# offload.yaml": "a GPU",
    "# sft.py": "command line",
    "accelerate launch sft.py --model_name_or_path meta-llama/Llama-2-7b-hf --dataset_name books.jsonl "
    "--output_dir out --attn_implementation s2attn": "sft.py",
    "# million.yaml": "DeepSpeed, several processes",
    LAUNCHED: "DeepSpeed, several processes",
    "import torch.distributed as dist": "several processes",
}
"""First lines of the blocks that say "not run", and what they need (they are parsed all the same, but for vLLM's)."""

SCALE = 16
STEPS = 4
SMALLER = (
    (r"\b\d{4,}\b", lambda m: str(int(m[0]) // SCALE) if int(m[0]) % 1024 == 0 else m[0]),
    (r"(LongLoraSFTConfig\()(?!(?s:.*)per_device)", r"\1per_device_train_batch_size=1, "),
    (r"gradient_accumulation_steps: 8", "gradient_accumulation_steps: 1"),
    (r"(ContextStage\(\d+, )\d+", rf"\g<1>{STEPS}"),
    (r"(max_steps\W{1,3})\d+", rf"\g<1>{STEPS}"),
    (r"(--(?:passkey|needles) |trials=)\d+", r"\g<1>1"),
)
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"vocab_size": 1024, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192 // SCALE}
MODELS = {
    "meta-llama/Llama-2-7b-hf": (LlamaForCausalLM, LlamaConfig(**SHAPE, max_position_embeddings=4096 // SCALE)),
    "meta-llama/Llama-3.1-8B": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, max_position_embeddings=131_072 // SCALE, rope_parameters=LLAMA3),
    ),
    "Qwen/Qwen3-8B": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8, max_position_embeddings=40_960 // SCALE)),
}
LONG_TEXT = " ".join(
    f"Chapter {i}. The quick brown fox jumps over the lazy dog, and {i} birds sing." for i in range(200)
)


@dataclass
class Block:
    page: Path
    line: int
    language: str
    code: str
    needs: str | None
    """Why it is not run, as the page says it."""

    @property
    def first(self) -> str:
        return self.code.splitlines()[0]

    @property
    def smaller(self) -> str:
        code = self.code
        for pattern, replacement in SMALLER:
            code = re.sub(pattern, replacement, code)
        return code


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = [Block(page, text[: m.start(3)].count("\n") + 1, m[2], m[3], m[1]) for m in BLOCK.finditer(text)]
    assert 2 * len(found) == len(re.findall("^ *```", text, re.M)), f"a block of {page.name} is not read"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What the pages take as given: models by their names, data, a run's file, and `out`, which that run has made."""
    folder = tmp_path_factory.mktemp("docs")
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=SHAPE["vocab_size"], special_tokens=special, show_progress=False)
    templates = [retrieval.TASK, retrieval.NAMED_NEEDLE, retrieval.NAMED_QUESTION, *retrieval.NAMES] * 20
    words.train_from_iterator([LONG_TEXT, ASCII, *templates], trainer)  # few tokens for what short texts must hold
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for name, (model_class, config) in MODELS.items():
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    Dataset.from_list([{"text": LONG_TEXT}] * 2).to_json(folder / "books.jsonl")
    (folder / "more.jsonl").write_text((folder / "books.jsonl").read_text().splitlines()[0])
    (folder / "book.txt").write_text(LONG_TEXT)
    rows = [{"instruction": f"{LONG_TEXT[:2500]} What sings?", "output": "Birds.", "file": "a.pdf"}] * 2
    (folder / "LongAlpaca-12k.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        as_if_on_a_gpu(patch)
        patch.chdir(folder)
        original = folder / "Llama-2-7b-longlora-32k"
        original.mkdir()
        name = "meta-llama/Llama-2-7b-hf"
        trained(name, original, 32_768 // SCALE, base_name=name, target_modules=["q_proj", "v_proj"])
        write_yaml(next(block for block in BLOCKS if block.page.name == "run.md" and block.first == "# run.yaml"))
        assert main(["train", "--config", "run.yaml"]) == 0
    return folder


@pytest.fixture
def given(folder, tmp_path, monkeypatch):
    """In a fresh copy of `folder`, the names that blocks use without making them."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    as_if_on_a_gpu(monkeypatch)
    name = "meta-llama/Llama-2-7b-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    query, key, value = (torch.randn(1, heads, 512, 8) for heads in (4, 2, 2))
    return {
        **{"model": model, "tokenizer": tokenizer, "query": query, "key": key, "value": value},
        **{"documents": [LONG_TEXT] * 2, "dataset": Dataset.from_list([{"text": LONG_TEXT}] * 2)},
    }


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"{block.page.name}:{block.line}") for block in BLOCKS if block.needs is None],
)
def test_block(block, given, request, monkeypatch, capsys):
    for earlier in blocks_of(block.page):  # a file that the page has shown is there from then on
        if earlier.line < block.line and earlier.language == "yaml" and earlier.needs is None:
            write_yaml(earlier)
    if block.language == "python":
        exec(compile(block.smaller, f"{block.page.name}:{block.line}", "exec"), given)
    elif block.language == "diff":
        lines = block.smaller.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in (sign, " ")) for sign in "-+")
        ast.parse(before)
        shutil.rmtree("out")  # of another run, which keeps its folder to itself
        exec(compile(after, f"{block.page.name}:{block.line}", "exec"), given)
    elif block.language == "yaml":
        parse(write_yaml(block))
    elif block.language in ("", "bash"):
        if "hf-longlora push" in block.code:
            server = request.getfixturevalue("hub")
            monkeypatch.setenv("HF_TOKEN", request.getfixturevalue("token"))
        for command in commands(block.smaller):
            run_command(command)
            assert command[:2] != ["hf-longlora", "push"] or server.requests
    else:
        pytest.fail(f"no way to run a block of {block.language!r}")


def as_if_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """The pages leave TRL's bf16 on, which transformers takes on a CPU only if `use_cpu` is said."""
    patch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True)


def parse(file: str) -> None:
    *_, unknown = make_parser().parse_args_and_config(["--config", file], return_remaining_strings=True)
    assert not unknown


def write_yaml(block: Block) -> str:
    """A file as a page shows it, under the name in its first line; the name."""
    name = block.first.removeprefix("# ").split()[0] if block.first.startswith("# ") else "shown.yaml"
    Path(name).write_text(block.smaller)
    return name


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> None:
    """Run a command, or hold it against what it would run: launchers, make's verbs, installations."""
    match words:
        case ["hf-longlora", "demo", *_]:  # minutes; tests/test_demo.py runs a smaller one
            assert words == ["hf-longlora", "demo"]
        case ["hf-longlora", *arguments]:
            if arguments[0] in ("merge", "export"):
                shutil.rmtree(arguments[2], ignore_errors=True)
            assert main(arguments) == 0
        case ["accelerate", "launch", *arguments]:  # tests/test_cli.py runs one
            from accelerate.commands.launch import launch_command_parser

            launched = launch_command_parser().parse_args(arguments)
            assert launched.module and launched.training_script == "hf_longlora"
            assert launched.training_script_args[0] == "train"
            assert all(Path(word).is_file() for word in launched.training_script_args if word.endswith(".yaml"))
        case ["make", verb]:
            assert re.search(f"^{verb}:", (ROOT / "Makefile").read_text(), re.M)
        case ["pip", "install", what]:
            extras = re.findall(r"\[(.*)\]", what)
            text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
            assert all(re.search(f"^{extra} = ", text, re.M) for part in extras for extra in part.split(","))
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case _:
            pytest.fail(f"no way to run {words}")


def test_what_is_not_run_is_listed():
    marked = {block.first: block for block in BLOCKS if block.needs is not None}
    assert {first: block.needs for first, block in marked.items()}.keys() == NOT_RUN.keys()
    for first, need in NOT_RUN.items():
        assert need in marked[first].needs
        if marked[first].language == "python":
            ast.parse(marked[first].code)


@pytest.mark.slow
def test_trls_script_takes_the_attention_after_the_import(given, monkeypatch):
    (script,) = (block for block in BLOCKS if block.first == "# sft.py")
    (command,) = (block for block in BLOCKS if block.first.startswith("accelerate launch sft.py"))
    Path("sft.py").write_text(script.code)
    Path("data").mkdir()
    shutil.copy("books.jsonl", "data")
    arguments = shlex.split(command.code)[3:]
    arguments[arguments.index("books.jsonl")] = "data"  # TRL takes a folder
    arguments += ["--max_steps", "1", "--max_length", "256", "--per_device_train_batch_size", "1", "--use_cpu"]
    arguments += ["--bf16", "false", "--report_to", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "sft.py", *arguments]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    Path("sft.py").write_text(script.code.replace("import hf_longlora", ""))
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "s2attn" in done.stderr


def test_what_needs_a_gpu_is_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_if_on_a_gpu(monkeypatch)
    shown = [block for block in BLOCKS if block.needs is not None and block.language == "yaml"]
    assert shown
    for block in shown:
        parse(write_yaml(block))


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: hf_longlora\.(?:\w+\.)*(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert set(hf_longlora.__all__) <= set(shown)


def test_the_kernels_are_as_their_table_says():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "kernels.md").read_text(), re.M)
    shown = {name: cells.split(" | ") for name, cells in rows}
    for name, kernel in KERNELS.items():
        devices = "any" if kernel.devices is None else "CUDA"
        dtypes = "any" if kernel.dtypes is None else "bf16, fp16"
        assert ("softcap" in kernel.options) == ("learned_sinks" in kernel.options)
        able = ("dropout_p" in kernel.options, "softcap" in kernel.options, name not in UNTRIED)
        can = ["yes" if it else "no" for it in able]
        steps = f", in steps of {kernel.head_step}" if kernel.head_step > 1 else ""
        assert shown[name] == [devices, dtypes, f"{kernel.head_dim or 'any'}{steps}", *can]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", head).lower()).replace(" ", "-") for head in heads}


def test_links_and_paths_lead_somewhere():
    folders = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/**/*.md", "examples/*.md", "model_cards/**/*.md")
    pages = [*PAGES, *(page for folder in folders for page in ROOT.glob(folder))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose(page))]
    assert len(links) > 80
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
    inside = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    for page in [*pages, *ROOT.glob("examples/*.*")]:
        for path in re.findall(rf"(?<![\w/.-])((?:{inside})/[\w/.-]*\w)", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


OTHERS = {
    *("--config_file", "--num_processes", "--hf-overrides", "--max-model-len"),
    *("is_trainable", "device_map", "use_reentrant", "save_embedding_layers", "sliding_window", "output_attentions"),
    *("fsdp_state_dict_type", "allow_all_kernels", "selective", "callbacks", "gpu", "buffer_size"),
}
"""Options of other programs and arguments of functions, as the pages name them beside ours and TRL's."""


def test_the_options_named_are_there():
    runs = make_parser()
    known = {*OTHERS, *(option for action in runs._actions for option in (action.dest, *action.option_strings))}
    known |= {f.name for c in (LongLoraConfig, ContextStage, S2AttentionConfig) for f in dataclasses.fields(c)}
    known |= set(inspect.signature(PushAdapterCallback).parameters)
    commands = argparse.ArgumentParser().add_subparsers()
    for command in COMMANDS:
        command.add(commands)
    known |= {option for parser in commands.choices.values() for a in parser._actions for option in a.option_strings}
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        # In a table of another program's keys ours stand in the last column; one of errors quotes in the first.
        others = r"^\|.*\|(?=[^|]+\|$)" if page.name == "migrating.md" else r"^\| `[^|]+\|"
        text = (
            re.sub(others, "", prose(page), flags=re.M)
            if page.name in ("migrating.md", "troubleshooting.md")
            else prose(page)
        )
        for span in re.findall(r"`([^`\n]+)`", text):
            named = re.findall(r"(?<![\w-])--\w[\w-]*", span) + re.findall(r"^\{?([a-z]\w*)(?:=(?!=)|: )", span)
            assert set(named) <= known, f"{page.name}: {span}"


def test_the_names_of_ours_are_there():
    sources = [*PAGES, *ROOT.glob("*.md"), *Path(hf_longlora.__file__).parent.rglob("*.py")]
    names = {(file, name) for file in sources for name in re.findall(r"`(hf_longlora(?:\.\w+)+)", file.read_text())}
    assert len(names) > 15
    for file, name in names:
        assert pydoc.locate(name) is not None, f"{file.name}: {name}"


def test_the_defaults_said_are_the_defaults():
    run, adapter = LongLoraSFTConfig(stages=[ContextStage(8, 1)], use_cpu=True, bf16=False), LongLoraConfig()
    rate = f"{run.learning_rate:.0e}".replace("e-0", "e-")
    said = {
        "README.md": [
            f"a rate of {rate}, constant after {run.warmup_steps} steps of warm-up, and AdamW's beta2 of "
            f"{run.adam_beta2}.",
            f"`sink_tokens` is {run.sink_tokens};",
            f"{run.dense_every} by default, 0 for never.",
        ],
        "groups.md": [
            f"`sink_tokens` tokens of its document, {run.sink_tokens} by default",
            f"each k-th optimizer step is dense; {run.dense_every} by default",
            f"Its rank is the paper's {adapter.r}, and the trainer's rate {rate}",
        ],
        "migrating.md": [f"here {make_parser().get_default('lora_alpha')})", f"here {adapter.lora_alpha})"],
        "run.md": [
            f"at once, {run.per_device_eval_batch_size} by default",
            f"more where they fill less than {streams.FILLED} packed rows",
            f"the first {streams.HEAD} examples",
        ],
        "kernels.md": [
            f"more than {kernels.FEW} launches of less than {kernels.SHORT:,} tokens on average",
            f"less than {operators.PLANNED:,} tokens whose segments' length is no multiple of {operators.CHOSEN} ",
        ],
    }
    for page in PAGES:
        for words in said.get(page.name, ()):
            assert words in " ".join(page.read_text().split()), f"{page.name}: {words}"


def test_each_error_quoted_is_one_that_is_raised():
    strings = "\0".join(map(texts, Path(hf_longlora.__file__).parent.rglob("*.py"))).replace("`", "")
    quoted = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(quoted) > 40
    for message in quoted:
        for part in message.split(" ... "):
            assert part in strings, f"{part!r} of {message!r} is in no message of the package"


def texts(file: Path) -> str:
    """The strings of a source file, what is formatted into them left out as a gap."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\0".join(found)


def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch):
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.chdir(ROOT)  # mkdocstrings finds the package from here
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    reference = (tmp_path / "reference" / "index.html").read_text()
    assert "perplexity_by_length" in reference
    assert html.escape(LongLoraConfig.__dataclass_fields__["embedding_rank"].metadata["help"], False) in reference
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = set(itertools.chain.from_iterable(entry.values() for entry in nav))
    assert {page.name for page in PAGES[1:]} <= pages
