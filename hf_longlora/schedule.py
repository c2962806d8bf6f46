"""Context stages and the schedule they make: pure data and pure functions of the optimizer step.

Trainer, card, report, comparison and planner ask it what a stage or a step is; none of them derives it.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from .attention.config import AttentionMode, S2AttentionConfig, Sparse
from .rope import AUTO
from .values import check_one_of, check_whole

__all__ = ["ContextStage", "Schedule"]

StageAttention = Literal["s2attn", "dense"]

SparseOption = Literal["auto", "s2", "windows", "pose"]
"""What a run may say of `Sparse`: "auto" is settled by its data and its model."""

GROUPS = ("group_size", "group_size_ratio", "sink_tokens")
"""What a run and each of its stages may say of `S2AttentionConfig`."""

DENSE_EVERY = 2
"""Each how many optimizer steps one is dense where nothing says it (why: `LongLoraSFTConfig.dense_every`)."""


@dataclass(frozen=True)
class ContextStage:
    """A stretch of training at one context length.

    Args:
        max_length: Tokens in a sequence.
        max_steps: Optimizer steps.
        rope_parameters: Explicit RoPE parameters, as in `config.rope_parameters`; else they follow from `max_length`
            and `rope_type`.
        rope_type: "linear", "dynamic", "yarn", "llama3", "longrope" or "abf"; "auto" is the type that RoPE is scaled
            by already, in the base or by a stage before, else "abf", of Phi-3 "longrope" (why:
            `hf_longlora.rope.natural_type`). `None` keeps the RoPE of the stage before, or the model's (for training
            at a length that it reaches already).
        group_size: Tokens in a group of shifted sparse attention.
        group_size_ratio: Group size as a share of `max_length`, where `group_size` is not given. With neither, those
            of the trainer's configuration hold; without those, a group is the length that the base was trained at
            before any scaling, and a quarter of `max_length` at most.
        sink_tokens: First tokens of a document that every group sees; 0: the paper's pattern. `None`: as the trainer's
            configuration says.
        dense_every: Each how many optimizer steps one runs with dense attention; 0: none. `None`: as the trainer's
            configuration says.
        attention: "s2attn" or "dense" for the whole stage.
        sparse: What the steps are that aren't dense. "s2": shifted sparse attention over whole rows.
            "windows": dense attention over windows of the length that the base was trained at before any scaling,
            each a run of neighbouring tokens of a document at their true positions; a step's are of several rows.
            "pose": the same, each window two chunks of a document (PoSE, arXiv 2309.10400). A document that is no
            longer stays whole. `None`: as the trainer's configuration says.

    Raises:
        ValueError: on a value outside its range.
    """

    max_length: int
    max_steps: int
    rope_parameters: dict[str, Any] | None = None
    rope_type: str | None = AUTO
    group_size: int | None = None
    group_size_ratio: float | None = None
    sink_tokens: int | None = None
    dense_every: int | None = None
    attention: StageAttention = "s2attn"
    sparse: Sparse | None = None

    def __post_init__(self) -> None:
        check_whole(1, max_length=self.max_length, max_steps=self.max_steps)
        check_whole(0, none=True, dense_every=self.dense_every)
        S2AttentionConfig(**self.groups)  # raises on what can't be
        check_one_of(StageAttention, attention=self.attention)
        check_one_of(Sparse, sparse=self.sparse)
        if self.sparse is not None and self.attention == "dense":
            raise ValueError(f"A stage with attention='dense' has no sparse steps: leave out sparse={self.sparse!r}.")
        if self.sparse not in (None, "s2") and self.groups:
            given = " and ".join(self.groups)
            raise ValueError(f"A stage with sparse={self.sparse!r} has windows and no groups: leave out {given}.")

    @property
    def groups(self) -> dict[str, Any]:
        """What it says of groups, by fields of `S2AttentionConfig`."""
        return {name: value for name in GROUPS if (value := getattr(self, name)) is not None}

    @classmethod
    def of(cls, value: "ContextStage | Mapping[str, Any]") -> "ContextStage":
        """A stage from a mapping, as YAML and JSON give them.

        Raises:
            ValueError: on an unknown or a missing key.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"A stage must be a ContextStage or a mapping of its fields, got {value!r}.")
        known = sorted(field.name for field in fields(cls))
        unknown, missing = sorted(set(value) - set(known)), sorted({"max_length", "max_steps"} - set(value))
        if unknown or missing:
            raise ValueError(f"Stage {dict(value)}: unknown {unknown}, missing {missing}. Its fields are {known}.")
        return cls(**value)


