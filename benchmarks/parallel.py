"""One sequence over several GPUs: equal to one process, and seconds, memory and communication of a training step.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.parallel --check
    torchrun --standalone --nproc-per-node 2 -m benchmarks.parallel --preset x2
    torchrun --standalone --nproc-per-node 4 -m benchmarks.parallel --runs sparse-2048@131072@1 sparse-2048@524288

`--check`: a small model in bf16 (and fp32) on whole rows in each process, and on shards of them over all: losses and
gradients, of sparse and dense steps, of one document, packed ones and padded ones. Ends with an error if they differ.

A run is METHOD@TOKENS, all of them together, and @PROCESSES if not all: the first ones then share the sequence, and
the others wait. One process has whole rows. A method is

    sparse-2048     groups of 2,048, with 4 first tokens that all groups see; or any number, or n/16
    dense           our dense steps: tokens exchanged for heads
    ulysses-sdpa    what accelerate's sp_backend="deepspeed" puts into a model, DeepSpeed's UlyssesSPAttentionHF around
                    transformers' attention of that name (or ulysses-flash_attention_4, ...); for all processes alone

and `+offload=0.5` behind it sends that share of the layers' checkpoints to the host (1 is all).

The model is that of `benchmarks.train_step`: a random Llama-3 shape in bf16, LoRA r = 8 on q, k, v, o, embeddings and
norms trained on fp32 masters, gradient checkpointing, TRL's chunked loss, AdamW, one document of random tokens. There
is no engine: each process has all weights, and gradients are summed over those that share the sequence.

A step is timed from its beginning, where all have met, to the end of the slowest. `exchange_s` is the time that a
process's computation stood still for an exchange (by CUDA events on its stream, waiting for the others included; the
largest of the processes), `reduce_s` that of adding up gradients. `nccl_s` is what NCCL's kernels took, waiting or
not, of one more step (`--profile`).
"""

import argparse
import math
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Lengths share a process, and what one leaves in the allocator's cache must not cost the next its memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", os.environ["PYTORCH_ALLOC_CONF"])

import torch
import torch.distributed as dist

from .provenance import RESULTS, append_row, provenance, read_rows
from .step_methods import SHAPES, build_model
from .train_step import WARM_UP, synchronize

CUDA = torch.cuda.is_available()
LIMIT = timedelta(minutes=5)
"""After which a process that waits for another one fails."""


class Run(NamedTuple):
    """A method at a length, over the first `processes` of all."""

    method: str
    tokens: int
    processes: int

    @classmethod
    def parse(cls, text: str, size: int) -> "Run":
        """What `METHOD@TOKENS` or `METHOD@TOKENS@PROCESSES` says."""
        method, *numbers = text.split("@")
        if len(numbers) not in (1, 2) or not all(number.isdigit() for number in numbers):
            raise SystemExit(f"{text!r}: a run is METHOD@TOKENS or METHOD@TOKENS@PROCESSES.")
        tokens, processes = int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else size
        if not 1 <= processes <= size or tokens % processes:
            raise SystemExit(f"{text!r}: there are {size} processes, and tokens have to divide by those of the run.")
        if Method.parse(method).theirs and processes != size:
            raise SystemExit(f"{text!r}: DeepSpeed's groups are of all processes here.")
        return cls(method, tokens, processes)


@dataclass(frozen=True)
class Method:
    """What a name like `sparse-2048+offload=0.5` says."""

    base: str
    offload: float

    @classmethod
    def parse(cls, name: str) -> "Method":
        base, *options = name.split("+")
        if not re.fullmatch(r"dense|sparse-(n/\d+|\d+)|ulysses-\w+", base):
            raise SystemExit(f"There is no method {name!r}: sparse-2048, sparse-n/16, dense or ulysses-sdpa.")
        shares = [float(option[8:]) for option in options if re.fullmatch(r"offload=[\d.]+", option)]
        if len(shares) != len(options) or len(shares) > 1 or not all(0 < share <= 1 for share in shares):
            raise SystemExit(f"{name!r}: behind + there is offload=SHARE, above 0 and at most 1.")
        return cls(base, shares[0] if shares else 0.0)

    @property
    def theirs(self) -> str:
        """The attention of transformers that DeepSpeed's is around; empty where it is ours."""
        return self.base.removeprefix("ulysses-") if self.base.startswith("ulysses-") else ""

    def group_at(self, length: int) -> int:
        """Tokens in a group; 0 for dense attention."""
        size = self.base.removeprefix("sparse-")
        if size.startswith("n/"):
            return math.ceil(length / int(size[2:]))
        return int(size) if size.isdigit() else 0


