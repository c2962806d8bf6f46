"""One sequence over several processes: what the trainer needs for `sequence_parallel`.

The engine is DeepSpeed's, as accelerate and transformers run it (`sp_backend="deepspeed"`): it makes the processes'
groups, cuts batches into shards and adds up gradients. The attention among shards is ours (`hf_longlora.parallel`), in
the place of the one that it registers, which is dense and wants heads to divide by processes. So is the loss: theirs
is a mean over each batch's labels, and batches of few labels weigh as much as those of many.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig  # type: ignore[import-untyped]
from torch.utils.data import Sampler
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from ..parallel import check_rope, check_shardable, sequence_group, shard_sequences
from ..parallel.attention import gathered
from ..rope import RopeScaling
from ..schedule import Schedule
from .config import LongLoraSFTConfig
from .staged import StagedTrainer

LAUNCH = "accelerate launch --config_file examples/accelerate_configs/zero2.yaml (or zero3.yaml) --num_processes GPUS"


def check_sequences(
    args: LongLoraSFTConfig,
    schedule: Schedule,
    ropes: Sequence[RopeScaling | None],
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel] | None,
    spread: bool,
    others: Mapping[str, Any],
) -> None:
    """Refuse `sequence_parallel` where it can't be, before anything is loaded.

    `spread` says whether `device_map` spreads the model over the GPUs of one process.
    """
    size = args.sequence_parallel
    if size == 1:
        return
    if spread:
        raise ValueError("`device_map` has one process, `sequence_parallel` several: leave one of them out.")
    if args.world_size % size > 0:
        raise ValueError(
            f"`sequence_parallel={size}` needs a multiple of {size} processes, and there "
            f"{'is one' if args.world_size == 1 else f'are {args.world_size}'}. Start them by {LAUNCH}."
        )
    if not started_with_deepspeed(args):
        raise ValueError(
            "`sequence_parallel` goes with DeepSpeed, of any ZeRO stage, and not with DDP or FSDP: start the run by "
            f"{LAUNCH}."
        )
    if not hasattr(ParallelismConfig, "sp_enabled"):
        raise ValueError("`sequence_parallel` needs a later accelerate: pip install 'accelerate>=1.12'.")
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("`sequence_parallel` needs DeepSpeed: pip install 'deepspeed>=0.18.2'.")
    if schedule.any_windows:
        raise ValueError('Steps in windows fit one process: set sparse="s2", or leave `sequence_parallel` out.')
    if args.compile_layers:
        raise ValueError("`compile_layers` is not for `sequence_parallel`: leave one of them out.")
    check_shardable(model_class or type(config), config)
    for rope in ropes:
        if rope is not None:
            check_rope(rope)
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if others.get(name) is not None:
            raise ValueError(f"With `sequence_parallel` no process has the logits of a whole row: `{name}` gets none.")
    if args.loss_type == "dft" or args.label_smoothing_factor > 0 or others.get("compute_loss_func") is not None:
        raise ValueError(
            "With `sequence_parallel` the loss is the mean over the labels: leave out loss_type='dft', "
            "`label_smoothing_factor` and `compute_loss_func`."
        )
    accelerator: Any = args.accelerator_config
    if not accelerator.even_batches:
        raise ValueError("With `sequence_parallel` processes meet in each batch: leave `even_batches` on.")
    text = config.get_text_config()
    balance = getattr(args, "router_aux_loss_coef", None)  # TRL's default is the model's
    balance = getattr(text, "router_aux_loss_coef", None) if balance is None else balance
    if hasattr(text, "output_router_logits") and balance:
        raise ValueError(
            "The balance of experts is counted over whole batches, and with `sequence_parallel` no process has one: "
            "set router_aux_loss_coef=0."
        )


def started_with_deepspeed(args: LongLoraSFTConfig) -> bool:
    """Whether a run is DeepSpeed's, by its arguments or by how it was launched."""
    return args.deepspeed is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def parallelism_config(size: int, processes: int) -> ParallelismConfig:
    """accelerate's configuration of sequences over `size` processes."""
    return ParallelismConfig(sp_size=size, sp_backend="deepspeed", dp_shard_size=processes // size)


def gradients_repeated(size: int, deepspeed: Mapping[str, Any]) -> int:
    """How many times too large DeepSpeed's sum of all processes' gradients comes out, by its configuration.

    ZeRO-3, if it scatters them, divides it by all processes, and all else by the groups of `size`.
    """
    zero = deepspeed.get("zero_optimization", {})
    return 1 if zero.get("stage") == 3 and zero.get("reduce_scatter", True) else size


def processes_of_a_sequence(size: int) -> dist.ProcessGroup:
    """The group of `size` processes that this one belongs to: DeepSpeed's, which its engine reads, made once."""
    from deepspeed import comm  # type: ignore[import-not-found]
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as state  # type: ignore[import-not-found]

    if not comm.is_initialized():  # accelerate starts it on accelerators alone
        comm.init_distributed(dist_backend=dist.get_backend())
    if state._SEQUENCE_PARALLEL_GROUP is None:
        state.initialize_sequence_parallel(size)
    if state.get_sequence_parallel_world_size() != size:
        raise ValueError(
            f"This process shares sequences with {state.get_sequence_parallel_world_size() - 1} others since an "
            f"earlier run: DeepSpeed makes its groups once. Start sequence_parallel={size} in processes of its own."
        )
    return state.get_sequence_parallel_group()


class _Groups:
    """Stands where accelerate finds `UlyssesSPAttentionHF`: makes the groups, and leaves the attention as it is."""

    @classmethod
    def register_with_transformers(cls, *, sequence_parallel_size: int, **ignored: Any) -> Any:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        processes_of_a_sequence(sequence_parallel_size)
        return parallel_state_sp


@contextmanager
def own_attention(model: Any, size: int) -> Iterator[None]:
    """Inside, sequences are shared by `size` processes, and DeepSpeed's engine runs without DeepSpeed's attention.

    accelerate has the latter registered whenever it starts the engine, takes no other, and it would refuse heads that
    don't divide: for that moment the name that accelerate looks up is something else.
    """
    if size == 1:
        yield
        return
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    theirs, group = ulysses_sp.UlyssesSPAttentionHF, sequence_group(model)
    ulysses_sp.UlyssesSPAttentionHF = _Groups
    shard_sequences(model, processes_of_a_sequence(size))
    try:
        yield
    finally:
        ulysses_sp.UlyssesSPAttentionHF = theirs
        shard_sequences(model, group)


class ShardedLoss(Trainer):
    """The loss of a step whose rows lie in shards: a mean over all labels of the step, whatever process has them.

    To be mixed in behind TRL's trainer, which asks `Trainer` for the loss of shards.
    """

    args: LongLoraSFTConfig
    model: Any
    _labels: torch.Tensor

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which doesn't count the labels of shards; here the step's are counted over all processes."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self.args.sequence_parallel > 1:
            own = sum((batch["shift_labels"] != -100).sum() for batch in batches)
            self._labels = self.accelerator.gather(torch.as_tensor(own, device=self.args.device)).sum().clamp(min=1)
        return batches, count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.sequence_parallel == 1 or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = {"labels": inputs["shift_labels"], "num_items_in_batch": self._labels}
        outputs = model(**{**inputs, **labels})
        # What Trainer makes of it: divides by the micro-steps, and logs the mean over processes.
        loss = outputs.loss * (self.current_gradient_accumulation_steps * self.args.world_size)
        if loss.requires_grad:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            times = gradients_repeated(self.args.sequence_parallel, config)
            loss.register_hook(lambda gradient: gradient / times)
        return (loss, outputs) if return_outputs else loss


class ShardedTrainer(StagedTrainer):
    """A trainer whose evaluations go through rows in shards, too."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with own_attention(self.model, self.args.sequence_parallel):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if self.args.sequence_parallel == 1:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if not prediction_loss_only:
            raise ValueError(
                "With `sequence_parallel` no process has the logits of a whole row: set `prediction_loss_only`."
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            return self._loss_in_turns(model, self._prepare_inputs(inputs)), None, None

    def _loss_in_turns(self, model: Any, inputs: Any) -> torch.Tensor:
        """The loss of this process's batch. The group goes through its processes' batches in turn, in shards.

        accelerate cuts no batches of evaluations, and a long row would have to fit one card.
        """
        group = sequence_group(self.model)
        assert group is not None
        losses = []
        for shard in shards_in_turn(inputs, group):
            labels = (shard["shift_labels"] != -100).sum()
            mean = self.compute_loss(model, shard)  # of no label: 0 or not a number
            found = torch.stack([torch.where(labels > 0, mean.float() * labels, 0), labels])
            dist.all_reduce(found, group=group)
            losses.append(found[0] / found[1].clamp(min=1))
        return losses[dist.get_rank(group)]


def shards_in_turn(inputs: Mapping[str, Any], group: dist.ProcessGroup) -> Iterator[dict[str, Any]]:
    """Shards of the batches that the processes of a group have: this one's of the first's, of the second's, ...

    Args:
        inputs: This process's batch, tensors `[B, S]`, `S` a multiple of the processes; and what is no tensor.

    Yields:
        `[B, S / processes]` each, with `shift_labels` beside `labels`: those of the next tokens, -100 at the end. What
        is no tensor, as it is.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    own = torch.tensor(inputs["input_ids"].shape, device=inputs["input_ids"].device)
    for turn, shape in enumerate(gathered(own, group)):
        shard = dict(inputs)
        for name, x in sorted(inputs.items()):
            if not isinstance(x, torch.Tensor):
                continue
            whole = x.contiguous() if turn == rank else x.new_empty(shape.tolist())
            dist.broadcast(whole, group=group, group_src=turn)
            if name == "labels":
                whole = torch.nn.functional.pad(whole, (0, 1), value=-100)[:, 1:]
            shard[name] = whole.chunk(size, dim=1)[rank].contiguous()
        yield shard | {"shift_labels": shard["labels"]}


class ShardableCollator:
    """Collates batches that can be cut into `size` shards: tensors `[B, S]` alone, `S` a multiple of `size`.

    Documents are told by `position_ids` and `attention_mask`; what else TRL says of packed ones is of the whole row,
    and DeepSpeed would cut it.
    """

    TOLD = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

    def __init__(self, collator: Callable[..., Mapping[str, Any]], size: int) -> None:
        self.collator = collator
        self.size = size

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        batch = {key: x for key, x in self.collator(examples).items() if key not in self.TOLD}
        if "position_ids" not in batch:
            raise ValueError(
                "With `sequence_parallel` batches need `position_ids`, counted from each document's beginning: have "
                "the collator make them, as trl.trainer.sft_trainer.DataCollatorForLanguageModeling does."
            )
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        rest = -batch["input_ids"].shape[1] % self.size
        filled = {"labels": -100, "input_ids": getattr(self.collator, "pad_token_id", 0)}
        return {
            key: torch.nn.functional.pad(x, (0, rest), value=filled.get(key, 0)) if rest else x
            for key, x in batch.items()
        }


class InShards(Sampler[int]):
    """The order in which rows are read so that each step of a run sees its own.

    Each process reads batches of its own, as without shards; then the processes of a group go through the shards of
    each of these batches in turn. So the n-th row that is read is not of the n-th step where several groups share a
    step.

    Args:
        rows: How many there are: `batch` of each group in each micro-step, micro-step after micro-step.
        batch: Rows of a process.
        size: Processes of a group.
        groups: How many groups there are.
        done: Micro-steps that a resumed run has behind it: what it begins with is of the next.
    """

    def __init__(self, rows: int, batch: int, size: int, groups: int, done: int = 0) -> None:
        self.batch, self.size, self.groups = batch, size, groups
        self.steps = rows // (batch * groups)
        self.done = done

    def __len__(self) -> int:
        return -(-self.steps // self.size) * self.size * self.groups * self.batch

    def __iter__(self) -> Iterator[int]:
        for read in range(-(-self.steps // self.size)):
            for group in range(self.groups):
                for turn in range(self.size):
                    # past the last step nothing is trained any more, and what is read is as good as any
                    step = (self.done + read * self.size + turn) % self.steps
                    first = (step * self.groups + group) * self.batch
                    yield from range(first, first + self.batch)