@dataclass(frozen=True)
class Step:
    """How one optimizer step runs.

    Args:
        stage: Index of its stage, from 0.
        last_of_stage: Whether its stage ends with it.
        mode: "auto" (shifted sparse attention in training), "windows" or "dense".
    """

    stage: int
    last_of_stage: bool
    mode: AttentionMode


class Pattern(NamedTuple):
    """What the tokens of a stage see.

    Args:
        kind: "dense", or of `Sparse` what the steps are that aren't.
        tokens: In a group or a window; `None`: of all.
        sink_tokens: First tokens of a document that every group sees.
        dense_each: Each how many steps one is dense; 0: none.
    """

    kind: str
    tokens: int | None
    sink_tokens: int
    dense_each: int


@dataclass(frozen=True)
class Schedule:
    """The stages of a run. What a step does follows from its number alone, so a resumed run is the same run.

    Args:
        stages: In order.
        attention, dense_every, sparse: Where a stage names none.
        native_window: Tokens that the base was trained at before any scaling; `None` while the model is not known.

    Raises:
        ValueError: if there is no stage, a stage is shorter than the one before it, or `dense_every` is below 0.
    """

    stages: tuple[ContextStage, ...]
    attention: S2AttentionConfig
    dense_every: int
    native_window: int | None = None
    sparse: Sparse = "s2"

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("`stages` is empty: give at least one ContextStage(max_length=..., max_steps=...).")
        for number, (before, after) in enumerate(pairwise(self.stages), start=2):
            if after.max_length < before.max_length:
                raise ValueError(
                    f"Stage {number} has max_length {after.max_length}, less than the {before.max_length} before it: "
                    "RoPE scaling only grows. Order the stages by max_length."
                )
        check_whole(0, dense_every=self.dense_every)

    @property
    def says_groups(self) -> bool:
        """Whether the run or a stage says how groups are to be."""
        return self.attention.says_groups or any(stage.groups for stage in self.stages)

    @property
    def ends(self) -> list[int]:
        """The steps that are done when each stage ends."""
        return list(accumulate(stage.max_steps for stage in self.stages))

    @property
    def max_steps(self) -> int:
        return self.ends[-1]

    def step(self, global_step: int) -> Step:
        """The optimizer step that starts after `global_step` steps are done."""
        if not 0 <= global_step < self.max_steps:
            raise ValueError(f"Step {global_step} is outside this schedule of {self.max_steps} steps.")
        index = bisect_right(self.ends, global_step)
        every = self.dense_each(index)
        dense = self.is_dense(index) or (every > 0 and (global_step + 1) % every == 0)
        sparse: AttentionMode = "auto" if self.sparse_by(index) == "s2" else "windows"
        return Step(index, global_step + 1 == self.ends[index], "dense" if dense else sparse)

    def last_step(self, global_step: int) -> Step:
        """The step that was last done after `global_step` of them; before the first, that."""
        return self.step(max(global_step - 1, 0))

    def dense_each(self, stage: int) -> int:
        """Each how many optimizer steps of a stage one is dense; 0 for never."""
        own = self.stages[stage].dense_every
        return self.dense_every if own is None else own

    def sparse_by(self, stage: int) -> Sparse:
        """What the steps of a stage are that aren't dense."""
        return self.stages[stage].sparse or self.sparse

    def is_dense(self, stage: int) -> bool:
        """Whether all steps of a stage are dense: it says so, or a group or a window holds its whole length."""
        own = self.stages[stage]
        if own.attention == "dense":
            return True
        if self.sparse_by(stage) != "s2":
            return self.native_window is not None and own.max_length <= self.native_window
        return self.attention_config(stage).dense_at(own.max_length) is not None

    def has_windows(self, stage: int) -> bool:
        """Whether there are steps in windows in a stage."""
        return self.pattern(stage).kind in ("windows", "pose")

    def attention_config(self, stage: int) -> S2AttentionConfig:
        """Attention of a stage, its group size resolved for the stage's `max_length`."""
        own = self.stages[stage]
        # A stage's ratio counts for more than the run's size.
        given = {"group_size": None, **own.groups} if "group_size_ratio" in own.groups else own.groups
        return replace(self.attention, **given).resolved(own.max_length, self.native_window)

    def pattern(self, stage: int) -> "Pattern":
        """What the tokens of a stage see in the steps that aren't dense."""
        attention, kind = self.attention_config(stage), self.sparse_by(stage)
        every = self.dense_each(stage)
        if self.is_dense(stage) or every == 1:
            return Pattern("dense", None, 0, 1)
        if kind == "s2":
            return Pattern(kind, attention.group_size, attention.sink_tokens, every)
        return Pattern(kind, self.native_window, 0, every)

    @property
    def any_windows(self) -> bool:
        """Whether there are steps in windows in any stage."""
        return any(map(self.has_windows, range(len(self.stages))))

    def window(self, stage: int) -> int | None:
        """Tokens in a window of a stage; `None` where it has none."""
        return self.pattern(stage).tokens if self.has_windows(stage) else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for checkpoints and cards."""
        return {
            "stages": [asdict(stage) for stage in self.stages],
            "attention": asdict(self.attention),
            "dense_every": self.dense_every,
            "native_window": self.native_window,
            "sparse": self.sparse,
            "group_sizes": [self.attention_config(i).group_size for i in range(len(self.stages))],
            "sink_tokens": [self.attention_config(i).sink_tokens for i in range(len(self.stages))],
            "windows": [self.window(i) for i in range(len(self.stages))],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schedule":
        """The schedule that `to_dict` gave; other keys are ignored.

        Groups are as they were, by whatever rule they were resolved.
        """
        values = stored_schedule(values)
        stages = [ContextStage.of(stage) for stage in values["stages"]]
        for number, (size, sinks) in enumerate(zip(values["group_sizes"], values["sink_tokens"], strict=True)):
            if stages[number].sparse in (None, "s2"):
                stages[number] = replace(stages[number], group_size=size, sink_tokens=sinks)
        attention, window = S2AttentionConfig(**values["attention"]), values["native_window"]
        return cls(tuple(stages), attention, values["dense_every"], window, values["sparse"])


def stored_schedule(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_dict` gave, earlier versions' with the fields that have come since at what their absence means."""
    count, attention = len(values["stages"]), {"sink_tokens": 0, **values["attention"]}
    if (shift := attention.pop("shift", "heads")) != "heads":
        raise ValueError(f"The stages ran with shift={shift!r}, which was for comparison and is stored no more.")
    missing = {"native_window": None, "sparse": "s2", "windows": [None] * count, "sink_tokens": [0] * count}
    return {
        **missing,
        **values,
        "stages": [asdict(ContextStage.of(stage)) for stage in values["stages"]],
        "attention": attention,
    }


