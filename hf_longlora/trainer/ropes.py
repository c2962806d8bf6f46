"""The RoPE that a run starts from, and that of each of its stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..rope import (
    AUTO,
    RopeScaling,
    current_rope,
    find_rope,
    only_reading,
    reach,
    readings,
    scaled_rope,
    type_over,
)
from ..schedule import ContextStage, Schedule
from ..tuner import longlora_tuner

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """The RoPE that a run starts from.

    Args:
        config: The model's.
        base: The model's own, whatever an adapter has made of it; `None` if it has none that can be read.
        now: A loaded adapter's, where it has one.
        base_length: The adapter's.
    """

    config: PreTrainedConfig
    base: RopeScaling | None
    now: RopeScaling | None
    base_length: int | None

    @classmethod
    def of(cls, model: Any, config: PreTrainedConfig, peft_config: PeftConfig | None) -> "Start":
        base, now = find_rope(config), None
        tuner = longlora_tuner(model)
        if tuner is not None:
            peft_config = model.active_peft_config
            base, now = tuner.base_rope, model.active_peft_config.scaling
        return cls(config, base, now, getattr(peft_config, "base_length", None))

    @property
    def known(self) -> int:
        """Tokens that the model reaches as it is; 0 if it has no RoPE to scale.

        Raises:
            ValueError: its config leaves that open.
        """
        if self.now is not None:
            return self.now.length
        return 0 if self.base is None else only_reading(self.config, self.base, self.base_length)[1]


def stage_ropes(start: Start, schedule: Schedule) -> list[RopeScaling | None]:
    """The RoPE of each stage; `None` where it is the one the model comes with.

    A stage extends the RoPE before it (the base's, a loaded adapter's or an earlier stage's), in the same type and
    never to a shorter length. So one run and several are held to the same, and end in the same RoPE.

    Raises:
        ValueError: if a stage's length is one that the base reaches already, less than what was reached since or in
            another type, or the model has no RoPE to scale.
    """
    ropes: list[RopeScaling | None] = []
    now = start.now
    for number, stage in enumerate(schedule.stages, start=1):
        if stage.rope_type is None and stage.rope_parameters is None:
            # The RoPE of the stage before, set explicitly: a run resumed here has not been through that stage.
            ropes.append(ropes[-1] if ropes else None)
            continue
        try:
            now = _extended(start, now, stage)
        except ValueError as error:
            raise ValueError(
                f"Stage {number}: {error} (A stage with rope_type=None trains at a length the model reaches already.)"
            ) from error
        ropes.append(now)
    return ropes


def _extended(start: Start, now: RopeScaling | None, stage: ContextStage) -> RopeScaling:
    """The RoPE of a stage; `now` is the RoPE before it, of an earlier stage or a loaded adapter, if there is one."""
    base = start.base or current_rope(start.config)
    kind, explicit = stage.rope_type or AUTO, stage.rope_parameters
    if now is None:
        return scaled_rope(start.config, stage.max_length, kind, explicit, start.base_length, base=base)
    original, reached = reach(now)
    own = type_over(now, base)
    if stage.max_length < reached:
        raise ValueError(
            f"max_length={stage.max_length} is less than the {reached} tokens that RoPE was stretched to before, and "
            "it only grows."
        )
    if explicit is None and kind not in (AUTO, own):
        raise ValueError(
            f"RoPE was stretched by {own!r} before, and {kind!r} would replace the frequencies that the adapter has "
            f'been trained with. Pass rope_type="{own}" or "auto", or explicit rope_parameters.'
        )
    if explicit is None and stage.max_length == reached:
        return now
    return scaled_rope(start.config, stage.max_length, own, explicit, original, base=now)


def check_lengths(
    start: Start, schedule: Schedule, ropes: Sequence[RopeScaling | None], longest: Sequence[int]
) -> None:
    """Refuse a stage that stretches RoPE and would train no distance that is new to the model, and warn of one that
    goes beyond what the RoPE that it keeps reaches.

    `longest` are the tokens in the longest document that each stage sees.
    """
    before: RopeScaling | None = None
    known = start.known if any(rope is not None for rope in ropes) else 0
    for number, (stage, rope, tokens) in enumerate(zip(schedule.stages, ropes, longest, strict=True), start=1):
        stretches = rope is not None and rope != before and stage.max_length > known
        if tokens == 0:
            raise ValueError(
                f"Stage {number} (max_length {stage.max_length:,}) would see nothing to learn from: no example is "
                "left that has a token to learn once it is cut to that length. Give shorter examples or prompts, or a "
                "longer stage."
            )
        if stretches and tokens <= known:
            raise ValueError(
                f"Too few tokens for stage {number} (max_length {stage.max_length:,}): the longest sequence it would "
                f"see has {tokens:,} tokens, no more than the {known:,} the model knows by then. Give longer "
                'documents, set packing=True and packing_strategy="wrapped" (one stream of text, as in the paper), or '
                "drop the stage."
            )
        if (scaling := rope or start.now or start.base) is not None:
            reached = max(length for _, length in readings(start.config, scaling, start.base_length))
            if tokens > reached:
                logger.warning(
                    f"Stage {number} trains {tokens:,} tokens under a RoPE that reaches {reached:,} (rope_type=None), "
                    "and so the model's config will say: readers of it, such as vLLM, take no more. With a rope_type "
                    "the stage has one that reaches its max_length."
                )
        before, known = rope or before, max(known, tokens)
