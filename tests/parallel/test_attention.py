"""Several processes with a shard each are one with the whole rows: outputs and gradients, in fp64."""

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from hf_longlora import s2_attention
from hf_longlora.attention import Documents
from hf_longlora.attention.kernels import KERNELS
from hf_longlora.parallel import Shards
from hf_longlora.parallel import s2_attention as sharded_s2_attention
from hf_longlora.parallel.shards import localize

from ..attention.oracle import oracle
from ..attention.test_kernels import RUNS, TOLERANCE


@dataclass
class Case:
    """A call over `lengths`, the tokens of each process."""

    lengths: list[int]
    heads: tuple[int, int] = (4, 2)
    batch: int = 1
    group_size: int | None = 8
    sink_tokens: int = 4
    rows: list[list[tuple[int, int]]] | None = None  # documents, with padding between them
    cu_seqlens: list[int] | None = None
    kernel: str = "sdpa"
    widths: tuple[int, int] = (8, 8)
    dtype: torch.dtype = torch.float64
    told: dict[str, torch.Tensor] = field(init=False)
    tensors: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        total, (heads, kv_heads), (width, value_width) = sum(self.lengths), self.heads, self.widths
        generator = torch.Generator().manual_seed(total)
        shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width)]
        self.tensors = [
            torch.randn(self.batch, total, n, d, generator=generator, dtype=torch.float64)
            .to(self.dtype)
            .transpose(1, 2)
            for n, d in shapes
        ]
        self.told = {}
        if self.rows is not None:
            mask, positions = (torch.zeros(self.batch, total, dtype=torch.long) for _ in range(2))
            for row, spans in enumerate(self.rows):
                for start, end in spans:
                    mask[row, start:end], positions[row, start:end] = 1, torch.arange(end - start)
            self.told = {"attention_mask": mask, "position_ids": positions}

    @property
    def options(self) -> dict[str, Any]:
        given: dict[str, Any] = {"group_size": self.group_size, "sink_tokens": self.sink_tokens, "kernel": self.kernel}
        if self.cu_seqlens is not None:
            given["cu_seqlens"] = torch.tensor(self.cu_seqlens)
        return given

    @property
    def documents(self) -> Documents:
        told = {"cu_seqlens": self.options.get("cu_seqlens"), **self.told}
        return Documents.find(self.batch, sum(self.lengths), **told)

    def shard(self, x: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        return x.split(self.lengths, dim)[rank]


def run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, attend: Any
) -> list[torch.Tensor]:
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)]


def in_a_process(group: dist.ProcessGroup, case: Case, times: int = 1) -> list[torch.Tensor]:
    rank = dist.get_rank(group)
    told = {name: case.shard(x, rank, 1) for name, x in case.told.items()}
    found = []
    for _ in range(times):
        found.append(
            run(
                *(case.shard(x, rank, 2) for x in case.tensors),
                lambda *x: sharded_s2_attention(*x, group=group, **told, **case.options),
            )
        )
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
    return found[0]