def preset(name: str, size: int) -> list[str]:
    """Runs for a machine with `size` GPUs, what matters most first: a budget may end before the list does."""
    if name == "tiny":
        return [
            "sparse-64@256@1",
            f"sparse-64@{256 * size}",
            f"sparse-n/16@{256 * size}",
            f"dense@{256 * size}",
            f"ulysses-sdpa@{256 * size}",
        ]
    if name == "x2":  # two cards of 80 GB, and 256 GiB of host memory
        return [
            "sparse-2048@131072@1",
            "sparse-2048@262144",
            "sparse-n/16@262144",
            "dense@131072",
            "ulysses-sdpa@131072",
            "sparse-2048+offload=0.7@524288",
        ]
    if name == "weak":  # equal tokens a card
        counts = [count for count in (1, 2, 4, 8) if count <= size]
        return [f"{method}@{131072 * count}@{count}" for method in ("sparse-2048", "sparse-n/16") for count in counts]
    assert name == "million"  # two cards of 141 GB and 256 GiB of host memory, or four
    return ["sparse-2048+offload=0.6@1048576", "sparse-n/16+offload=0.6@1048576"]


# --------------------------------------------------------------------------------------------------------------------
# Exchanges


class Exchanges:
    """What the processes send each other in a forward and backward, and how long each stands still for it.

    It stands in the place of `torch.distributed`'s functions, so that ours and DeepSpeed's are measured alike.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from 0 again."""
        self.bytes = 0
        """Sent to others."""
        self._stalls: list[tuple[Any, Any]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        swap, gather = dist.all_to_all_single, dist.all_gather

        def all_to_all_single(
            output: torch.Tensor,
            input: torch.Tensor,
            output_split_sizes: list[int] | None = None,
            input_split_sizes: list[int] | None = None,
            group: Any = None,
            async_op: bool = False,
        ) -> Any:
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            rows = len(input)
            kept = rows // size if not input_split_sizes else input_split_sizes[rank]
            self.bytes += input.nbytes * (rows - kept) // max(rows, 1)
            return self._run(
                lambda: swap(output, input, output_split_sizes, input_split_sizes, group, async_op), async_op
            )

        def all_gather(tensor_list: Any, tensor: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
            self.bytes += tensor.nbytes * (dist.get_world_size(group) - 1)
            return self._run(lambda: gather(tensor_list, tensor, group, async_op), async_op)

        dist.all_to_all_single, dist.all_gather = all_to_all_single, all_gather
        try:
            yield
        finally:
            dist.all_to_all_single, dist.all_gather = swap, gather

    def _run(self, function: Callable[[], Any], async_op: bool) -> Any:
        return _Waited(function(), self) if async_op else self.stalled(function)

    def stalled(self, function: Callable[[], Any]) -> Any:
        """Call what the process's computation waits for."""
        start = _now()
        found = function()
        self._stalls.append((start, _now()))
        return found

    def seconds(self) -> float:
        """How long the process has stood still; the device has to be synchronized."""
        if CUDA:
            return sum(start.elapsed_time(end) for start, end in self._stalls) / 1e3
        return sum(end - start for start, end in self._stalls)


class _Waited(NamedTuple):
    """An exchange on its way."""

    work: Any
    exchanges: Exchanges

    def wait(self) -> Any:
        return self.exchanges.stalled(self.work.wait)


def _now() -> Any:
    """A moment of the computation: on a GPU, of its stream."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# --------------------------------------------------------------------------------------------------------------------
# Equal to one process


class Case(NamedTuple):
    """Rows of a small model: documents by their share of the row, or pads, and the step's attention."""

    name: str
    group_size: int | None
    heads: tuple[int, int] = (8, 2)
    documents: tuple[float, ...] = (1.0,)
    pads: bool = False


CASES = [
    Case("one document, groups of 64", 64),
    Case("one document, groups of n/2 + 1", 0),
    Case("one document, dense", None),
    Case("one document, dense, 9 and 3 heads", None, (9, 3)),
    Case("one document, groups of 100, 9 and 3 heads", 100, (9, 3)),
    Case("packed documents, groups of 64", 64, documents=(0.3, 0.01, 0.45, 0.24)),
    Case("packed documents, dense", None, documents=(0.3, 0.01, 0.45, 0.24)),
    Case("padded rows, groups of 64", 64, pads=True),
    Case("padded rows, dense", None, pads=True),
]


def small_batch(case: Case, length: int) -> dict[str, torch.Tensor]:
    """Two rows `[2, length]`, labels shifted; the first third is without labels."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 512, (2, length), generator=generator)
    labels, positions, mask = ids.clone(), torch.zeros_like(ids), torch.ones_like(ids)
    ends = [round(length * sum(case.documents[: i + 1])) for i in range(len(case.documents))]
    for start, end in zip([0, *ends], ends, strict=False):
        positions[:, start:end] = torch.arange(end - start)
        labels[:, start] = -100
    labels[:, : length // 3] = -100
    if case.pads:
        mask[0, : length // 5], mask[1, length - length // 4 :] = 0, 0
        positions[0] = (torch.arange(length) - length // 5).clamp(min=0)
        labels[mask == 0] = -100
    labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    return {"input_ids": ids, "position_ids": positions, "labels": labels} | (
        {"attention_mask": mask} if case.pads else {}
    )


def small_model(case: Case, dtype: torch.dtype, device: str, length: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_longlora import S2AttentionConfig, set_s2_attention
    from hf_longlora.attention import set_attention_mode

    torch.manual_seed(0)
    heads, kv_heads = case.heads
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64 * heads,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=length,
    )
    model: Any = LlamaForCausalLM(config).to(device, dtype)
    group_size = length // 2 + 1 if case.group_size == 0 else case.group_size
    set_s2_attention(model, S2AttentionConfig(group_size=group_size or 64))
    set_attention_mode(model, "dense" if case.group_size is None else "auto")
    return model.train()


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a batch's losses, and its gradient: all weights' in one, in fp32."""
    labels = batch["labels"].flatten()
    logits = model(**{key: x for key, x in batch.items() if key != "labels"}, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels, reduction="sum")
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters()])


