"""What a user has who installs the wheel and nothing else: `make wheel-test` runs it in an empty environment.

    python -I installed.py COMMAND

COMMAND is `hf-longlora` as it was installed. The folder that it is run in is written to.
"""

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_longlora

BASE = "base"
TEXT = "The quick brown fox jumps over the lazy dog, and a long book has many chapters. "
RUN = f"""\
model_name_or_path: {BASE}
dataset_name: books.jsonl
output_dir: out
stages: [{{max_length: 256, max_steps: 2}}, {{max_length: 512, max_steps: 2}}]
packing: true
packing_strategy: wrapped
per_device_train_batch_size: 1
use_cpu: true
bf16: false
report_to: none
"""


def check_files() -> None:
    """Metadata and files are those of a typed package, with nothing beside it."""
    installed = distribution("hf-longlora")
    assert installed.version == hf_longlora.__version__
    about = installed.metadata
    assert about["Requires-Python"] == ">=3.10" and about["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert set(about.get_all("Provides-Extra")) >= {"flash", "quantization", "plot", "dev"}
    assert about["Description-Content-Type"] == "text/markdown" and "LongLoRA" in about.get_payload()
    files = {str(file) for file in installed.files or ()}
    assert {"hf_longlora/py.typed", "hf_longlora/hub/card.md", "hf_longlora/hub/plain_lora.md"} <= files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    places = {file.partition("/")[0] for file in files if not file.startswith("..")} - {"__pycache__"}
    assert places == {"hf_longlora", "hf_longlora_command.py", f"hf_longlora-{installed.version}.dist-info"}, places
    assert Path(hf_longlora.__file__).is_relative_to(sys.prefix), hf_longlora.__file__


def make_base() -> None:
    """A tiny Llama of 64 tokens, and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(BASE)
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(**shape, vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=64)
    LlamaForCausalLM(config).save_pretrained(BASE)


def main(command: str) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    check_files()
    make_base()
    Path("books.jsonl").write_text("\n".join(json.dumps({"text": f"{i}: {TEXT * 20}"}) for i in range(8)))
    Path("book.txt").write_text(TEXT * 40)
    Path("run.yaml").write_text(RUN)
    assert run("--version").strip() == f"hf-longlora {hf_longlora.__version__}"
    for name in ("demo", "check", "plan", "train", "evaluate", "merge", "export", "push", "import"):
        assert name in run("--help") and "usage:" in run(name, "--help")
    assert "abf" in run("check", BASE, "--target-length", "512").lower()
    assert "GiB" in run("plan", "--config", "run.yaml", "--gpu", "H100")
    run("train", "--config", "run.yaml")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.html"} <= {
        path.name for path in Path("out").iterdir()
    }
    run("train", "--config", "run.yaml", "--output_dir", "streamed", "--dataset_streaming", "true")
    run("evaluate", "out", "--documents", "book.txt", "--lengths", "128", "512", "--device", "cpu")
    run("merge", "out", "merged")
    run("export", "out", "lora", "--form", "lora")
    ids = torch.arange(3, 203)[None]
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert merged.config.max_position_embeddings == 512
    print(f"hf-longlora {hf_longlora.__version__} works as it was installed, in {sys.prefix}")


if __name__ == "__main__":
    main(sys.argv[1])
