"""Configuration of the staged trainer."""

import copy
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from trl import SFTConfig

from ..attention import S2AttentionConfig
from ..schedule import (
    AUTO,
    AUTO_STAGES,
    DENSE_EVERY,
    GROUPS,
    ContextStage,
    Schedule,
    SparseOption,
    auto_stages,
)
from ..values import check_one_of, check_share, check_whole


@dataclass
class LongLoraSFTConfig(SFTConfig):
    """Configuration of [`LongLoraSFTTrainer`]: TRL's `SFTConfig`, and the stages.

    The optimizer's defaults are the paper's recipe (appendix B.1), AdamW with beta2 0.95 and no weight decay, constant
    after 20 steps of warm-up, but for the learning rate, which is 2e-5 there. `max_steps` and `max_length` follow from
    the stages.

    Raises:
        ValueError: if there is no stage, the stages shrink, or `max_steps` or `max_length` contradict them.
    """

    stages: list[ContextStage] | str | None = field(
        default=None,
        metadata={
            "help": "Context stages, each with max_length and max_steps, in order: a list (in YAML and JSON of "
            "mappings); or, with max_length and max_steps of all, 'auto' (a quarter of the target first) or "
            "'doubling'."
        },
    )
    # Dense steps spread over the run make sparse training carry over to dense inference. SmolLM2-135M, 8,192 -> 65,536
    # tokens, perplexity of books over all of a window (its last 2,048 tokens) against dense training, three seeds:
    # each 2nd step dense and the others in windows +0.3% (+0.5%) at 0.62 of the time, each 3rd +0.7% (+1.1%) at 0.50,
    # each 4th +0.9% (+1.5%) at 0.43; shifted sparse attention, each 4th +1.7% (+2.5%) at 0.47
    # (benchmarks/results/pretrained.csv).
    dense_every: int = field(
        default=DENSE_EVERY, metadata={"help": "Each how many optimizer steps one runs with dense attention; 0: none."}
    )
    sparse: SparseOption = field(
        default="auto",
        metadata={
            "help": "What the steps are that aren't dense: s2 (shifted sparse attention over whole rows), windows "
            "(dense attention over windows of the length that the base was trained at, of several rows, at their true "
            "positions) or pose (such windows of two chunks of a document each); windows of both kinds are for plain "
            "text alone, and would cut off from answers what they answer. auto: windows for plain text; s2 for "
            "conversations, completions and given labels, where group_size, group_size_ratio or sink_tokens says how, "
            "and where windows can't be had (sequence_parallel, a collator of one's own, models without RoPE or with "
            "a state).",
        },
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens in a group of shifted sparse attention. Default: by group_size_ratio, or the length that "
            "the base was trained at before any scaling, at most a quarter of the stage's max_length."
        },
    )
    group_size_ratio: float | None = field(
        default=None, metadata={"help": "Group size as a share of the stage's max_length, in (0, 1]."}
    )
    sink_tokens: int = field(
        default=S2AttentionConfig.sink_tokens,
        metadata={"help": "First tokens of a document that every group sees; 0: the paper's pattern."},
    )
    attention_kernel: str = field(default="auto", metadata={"help": "Attention kernel: 'auto' or a kernel's name."})
    compile_layers: bool = field(
        default=False, metadata={"help": "Compile norms, attention modules and MLPs (but tiled ones) for training."}
    )
    mlp_tile: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that an MLP takes at a time, where a sequence's intermediates don't fit. Default: all."
        },
    )
    offload_share: float = field(
        default=1.0,
        metadata={
            "help": "Share of the saved activations that activation_offloading sends to the host, whose memory may "
            "not hold them all; the rest stays on the card."
        },
    )
    sequence_parallel: int = field(
        default=1,
        metadata={"help": "Processes that share each sequence (with DeepSpeed); their number is a multiple of it."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Examples of a stream that are read at a time, and shuffled among each other."}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Of the training data, how many examples are used, the first. Default: all."}
    )
    max_eval_examples: int | None = field(
        default=None,
        metadata={"help": "Of each evaluation dataset, how many examples are used, the first; a stream needs it."},
    )
    report: bool = field(default=True, metadata={"help": "End a run with report.html in its output directory."})

    # SmolLM2-135M, 8,192 -> 32,768 tokens, 100 steps, r = 64, perplexity of books against a rate of 3e-4: 1e-4 +2.9%,
    # 1e-3 -1.8%, and dense training gains as much (benchmarks/results/pretrained.csv). Larger models want lower rates:
    # the lowest of these.
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Learning rate schedule over all stages."}
    )
    warmup_steps: float = field(default=20, metadata={"help": "Steps of linear warm-up; a share of all if below 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})

    def __post_init__(self) -> None:
        check_one_of(SparseOption, sparse=self.sparse)
        check_whole(1, sequence_parallel=self.sequence_parallel, shuffle_buffer=self.shuffle_buffer)
        limits = ("mlp_tile", "max_examples", "max_eval_examples")
        check_whole(1, none=True, **{name: getattr(self, name) for name in limits})
        check_share(offload_share=self.offload_share)
        if self.offload_share < 1 and not self.activation_offloading:
            raise ValueError("`offload_share` is of what `activation_offloading` sends: switch that on.")
        if self.eval_strategy == "steps" and self.eval_steps == 0:
            raise ValueError(
                "`eval_steps=0` would evaluate as often as `logging_steps` says. Give the steps between evaluations, "
                'or eval_strategy="no".'
            )
        if isinstance(self.stages, str) and self.stages not in AUTO_STAGES:
            with suppress(json.JSONDecodeError):
                self.stages = json.loads(self.stages)
        if getattr(self, "activation_checkpointing", True) is None and self.gradient_checkpointing is True:
            # TRL's default by the name that transformers deprecates since 5.23; the old one alone would be warned of.
            self.activation_checkpointing = True
        if self.stages in AUTO_STAGES:  # all that is wrong is said now, but for the model's length
            self._schedule_of(auto_stages(str(self.stages), 0, self.max_length or 0, self.max_steps))
            return super().__post_init__()
        if not isinstance(self.stages, (list, tuple)):
            raise ValueError(
                "`stages` must be a list of stages, for example [ContextStage(max_length=8192, max_steps=200)], in "
                f"YAML [{{max_length: 8192, max_steps: 200}}], a JSON list of such, or one of {AUTO_STAGES}, "
                f"got {self.stages!r}."
            )
        self.stages = [ContextStage.of(stage) for stage in self.stages]
        schedule = self.schedule
        if self.max_steps > 0 and self.max_steps != schedule.max_steps:
            raise ValueError(
                f"`max_steps={self.max_steps}` contradicts the stages, which sum to {schedule.max_steps} steps. Leave "
                "`max_steps` out, or change the stages."
            )
        self.max_steps = schedule.max_steps
        longest = self.stages[-1].max_length
        default = type(self).__dataclass_fields__["max_length"].default
        if self.max_length not in (default, longest):
            raise ValueError(
                f"`max_length={self.max_length}` contradicts the last stage's {longest}. Leave `max_length` out: each "
                "stage has its own."
            )
        self.max_length = longest
        super().__post_init__()

    def resolve_stages(self, base_length: int) -> None:
        """Put a list in the place of "auto" or "doubling", for a model that reaches `base_length` tokens.

        Raises:
            ValueError: if it reaches `max_length` already.
        """
        if isinstance(self.stages, str):
            self.stages = auto_stages(self.stages, base_length, self.max_length or 0, self.max_steps)

    @property
    def data_parallel(self) -> int:
        """How many batches are in work at once: processes, or groups of those that share a sequence."""
        return self.world_size // self.sequence_parallel

    @property
    def examples_a_step(self) -> int:
        """Examples of an optimizer step, of all processes."""
        # Not `train_batch_size`: it counts GPUs that Trainer has yet to find to hold one model between them.
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.data_parallel

    @property
    def selective_checkpointing(self) -> bool:
        """Whether checkpoints keep attention's output: TRL's `gradient_checkpointing_kwargs={"selective": True}`."""
        options: Any = self.gradient_checkpointing_kwargs or {}
        return bool(self.gradient_checkpointing and options.get("selective"))

    @property
    def order_seed(self) -> int:
        """What the data's order is drawn by, and the windows of PoSE."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def schedule(self) -> Schedule:
        """The stages as a function of the step; to be asked for once they are a list."""
        assert isinstance(self.stages, list)
        return self._schedule_of(self.stages)

    def _schedule_of(self, stages: list[ContextStage]) -> Schedule:
        given: Any = {name: getattr(self, name) for name in GROUPS}
        attention = S2AttentionConfig(**given, kernel=self.attention_kernel)
        sparse: Any = "s2" if self.sparse == AUTO else self.sparse  # until it is resolved, which lengths don't ask for
        return Schedule(tuple(stages), attention, self.dense_every, sparse=sparse)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, and so for `training_args.bin`, which goes to the Hub: without tokens."""
        return {**vars(self), "hub_token": None, "model_init_kwargs": without_token(self.model_init_kwargs)}

    def __copy__(self) -> "LongLoraSFTConfig":
        """In this process, with everything."""
        made = object.__new__(type(self))
        vars(made).update(vars(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "LongLoraSFTConfig":
        memo[id(self)] = made = copy.copy(self)
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, as trackers get it: the stages as mappings, no tokens."""
        values = super().to_dict()
        values["model_init_kwargs"] = without_token(values["model_init_kwargs"])
        if isinstance(self.stages, list):
            values["stages"] = [asdict(stage) for stage in self.stages]
        return values


def without_token(init: Any) -> Any:
    """Arguments of `from_pretrained` without the token for a gated model."""
    if not isinstance(init, dict):
        return init
    return {key: value for key, value in init.items() if key not in ("token", "use_auth_token")}