def check(group: dist.ProcessGroup, device: str, results: Path) -> bool:
    """Whether shards over a group are whole rows in one process; a row for each case.

    bf16 rounds, and sums add up in another order over shards: both are held against one process in fp32, and shards
    may be half as far again from it.
    """
    from hf_longlora.parallel import shard_sequences

    size, rank = dist.get_world_size(group), dist.get_rank(group)
    fine = True
    for case in CASES:
        length = 256 * size
        batch = {key: x.to(device) for key, x in small_batch(case, length).items()}
        own = {key: x.chunk(size, dim=1)[rank].contiguous() for key, x in batch.items()}
        exact = loss_and_gradients(small_model(case, torch.float32, device, length), batch)
        for dtype in (torch.float32, torch.bfloat16):
            whole = loss_and_gradients(small_model(case, dtype, device, length), batch)
            model = small_model(case, dtype, device, length)
            shard_sequences(model, group)
            found = loss_and_gradients(model, own)
            for x in found:
                dist.all_reduce(x, group=group)
            errors = [
                [float((a - b).norm() / b.norm()) for a, b in zip(x, exact, strict=True)] for x in (whole, found)
            ]
            near = all(
                b <= max(1.5 * a, 1e-5 if dtype == torch.float32 else 2e-3) for a, b in zip(*errors, strict=True)
            )
            agreed = torch.tensor(int(near), device=device)
            dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
            status = "ok" if agreed else "differs"
            fine = fine and status == "ok"
            if rank == 0:
                row = {"case": case.name, "backend": dist.get_backend(group), "processes": size, "tokens": length}
                row |= {"dtype": str(dtype).removeprefix("torch."), "status": status}
                names = ("loss_error_whole", "gradient_error_whole", "loss_error", "gradient_error")
                row |= dict(zip(names, [*errors[0], *errors[1]], strict=True))
                append_row(results, row | provenance())
                print(
                    f"{case.name:42} {row['dtype']:8} {status:8} one process: loss {errors[0][0]:.1e}, gradient "
                    f"{errors[0][1]:.1e}; {size} processes: {errors[1][0]:.1e}, {errors[1][1]:.1e}",
                    flush=True,
                )
    return fine


# --------------------------------------------------------------------------------------------------------------------
# Steps


