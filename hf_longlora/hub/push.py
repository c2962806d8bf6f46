"""The adapter on the Hub while it is trained."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.utils import logging

from ..lookup import causes, http_error
from ..tuner import LongLoraConfig
from ..values import check_whole
from .card import folder_card, has_own_card
from .run import read_facts, run_facts, write_facts

logger = logging.get_logger(__name__)

FOLDER = "_push"
"""Where adapters wait in the output directory. Trainer's own pushes leave out what begins with an underscore."""
LONGEST_WAIT = 300.0
"""Seconds between two tries, at most."""
WORTH_A_RETRY = (408, 409, 412, 423, 425, 429)
"""Status codes (4xx) that may pass: a time limit, a conflict with another commit, too many requests."""


class PushAdapterCallback(TrainerCallback):
    """Pushes the adapter to the Hub at the end of each stage, or every `every_n_steps` steps, and at the end.

    Training goes on meanwhile, and whatever the network does it ends well. An adapter is saved in the output directory
    first, with its card, and stays there until it is on the Hub, or a newer one is there. What could not be pushed is
    said at the end, with the command that does it by hand.

    Args:
        repo_id: The repository, `user/name`; made if it does not exist.
        every_n_steps: Push after so many optimizer steps each, instead of at the end of each stage.
        token: Of the Hub. Default: `hub_token` of the trainer's arguments, else what one has logged in with.
        private: Whether the repository, if it is made, is private. With `True` a public one is no place for it.
        revision: The branch, which has to exist. Default: the main one.
        retries: Tries after the first, for each adapter.
        backoff: Seconds before the second try, doubled for each one after it.
        patience: Seconds after which a push that is not answered counts as stalled, and another is begun; and seconds
            that the end of training waits, twice over, for what is not pushed yet. An upload has to fit in it.

    Raises:
        ValueError: if `every_n_steps` is below 1; when training begins, if the model has no adapter, or its weights
            are spread over processes (FSDP, ZeRO-3).
    """

    def __init__(
        self,
        repo_id: str,
        *,
        every_n_steps: int | None = None,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        retries: int = 4,
        backoff: float = 10.0,
        patience: float = 300.0,
    ) -> None:
        check_whole(1, none=True, every_n_steps=every_n_steps)
        self.repo_id = repo_id
        self.every_n_steps = every_n_steps
        self.private = private
        self.revision = revision
        self.retries = retries
        self.backoff = backoff
        self.patience = patience
        self._token = token
        self._last_step = -1  # the step of the last adapter that was saved to be pushed
        self._pusher: _Pusher | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not isinstance(model, PeftModel):
            raise ValueError(
                "PushAdapterCallback pushes adapters, and this model has none: use push_to_hub=True for whole models."
            )
        if is_fsdp_enabled() or is_deepspeed_zero3_enabled():
            raise ValueError(
                "PushAdapterCallback can't gather weights that are spread over processes (FSDP, ZeRO-3): use "
                "push_to_hub=True with hub_strategy='every_save', which goes by the checkpoints."
            )
        schedule = getattr(model.active_peft_config, "trained", None)
        self._stage_ends = set() if schedule is None else set(schedule.ends)
        self._last_step = -1
        if state.is_world_process_zero:
            self._pusher = _Pusher(self, self._token or getattr(args, "hub_token", None))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if step == state.max_steps:  # at the end, when it has been logged
            return
        if step % self.every_n_steps == 0 if self.every_n_steps else step in self._stage_ends:
            self._submit(args, state, **kwargs)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The best model of all has been loaded by now, if that was asked for, and is another than the last step's.
        if state.global_step != self._last_step or args.load_best_model_at_end:
            if self._pusher is not None and state.global_step == self._last_step:  # it would wait in the same folder
                self._pusher.finish()
            self._submit(args, state, **kwargs)
        if self._pusher is not None:
            self._pusher.finish()
            self._pusher = None

    def _submit(self, args: TrainingArguments, state: TrainerState, **kwargs: Any) -> None:
        self._last_step = state.global_step
        if self._pusher is None:
            return
        folder = Path(str(args.output_dir), FOLDER, f"step-{state.global_step}")
        try:
            kwargs["model"].save_pretrained(folder)
            if kwargs.get("processing_class") is not None:
                kwargs["processing_class"].save_pretrained(folder)
            write_facts(folder, read_facts(Path(str(args.output_dir))) | run_facts(args, state))
            if isinstance(kwargs["model"].active_peft_config, LongLoraConfig):  # another's card is PEFT's
                folder_card(folder, name=self.repo_id).save(folder / "README.md")
        except (OSError, SafetensorError) as error:  # a full disk: it is for the run's own checkpoints to stop the run
            logger.warning(f"The adapter of step {state.global_step} could not be saved to be pushed: {error}")
            return
        self._pusher.submit(folder)


def _step(snapshot: Path) -> int:
    """The optimizer steps after which an adapter was saved in a folder."""
    return int(snapshot.name.removeprefix("step-"))