def check(processes, case: Case, times: int = 1, bound: float = 1e-9) -> None:
    parts = processes.run(len(case.lengths), in_a_process, case, times)
    got = [torch.cat(shards, dim=2) for shards in zip(*parts, strict=True)]
    rows = [list(row) for row in case.documents.rows]
    expected = run(
        *case.tensors,
        lambda *x: oracle(*x, rows, case.group_size, sink_tokens=case.sink_tokens),
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert (a.double() - b).abs().max() <= bound, name
    if case.dtype == torch.float64 and case.kernel == "sdpa" and not case.told:
        whole = run(*case.tensors, lambda *x: s2_attention(*x, **case.options))
        assert all((a - b).abs().max() <= bound for a, b in zip(got, whole, strict=True))


HEADS = [(9, 3), (4, 2), (3, 3), (5, 1), (2, 1), (12, 3)]
LENGTHS = [[16, 16], [16, 16, 16, 16], [7, 9, 8], [9, 9, 9, 2], [1, 2, 3, 40], [33, 1]]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_one_document(processes, heads, lengths, sink_tokens):
    """Groups that divide shards, that don't, that are longer than a shard or several; and dense."""
    for group_size in (8, 5, 23, None):
        check(processes, Case(lengths, heads, group_size=group_size, sink_tokens=sink_tokens))


@pytest.mark.parametrize("group_size", [2, 6, 30, None])
@pytest.mark.parametrize("lengths", [[20, 20], [10, 10, 10, 10], [13, 13, 13, 1]], ids=str)
def test_packed_documents(processes, lengths, group_size):
    """That end in the middle of a shard and at its end, and that go over several."""
    check(processes, Case(lengths, (9, 3), cu_seqlens=[0, 3, 3, 10, 11, 34, 40], group_size=group_size))


@pytest.mark.parametrize("group_size", [2, 6, 30, None])
def test_padding_of_each_row_by_another_amount(processes, group_size):
    rows = [[(0, 40)], [(25, 40)], [(0, 4)], [(3, 17), (17, 19), (22, 39)], []]
    check(processes, Case([10, 10, 10, 10], batch=5, rows=rows, group_size=group_size))


@pytest.mark.parametrize("group_size", [6, None])
@pytest.mark.parametrize("kernel", [name for name, kernel in KERNELS.items() if kernel.devices is None])
def test_values_of_another_width(processes, kernel, group_size):
    bound = 1e-9 if kernel == "sdpa" else 1e-4  # the reference is in fp32
    check(processes, Case([20, 20], kernel=kernel, widths=(8, 6), group_size=group_size), bound=bound)


@pytest.mark.parametrize("widths", [(8, 8), (8, 6)], ids=["in place", "by autograd"])
def test_shards_of_nothing_but_padding(processes, widths):
    """Their processes have to take part in the exchange, in the backward too: the others wait for them."""
    for group_size in (6, None):
        check(processes, Case([10, 10, 10, 10], rows=[[(0, 23)]], widths=widths, group_size=group_size))
        check(processes, Case([10, 10, 10, 10], rows=[[(25, 40)]], widths=widths, group_size=group_size))


def test_half_precision_and_equal_runs(processes):
    """Gradients that several processes add to are the same in each run."""
    for group_size in (6, 30, None):
        case = Case([10, 10, 10, 10], (9, 3), group_size=group_size, dtype=torch.bfloat16)
        check(processes, case, times=2, bound=0.2)


def sharded_case(draw: Any) -> Case:
    """A random call: shards, heads, documents, padding."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=2, max_size=4))
    total, batch = sum(lengths), draw(st.integers(1, 3))
    rows = []
    for _ in range(batch):
        rows.append([])
        at = 0
        for gap, size in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30)), max_size=5)):
            start, end = at + gap, min(at + gap + size, total)
            if start < end:
                rows[-1].append((start, end))
            at = max(end, at)
    heads = draw(st.sampled_from([(9, 3), (4, 2), (1, 1), (6, 1), (12, 3), (3, 3)]))
    return Case(
        lengths,
        heads,
        batch,
        draw(st.one_of(st.none(), st.integers(2, 40))),
        draw(st.integers(0, 9)),
        rows,
        kernel="sdpa",
        widths=draw(st.sampled_from([(8, 8), (8, 4)])),
    )


@settings(max_examples=40)
@given(data=st.data())
def test_random_sequences(processes, data):
    check(processes, sharded_case(data.draw))


@pytest.mark.slow
@settings(max_examples=1500)
@given(data=st.data())
def test_many_random_sequences(processes, data):
    check(processes, sharded_case(data.draw))


@pytest.mark.parametrize(("kernel", "device", "dtype"), RUNS, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (5, 1), (6, 3)], ids=str)
def test_each_kernel_sees_keys_before_its_queries(kernel, device, dtype, heads):
    """What each process computes, here one after the other: shards of every kernel, GPUs' too."""
    case = Case([37, 40, 51], heads, batch=3, group_size=32, widths=(32, 32), dtype=dtype)
    case.rows = [[(0, 128)], [(9, 60), (60, 128)], [(30, 33), (40, 101)]]
    tensors = [x.to(device) for x in case.tensors]
    documents = Documents(tuple(map(tuple, case.rows)), 128)

    def shards(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        found = []
        for start, end in Shards.of(case.lengths, 0).spans:
            outs = []
            for part in documents.parts(*heads, 32, sink_tokens=4):
                local = localize(part, (start, end))
                whole = []
                for x in (key[:, slice(*part.kv_heads)], value[:, slice(*part.kv_heads)]):
                    before = x.new_full((3, x.shape[1], local.keys, 32), 1e4)  # but for the halo seen by nobody
                    for row, at, (first, last) in local.slots():
                        before[row, :, at : at + last - first] = x[row, :, first:last]
                    whole.append(torch.cat([before, x[:, :, start:end]], dim=2))
                q = query[:, slice(*part.heads), start:end]
                own = local.part._replace(heads=(0, q.shape[1]), kv_heads=(0, whole[0].shape[1]))
                outs.append(KERNELS[kernel].function(q, *whole, (own,)))
            found.append(torch.cat(outs, dim=2))
        return torch.cat(found, dim=1).transpose(1, 2)

    got = run(*tensors, shards)
    expected = run(*(x.double() for x in tensors), lambda *x: oracle(*x, case.rows, 32, sink_tokens=4))
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


def test_only_the_neighbours_tokens_move():
    """With shards of whole groups: half a group for the shifted heads, and the document's first tokens."""
    documents = Documents(((((0, 64),)),), 64)
    plain, shifted = documents.parts(4, 2, 8, sink_tokens=2)
    for rank, span in enumerate(Shards.of([16] * 4, 0).spans):
        assert localize(plain, span).halo == ((((0, 2),)) if rank else (),)
        assert localize(shifted, span).halo == (((0, 2), (span[0] - 4, span[0])) if rank else (),)
        bare = documents.parts(4, 2, 8)
        assert [localize(part, span).keys for part in bare] == [0, 4 if rank else 0]


def kept(group: dist.ProcessGroup, group_size: int | None) -> list[int]:
    """How many queries, keys and values a checkpointed layer has made, and how many live on: forward, backward."""
    made: list[StorageWeakRef] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        tensors = [x * factor for factor in (2, 3, 4)]
        made.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)
        return sharded_s2_attention(*tensors, group=group, group_size=group_size)

    def alive() -> int:
        return sum(not storage.expired() for storage in made)

    gc.collect()
    gc.disable()  # what only the collector frees, a GPU has run out of memory for
    try:
        x = torch.randn(1, 2, 16, 8, requires_grad=True)
        out = checkpoint(layer, x, use_reentrant=False)
        found = [len(made), alive()]
        out.sum().backward()
        return [*found, len(made), alive()]
    finally:
        gc.enable()


@pytest.mark.parametrize("group_size", [8, 16, None])
def test_a_checkpointed_layer_keeps_nothing(processes, group_size):
    assert processes.run(2, kept, group_size) == [[3, 0, 6, 0]] * 2


def refused(group: dist.ProcessGroup) -> str:
    rank = dist.get_rank(group)
    tensors = [torch.randn(1, 2, 1 if rank < 1 else 0, 8)] * 3
    try:
        sharded_s2_attention(*tensors, group=group, group_size=8)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_process_without_tokens_is_refused_by_all(processes):
    assert all("a process of 2 without one" in message for message in processes.run(2, refused))