class Bench:
    """A model, and steps of it over the first processes.

    Args:
        name: Its shape, of `benchmarks.train_step`.
        longest: Tokens of the longest run.
        tile: Tokens that an MLP takes at a time; 0 for all.
        liger: Whether norms, RoPE and activations are Liger's.
    """

    def __init__(self, name: str, longest: int, tile: int, liger: bool) -> None:
        from peft import get_peft_model
        from trl.trainer.utils import add_fused_lm_head

        from hf_longlora import LongLoraConfig, set_s2_attention
        from hf_longlora.trainer.tiles import tile_mlps

        self.name, self.rank, self.size = name, dist.get_rank(), dist.get_world_size()
        self.tile, self.liger = tile, liger
        self.device = f"cuda:{torch.cuda.current_device()}" if CUDA else "cpu"
        torch.manual_seed(0)  # the same weights in all
        model = build_model(name, longest, "s2attn", False)
        add_fused_lm_head(model)
        self.inner = model
        self.model: Any = get_peft_model(model, LongLoraConfig(r=8, lora_alpha=16))
        self.model.base_model.upcast_masters()
        set_s2_attention(self.model)
        if tile:
            tile_mlps(self.model, tile)
        if liger:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self.model, {"fused_linear_cross_entropy": False, "swiglu": not tile})
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=2e-5, fused=CUDA)
        self._offloads: dict[float, Any] = {}
        self._ulysses = ""  # what DeepSpeed's attention is around, once it is registered
        # Groups are made by all processes, and before they are needed.
        self.groups = {n: dist.new_group(list(range(n)), timeout=LIMIT) for n in range(2, self.size + 1)}
        self.meeting = dist.new_group(backend="gloo", timeout=LIMIT)  # where waiting takes no GPU's time

    def use(self, run: Run) -> None:
        """Give the model the attention of a run."""
        from hf_longlora import S2AttentionConfig, set_s2_attention
        from hf_longlora.attention import set_attention_mode
        from hf_longlora.parallel import shard_sequences

        method = Method.parse(run.method)
        if method.theirs:
            self.inner.set_attn_implementation(method.theirs)
            if self._ulysses != method.theirs:
                register_ulysses(self.inner, method.theirs, self.size)
                self._ulysses = method.theirs
            return
        set_s2_attention(self.model, S2AttentionConfig(group_size=method.group_at(run.tokens) or None))
        shard_sequences(self.model, self.groups.get(run.processes))
        set_attention_mode(self.model, "auto" if method.group_at(run.tokens) else "dense")

    def batch(self, run: Run) -> dict[str, torch.Tensor]:
        """This process's shard of a document of random tokens; labels shifted before it is cut."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(4, self.inner.config.vocab_size, (1, run.tokens), generator=generator)
        whole = {
            "input_ids": ids,
            "shift_labels": torch.nn.functional.pad(ids, (0, 1), value=-100)[:, 1:],
            "position_ids": torch.arange(run.tokens).unsqueeze(0),
        }
        return {key: x.chunk(run.processes, dim=1)[self.rank].to(self.device) for key, x in whole.items()}

    def step(self, run: Run, batch: dict[str, torch.Tensor], exchanges: Exchanges, reduced: Exchanges) -> torch.Tensor:
        """One optimizer step of the processes of a run; the loss of all."""
        from peft.helpers import disable_input_dtype_casting

        precision = torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext()
        with exchanges.watched(), self._offloaded(run):
            with disable_input_dtype_casting(self.model, active=CUDA), precision:
                out = self.model(**batch, fused_lm_head=True, num_items_in_batch=run.tokens - 1)
            out.loss.backward()
        loss = out.loss.detach()
        if run.processes > 1:
            group = self.groups[run.processes]
            for x in (loss, *(p.grad for p in self.trained)):
                reduced.stalled(lambda x=x: dist.all_reduce(x, group=group))
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def _offloaded(self, run: Run) -> AbstractContextManager[Any]:
        share = Method.parse(run.method).offload
        if share == 0 or not CUDA:
            return nullcontext()
        from hf_longlora.trainer.offload import PartialOffload

        if share not in self._offloads:  # one for all steps, as in a trainer
            self._offloads[share] = PartialOffload(share)
            self._offloads[share].update_model_params(self.model)
        return self._offloads[share]

    def measure(self, run: Run, steps: int, warm: int, profile: bool, results: Path | None) -> None:
        """Warm-up steps and timed ones, and a row of them if there is a file for it."""
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_peak_host_memory_stats()
        dist.barrier(self.meeting)
        if self.rank < run.processes:
            self._measure(run, steps, warm, profile, results)
        dist.barrier(self.meeting)

    def _measure(self, run: Run, steps: int, warm: int, profile: bool, results: Path | None) -> None:
        from hf_longlora import S2AttentionConfig

        seconds, stalls, reductions, sent = [], [], [], 0.0
        loss = torch.tensor(math.nan)
        self.use(run)
        batch = self.batch(run)
        for number in range(warm + steps):
            exchanges, reduced = Exchanges(), Exchanges()
            synchronize()
            if run.processes > 1:
                dist.all_reduce(torch.zeros(1, device=self.device), group=self.groups[run.processes])
            synchronize()
            started = time.perf_counter()
            loss = self.step(run, batch, exchanges, reduced)
            synchronize()
            elapsed = self._largest(run, [time.perf_counter() - started, exchanges.seconds(), reduced.seconds()])
            self.say(f"  {run.tokens:9,} tokens: {elapsed[0]:.3f} s{' (warm-up)' if number < warm else ''}")
            if number >= warm:
                for found, x in zip((seconds, stalls, reductions), elapsed, strict=True):
                    found.append(x)
                sent = exchanges.bytes / 2**30
        if results is None:
            return
        nccl = self._profiled(run, batch) if profile and CUDA else ""
        memory = self._memory(run)
        quantiles = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        if self.rank == 0:
            method, middle = Method.parse(run.method), quantiles[1]
            stall, reduction = (torch.tensor(x).median().item() for x in (stalls, reductions))
            row = {
                "method": run.method,
                "model": self.name,
                "tokens": run.tokens,
                "processes": run.processes,
                "group": method.group_at(run.tokens),
                "sink_tokens": S2AttentionConfig.sink_tokens if method.group_at(run.tokens) else 0,
                "kernel": method.theirs or own_kernel(),
                "liger": int(self.liger),
                "mlp_tile": self.tile,
                "status": "ok" if loss.isfinite() else "loss not finite",
                **dict(zip(("s_p20", "s_p50", "s_p80"), quantiles, strict=True)),
                "steps": len(seconds),
                "warm": warm,
                "tokens_per_s": run.tokens / middle,
                "exchange_s": stall,
                "exchange_share": stall / middle,
                "reduce_s": reduction,
                "nccl_s": nccl,
                "sent_gib": sent,
                "loss": float(loss),
                **memory,
                "backend": dist.get_backend(self.groups[self.size]) if self.size > 1 else "none",
            }
            append_row(results, row | provenance())
            print(describe(row), flush=True)

    def _largest(self, run: Run, numbers: Sequence[float]) -> list[float]:
        found = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if run.processes > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.groups[run.processes])
        return found.tolist()

    def _memory(self, run: Run) -> dict[str, float]:
        """GiB: the largest of a card's, and the host's of all processes of a run."""
        row = {"peak_gpu_gib": 0.0, "peak_reserved_gib": 0.0, "pinned_gib": 0.0}
        if CUDA:
            row["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
            row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
            row["pinned_gib"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 2**30
        row["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        largest = self._largest(run, list(row.values()))
        summed = torch.tensor(list(row.values()), dtype=torch.float64, device=self.device)
        if run.processes > 1:
            dist.all_reduce(summed, group=self.groups[run.processes])
        return dict(zip(row, [*largest[:2], *summed.tolist()[2:]], strict=True))

    def _profiled(self, run: Run, batch: dict[str, torch.Tensor]) -> float:
        """What NCCL's kernels take of a step, but for the gradients'; the largest of the processes."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.step(run, batch, Exchanges(), Exchanges())
            synchronize()
        kernels = [event for event in profiler.key_averages() if event.key.startswith("ncclDevKernel")]
        took = sum(event.self_device_time_total for event in kernels if "AllReduce" not in event.key) / 1e6
        return self._largest(run, [took])[0]

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def register_ulysses(model: Any, attention: str, size: int) -> None:
    """Put DeepSpeed's attention into a model, as accelerate does."""
    import deepspeed  # type: ignore[import-not-found]
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF  # type: ignore[import-not-found]

    deepspeed.init_distributed(dist_backend=dist.get_backend())
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=attention, sequence_parallel_size=size, micro_batch_size=1
    )


