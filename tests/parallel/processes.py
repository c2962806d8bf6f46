"""Four processes that talk by gloo, started once for all tests, and what they run."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZE = 4


class Processes:
    """`SIZE` processes, of which the first ones form groups of each size from 2 on.

    They come from a server that has imported the package once: a fork of the tests' own process can't run a backward.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hf_longlora"])
        self._folder = tempfile.TemporaryDirectory()
        self._ends = []
        self._processes = []
        for rank in range(SIZE):
            end, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder.name, other), daemon=True)
            process.start()
            other.close()
            self._ends.append(end)
            self._processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(group, *arguments)` in each of `size` processes; what it gives, by rank."""
        for end in self._ends[:size]:
            end.send((size, function, arguments))
        answers = [end.recv() for end in self._ends[:size]]
        failed = [answer for kind, answer in answers if kind == "error"]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _serve(rank: int, folder: str, end: Any) -> None:
    torch.set_num_threads(1)
    store = f"file://{Path(folder) / 'store'}"
    limit = timedelta(seconds=60)  # a process that waits for another one fails, and its test with it
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=SIZE, timeout=limit)
    groups = {size: dist.new_group(list(range(size)), timeout=limit) for size in range(2, SIZE + 1)}
    while True:
        try:
            size, function, arguments = end.recv()
        except EOFError:
            return
        try:
            end.send(("done", function(groups[size], *arguments)))
        except Exception:
            end.send(("error", f"rank {rank}: {traceback.format_exc()}"))
