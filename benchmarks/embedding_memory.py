"""What trained embeddings cost: `python -m benchmarks.embedding_memory` appends to `results/embedding_memory.csv`.

For each way to train them: the numbers that are trained, what they take in fp32 with gradients and AdamW's two states,
and how many tensors of the embedding's size a training step makes beside (a weight's casts and gradients), at most at
one time. The last comes from the allocations in a step of a small model in bf16, with TRL's fused head.
"""

import argparse
import gc
from typing import Any

import torch
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer  # noqa: F401 (imports the kernels' module in full)
from trl.trainer.sft_trainer import add_fused_lm_head

from hf_longlora import LongLoraConfig

from .provenance import RESULTS, append_row, provenance

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "embedding_rank=8": {"embedding_rank": 8},
    "trainable_token_indices, 16 tokens": {"trainable_token_indices": list(range(16))},
    "train_embeddings=False": {"train_embeddings": False},
}


class Census:
    """Counts the allocations of some sizes, in bytes, and how many of them live at one time.

    By the profiler. A dispatch mode that looks at operators' arguments holds references to them, and autograd, which
    adds up gradients in place where it has the last one, then makes a sum of its own.
    """

    peak = 0

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "Census":
        gc.collect()  # what an earlier model leaves would be freed inside
        self.profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profiler.__exit__(*error)
        events = [event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        live = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if abs(event.nbytes()) in self.sizes:
                live += 1 if event.nbytes() > 0 else -1
                self.peak = max(self.peak, live)


def measure(way: str, tied: bool, vocabulary: int, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    model = get_peft_model(LlamaForCausalLM(config).bfloat16(), LongLoraConfig(**WAYS[way]))
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs",))
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "embed_tokens" in n]
    numbers = sum(p.numel() for p in trained)
    tokens = torch.randint(0, vocabulary, (1, 64))
    census = Census(2 * vocabulary * width, 4 * vocabulary * width)
    model.train()
    with census, torch.autocast("cpu", torch.bfloat16):
        out = model(tokens, labels=tokens, fused_lm_head=True)
        (-out.log_probs.mean()).backward()
    return {
        "way": way,
        "tied": tied,
        "vocabulary": vocabulary,
        "width": width,
        "trained_numbers": numbers,
        "weights_gradients_states_mib": 16 * numbers / 2**20,  # fp32, four times
        "peak_tensors_of_its_size_in_a_step": census.peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    for tied in (False, True):
        for way in WAYS:
            row = measure(way, tied, options.vocabulary, options.width)
            print(row)
            append_row(RESULTS / "embedding_memory.csv", row | provenance())


if __name__ == "__main__":
    main()