def own_kernel() -> str:
    """Ours that serves bf16 on this machine."""
    from hf_longlora.attention.kernels import preference

    return preference()[0]


def describe(row: dict[str, Any]) -> str:
    return (
        f"{row['model']} {row['tokens']:9,} tokens on {row['processes']}  {row['method']:28} {row['s_p50']:8.3f} s a "
        f"step  exchange {row['exchange_s']:.3f} s ({100 * row['exchange_share']:.1f}%), {row['sent_gib']:.2f} GiB "
        f"sent; gradients {row['reduce_s']:.3f} s  {row['peak_gpu_gib']:.1f} GiB a card (host "
        f"{row['host_gib']:.1f}, pinned {row['pinned_gib']:.1f})  loss {row['loss']:.4f}"
    )


def summarize(rows: Sequence[dict[str, str]]) -> None:
    """Steps of several processes against one with as many tokens a card."""
    times = {(r["method"], int(r["tokens"]), int(r["processes"])): float(r["s_p50"]) for r in rows}
    for (method, tokens, processes), seconds in times.items():
        one = times.get((method, tokens // processes, 1))
        if one is not None and processes > 1:
            each = f"{method} at {tokens // processes:,} tokens a card"
            print(f"{each}: {processes} cards take {seconds / one:.3f} of one's time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="first of all, whether shards equal one process")
    parser.add_argument("--preset", choices=["tiny", "x2", "weak", "million"])
    parser.add_argument("--runs", nargs="*", default=[], help="METHOD@TOKENS[@PROCESSES], after those of a preset")
    parser.add_argument("--model", choices=list(SHAPES), help="default: tiny without a GPU, else 8b")
    parser.add_argument("--steps", type=int, default=3, help="timed")
    parser.add_argument("--warm", type=int, default=1, help="steps before those")
    parser.add_argument("--tile", type=int, default=8192, help="tokens that an MLP takes at a time; 0 for all")
    parser.add_argument("--liger", action="store_true", help="Liger's norms, RoPE and activations")
    parser.add_argument("--profile", action="store_true", help="one more step, under the profiler")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no run is started")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the tables' folder")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --standalone --nproc-per-node GPUS -m benchmarks.parallel ...")
    if args.steps < 1:
        parser.error("--steps is at least 1")
    end = time.monotonic() + args.seconds
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=LIMIT)
    try:
        work(args, end)
    except torch.OutOfMemoryError as error:
        # The others may wait for this one: torchrun ends them.
        print(f"process {dist.get_rank()}: out of memory. {error}", file=sys.stderr, flush=True)
        os._exit(1)
    dist.destroy_process_group()


def work(args: argparse.Namespace, end: float) -> None:
    size = dist.get_world_size()
    runs = [Run.parse(text, size) for text in [*(preset(args.preset, size) if args.preset else []), *args.runs]]
    if len({method for run in runs if (method := Method.parse(run.method).theirs)}) > 1:
        raise SystemExit("DeepSpeed's attention can be around one of transformers' in a process.")
    if args.check:
        device = f"cuda:{torch.cuda.current_device()}" if CUDA else "cpu"
        if not check(dist.new_group(timeout=LIMIT), device, args.results / "parallel_check.csv"):
            raise SystemExit("Shards differ from one process.")
    if not runs:
        return
    since = time.perf_counter()
    bench = Bench(args.model or ("8b" if CUDA else "tiny"), max(run.tokens for run in runs), args.tile, args.liger)
    bench.say(f"ready after {time.perf_counter() - since:.0f} s")
    # Libraries load and kernels compile in the first steps, of one process and of all.
    short = WARM_UP if CUDA else 64
    for processes in sorted({run.processes for run in runs}):
        bench.measure(Run("sparse-32", short * processes, processes), 1, 0, False, None)
    rows = args.results / "parallel.csv"
    before = len(read_rows(rows))
    for run in runs:
        late = torch.tensor(int(time.monotonic() > end))
        dist.broadcast(late, 0, group=bench.meeting)
        if late:
            bench.say(f"{run.method}@{run.tokens}: not started, the time is up")
            continue
        bench.say(f"{run.method} ({bench.name}; {run.tokens:,} tokens on {run.processes})")
        bench.measure(run, args.steps, args.warm, args.profile, rows)
    if bench.rank == 0:
        summarize(read_rows(rows)[before:])


if __name__ == "__main__":
    main()