AUTO_STAGES = ("auto", "doubling")
"""What may stand in place of a list of stages: `auto_stages` makes one, when the base's length is known."""

FIRST_SHARE = 0.2
"""The share of the steps that `auto_stages` spends before the target's length: tokens do less there."""


def auto_stages(kind: str, base_length: int, max_length: int, max_steps: int) -> list[ContextStage]:
    """Stages from the base's length to `max_length`, all of `rope_type="auto"`.

    A fifth of the steps goes to the lengths before the target's: on our bench each token spent at a shorter length is
    worth less (`benchmarks/README.md`), but the first steps are cheap there, and a run that goes wrong does so early.
    Steps that are too few to share all go to the target.

    Args:
        kind: "auto": a stage at a quarter of the target, where that is longer than the base, then the target;
            "doubling": each doubling of the base's length on the way.
        base_length: Tokens that the model reaches as it is.
        max_length: Tokens that it shall reach.
        max_steps: Optimizer steps in all.

    Raises:
        ValueError: if there is nothing to extend, or no step to take.
    """
    if kind not in AUTO_STAGES:
        raise ValueError(f"`stages` must be a list of stages or one of {AUTO_STAGES}, got {kind!r}.")
    if max_steps < 1:
        raise ValueError(f"`stages={kind!r}` needs `max_steps`, the optimizer steps of all stages.")
    if max_length <= base_length:
        raise ValueError(
            f"`stages={kind!r}` extends to `max_length={max_length}`, and the model reaches {base_length} tokens as "
            "it is. Set `max_length` to the target."
        )
    lengths = [max_length // 4] if kind == "auto" else [base_length * 2**i for i in range(1, 64)]
    lengths = [length for length in lengths if base_length < length < max_length]
    each = round(FIRST_SHARE * max_steps / max(len(lengths), 1))
    if each == 0:
        lengths = []
    before = [ContextStage(length, each) for length in lengths]
    return [*before, ContextStage(max_length, max_steps - each * len(lengths))]