class _Pusher:
    """Pushes the newest snapshot it was given, an adapter in a folder `step-N`, in a thread of its own.

    `huggingface_hub` sets no time limit. A thread whose try has had no answer for `patience` seconds is left behind
    for a new one. Should it be answered after all, the commit it makes is refused, for each names the one it follows.
    """

    def __init__(self, settings: PushAdapterCallback, token: str | None) -> None:
        self.settings = settings
        self._api, self._token = HfApi(token=token), token
        self._changed = threading.Condition()
        self._newest: Path | None = None
        self._current: Path | None = None  # on its way
        self._thread: threading.Thread | None = None
        self._since: float | None = None  # when the try that is under way began
        self._pushed = -1  # the last step that is on the Hub
        self._error = ""

    def submit(self, snapshot: Path) -> None:
        with self._changed:
            self._newest = snapshot
            self._pushed = min(self._pushed, _step(snapshot) - 1)
            self._changed.notify_all()
            self._see_to_it()
            self._clear(snapshot.parent, _step(snapshot) - 1)

    def finish(self) -> None:
        """Wait for what is on its way, and say what did not get there."""
        patience, repo_id = self.settings.patience, self.settings.repo_id
        end = time.monotonic() + 2 * patience  # one try may stall, the other be answered
        while (thread := self._thread) is not None and (left := end - time.monotonic()) > 0:
            age = 0.0 if (since := self._since) is None else time.monotonic() - since
            thread.join(max(min(left, patience - age), 0))
            with self._changed:
                if self._thread is not None:
                    self._see_to_it()
        if self._newest is None or self._pushed >= _step(self._newest):
            return
        reason = self._error or f"there was no answer in {patience:g} s"
        logger.warning(
            f"The adapter of step {_step(self._newest)} is not on the Hub as {repo_id}: {reason}. It is whole in "
            f"{self._newest}. To push it: hf upload {repo_id} {self._newest} ."
        )

    def _see_to_it(self) -> None:
        """Have a thread at work, and another in the place of one that gets no answer."""
        if self._thread is not None:
            if self._since is None or time.monotonic() - self._since < self.settings.patience:
                return
            logger.warning(
                f"The push to {self.settings.repo_id} had no answer in {self.settings.patience:g} s; another is begun."
            )
        self._since = self._current = None
        # A daemon, so that a server that never answers can't keep the program from its end.
        self._thread = threading.Thread(target=self._work, name=f"push to {self.settings.repo_id}", daemon=True)
        self._thread.start()

    @property
    def _left(self) -> bool:
        """Whether the thread that asks has been left behind."""
        return threading.current_thread() is not self._thread

    def _work(self) -> None:
        snapshot = None
        while True:
            with self._changed:
                if self._left:
                    return
                self._current = None
                if self._newest is snapshot or self._newest is None:
                    self._thread = None
                    return
                snapshot = self._current = self._newest
                self._clear(snapshot.parent, _step(snapshot) - 1)
            self._push(snapshot)

    def _push(self, snapshot: Path) -> None:
        """Until it is pushed, overtaken, or there is no use in trying on."""
        for number in range(self.settings.retries + 1):
            self._since = time.monotonic()
            try:
                self._commit(snapshot)
            except Exception as error:  # whatever it is, it is none of the training's business
                with self._changed:
                    if self._left:
                        return
                    self._since, self._error = None, self._describe(error)
                    again = number < self.settings.retries and worth_a_retry(error)
                    wait = min(self.settings.backoff * 2**number, LONGEST_WAIT)
                    logger.warning(
                        f"Pushing the adapter of step {_step(snapshot)} to {self.settings.repo_id} failed: "
                        f"{self._error}." + (f" Next try in {wait:g} s." if again else "")
                    )
                    if not again or self._changed.wait_for(lambda: self._newest is not snapshot, wait):
                        return
            else:
                with self._changed:
                    self._pushed = max(self._pushed, _step(snapshot))
                    if not self._left:
                        self._since, self._error, self._current = None, "", None
                    self._clear(snapshot.parent, _step(snapshot))
                return

    def _commit(self, snapshot: Path) -> None:
        """One commit, so that the repository never holds half an adapter, on the head as it is before the upload."""
        to, silent = self.settings, are_progress_bars_disabled()
        disable_progress_bars()  # they would run through the training's
        try:
            repo_id = self._api.create_repo(to.repo_id, private=to.private, exist_ok=True).repo_id
            info = self._api.repo_info(repo_id, revision=to.revision)
            if to.private:
                refuse_public(info)
            own = has_own_card(self._api, repo_id, to.revision)
            files = sorted(f for f in snapshot.iterdir() if f.is_file() and not (own and f.name == "README.md"))
            self._api.create_commit(
                repo_id,
                [CommitOperationAdd(file.name, file) for file in files],
                commit_message=f"Adapter of step {_step(snapshot)}",
                revision=to.revision,
                parent_commit=info.sha,
            )
        finally:
            if not silent:
                enable_progress_bars()

    def _clear(self, folder: Path, step: int) -> None:
        """Remove adapters that wait from `step` or before, an earlier run's too, except the one being pushed."""
        for waiting in folder.glob("step-*"):
            if waiting.name[5:].isdigit() and _step(waiting) <= step and waiting != self._current:
                shutil.rmtree(waiting, ignore_errors=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def _describe(self, error: BaseException) -> str:
        """The first cause in one line, without the token."""
        answer = http_error(error)
        cause = answer or causes(error)[-1]
        line = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        text = f"{type(cause).__name__}: {line}" if line else type(cause).__name__
        if answer is not None and answer.response.status_code in (401, 403, 404):
            text += f" (the token is not valid, or may not write to {self.settings.repo_id})"
        for token in (self._token, get_token()):
            text = text.replace(token, "<token>") if token else text
        return text.rstrip(".")


def refuse_public(info: Any) -> None:
    """Raise a `PermissionError` if a repository that is to be private was there before, and is public."""
    if info.private is False:
        raise PermissionError(f"{info.id} is there already and public: make it private on its page, or name another")


def worth_a_retry(error: BaseException) -> bool:
    """Whether a failed push may succeed later: not if the server has refused it, or the name can't be one."""
    answer = http_error(error)
    if answer is not None:
        status = answer.response.status_code
        return status >= 500 or status in WORTH_A_RETRY
    return not any(isinstance(cause, HFValidationError | PermissionError) for cause in causes(error))
