"""What importing the package loads, and what it leaves for later. Each in a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_longlora

SOURCE = Path(hf_longlora.__file__)


def run(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_registers_and_loads_no_trainer():
    code = (
        "import sys, transformers, peft\n"  # these load httpx in some versions, and that rich where it is installed
        "before = set(sys.modules)\n"
        "import hf_longlora\n"
        "print(*({'trl', 'datasets', 'rich', 'matplotlib'} & set(sys.modules) - before))\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING\n"
        "from transformers import AttentionInterface, AttentionMaskInterface\n"
        "assert 's2attn' in AttentionInterface() and 's2attn' in AttentionMaskInterface()\n"
        "assert 'LONGLORA' in {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}\n"
    )
    assert run(code).strip() == ""


def test_help_loads_no_library():
    code = (
        "import sys\n"
        "from hf_longlora_command import main\n"
        "sys.argv[0] = 'hf-longlora'\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as stopped:\n"
        "    assert stopped.code == 0\n"
        "print('loaded:', *(name for name in ('torch', 'transformers', 'peft', 'trl') if name in sys.modules))\n"
    )
    shown = run(code, "--help")
    assert "evaluate" in shown and shown.endswith("loaded:\n")
    for command in ("check", "plan", "evaluate", "merge", "push", "import", "demo"):
        assert run(code, command, "--help").endswith("loaded:\n"), command


def test_a_command_finds_what_it_needs_registered(tiny_llama, tiny_tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    code = (
        "import sys\n"
        "from hf_longlora_command import main\n"
        "assert main() == 0\n"
        "from transformers import AttentionInterface\n"
        "assert 's2attn' in AttentionInterface() and 'trl' not in sys.modules\n"
    )
    assert "RoPE" in run(code, "check", str(tmp_path), "--target-length", "256")


def test_type_checkers_see_the_names_that_there_are():
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    homes = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(homes) == hf_longlora.__all__
    for name, room in homes.items():
        module = getattr(hf_longlora, room)
        assert getattr(hf_longlora, name) is getattr(module, name)
        assert name in module.__all__ and name in dir(hf_longlora)
    with pytest.raises(AttributeError, match="no attribute 'LongLora'"):
        hf_longlora.LongLora  # noqa: B018
