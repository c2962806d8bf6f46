"""Train the base model at its short context: a private loop, for speed; what it makes is a plain `LlamaForCausalLM`.

python -m benchmarks.quality.base --work DIR [--seconds 240]
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from .data import load_documents, load_tokenizer, train_stream

CONTEXT = 512


@dataclass(frozen=True)
class BaseRun:
    """How the base is trained. It stops at `seconds` or `max_tokens`, whichever comes first."""

    seconds: float = 240.0
    max_tokens: float = 105e6  # four passes; the loss on held-out text rises in the fifth
    batch: int = 128
    optimizer: str = "muon"
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay: float = 0.5  # share of the run in which the learning rate falls to 0
    hidden: int = 512
    layers: int = 12
    seed: int = 0
    compile: bool = True


def base_config(run: BaseRun, tokenizer: Any) -> LlamaConfig:
    """43.8 M parameters with the defaults; grouped queries: two of the four key/value heads are shifted."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=run.hidden,
        intermediate_size=run.hidden * 11 // 4,
        num_hidden_layers=run.layers,
        num_attention_heads=run.hidden // 64,
        num_key_value_heads=max(1, run.hidden // 128),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def batches(stream: torch.Tensor, run: BaseRun) -> Iterator[torch.Tensor]:
    """Windows of the stream, shuffled, cut at another offset in each pass: `[batch, CONTEXT]`."""
    generator = torch.Generator().manual_seed(run.seed)
    while True:
        offset = int(torch.randint(CONTEXT, (1,), generator=generator))
        windows = (len(stream) - offset) // CONTEXT
        order = torch.randperm(windows, generator=generator)
        rows = stream[offset : offset + windows * CONTEXT].view(windows, CONTEXT)
        for chosen in order[: windows // run.batch * run.batch].view(-1, run.batch):
            yield rows[chosen.to(stream.device)].long()


def optimizers(model: LlamaForCausalLM, run: BaseRun) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    fused = others[0].is_cuda
    if run.optimizer == "muon":
        muon = torch.optim.Muon(
            matrices, lr=run.learning_rate, weight_decay=run.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        return [
            muon,
            torch.optim.AdamW(others, lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused),
        ]
    groups = [{"params": matrices, "weight_decay": run.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, 0.95), fused=fused)]


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden[:, :-1], weight).float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train_base(work: Path, name: str, run: BaseRun) -> dict[str, Any]:
    """Train and save `work/name`; returns what is known of the run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(run.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = load_tokenizer(work)
    model = LlamaForCausalLM(base_config(run, tokenizer)).to(device)
    model.set_attn_implementation("sdpa")
    stream = train_stream(work).to(device)
    held_out = [
        torch.from_numpy(ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)).long()
        for corpus in ("books", "math")
        for ids in load_documents(work, corpus, "validation")
    ]
    held_out_rows = torch.cat(held_out)
    held_out_rows = held_out_rows[:: max(1, len(held_out_rows) // 128)][:128].to(device)

    loss_of = head_loss
    if run.compile:
        for layer in model.model.layers:
            layer.compile()
        loss_of = torch.compile(head_loss)
    optims = optimizers(model, run)
    position_ids = torch.arange(CONTEXT, device=device)[None]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            hidden = model.model(
                input_ids=ids, attention_mask=None, position_ids=position_ids, use_cache=False
            ).last_hidden_state
            return loss_of(hidden, model.lm_head.weight, ids)

    def validate() -> float:
        with torch.no_grad():
            return sum(forward(rows).item() for rows in held_out_rows.split(64)) / len(held_out_rows.split(64))

    source = batches(stream, run)
    forward(next(source)).backward()  # compile before the clock starts
    model.zero_grad()
    model.train()
    tokens, step, started, history = 0, 0, time.perf_counter(), []
    progress = 0.0
    while progress < 1:
        progress = max((time.perf_counter() - started) / run.seconds, tokens / run.max_tokens)
        factor = min(1.0, (step + 1) / run.warmup_steps, max(0.0, (1 - progress) / run.decay))
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = run.learning_rate * factor
        ids = next(source)
        loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        tokens, step = tokens + ids.numel(), step + 1
        if step % 10 == 0:
            loss_value = loss.item()  # keeps the host within ten steps of the device, and so the clock honest
            if not math.isfinite(loss_value):
                raise FloatingPointError(f"The loss of step {step} is {loss_value}.")
        if step % 200 == 0:
            history.append({"tokens": tokens, "train": loss_value, "validation": validate()})
            seconds = time.perf_counter() - started
            print(f"{step} {seconds:.0f} s {tokens / 1e6:.1f} M tokens {history[-1]}", flush=True)
    seconds = time.perf_counter() - started
    saved = LlamaForCausalLM(model.config)
    saved.load_state_dict({name.replace("_orig_mod.", ""): p for name, p in model.state_dict().items()})
    saved.bfloat16().save_pretrained(work / name)  # as bases are published
    known = {
        "id": fingerprint(saved),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "tokens": tokens,
        "epochs": tokens / len(stream),
        "steps": step,
        "seconds": seconds,
        "validation_loss": validate(),
        "history": history,
        "run": asdict(run),
    }
    (work / name / "base.json").write_text(json.dumps(known, indent=2))
    print(json.dumps({k: v for k, v in known.items() if k != "history"}), flush=True)
    return known


def fingerprint(model: torch.nn.Module) -> str:
    """Which base this is, so that rows of two bases are never compared unawares."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what `prepare` wrote; the base is saved beside it")
    parser.add_argument("--name", default="base", help="folder of the base in the work directory")
    defaults = BaseRun()
    for field, value in asdict(defaults).items():
        option = "--" + field.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    args = vars(parser.parse_args())
    train_base(args.pop("work"), args.pop("name"), BaseRun(**args))


if __name__ == "__main__":
    main()
