"""`hf-longlora push`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

IGNORED = ["checkpoint-*", "checkpoint-*/**", "last-good/**", "runs/**", "*.tmp", ".*", "_*"]
"""What a run leaves in its output directory that is no part of the adapter."""


def add(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="upload an adapter, or an exported model, to the Hugging Face Hub",
        description=(
            "Upload the folder of an adapter (or of a merged or exported one) to the Hub, its card (README.md) with "
            "it: written anew from what is known, a later evaluation too, unless it has been edited, here or there, "
            "and says so. "
            "Checkpoints stay here. You are who you have logged in as (`hf auth login`, or HF_TOKEN)."
        ),
    )
    push.add_argument("folder", help="the folder of an adapter or a model")
    push.add_argument("repository", help="user/name on the Hub; made if it is not there")
    push.add_argument(
        "--private",
        action="store_true",
        help="make a new repository private (default: public); a public one is refused",
    )
    push.add_argument("--revision", help="the branch to upload to, made if it is not there")
    push.add_argument("--message", default="Upload with hf-longlora", help="of the commit")
    push.set_defaults(run=run, after_interruption="The repository is as it was, or new and empty.")


def run(options: argparse.Namespace) -> None:
    from huggingface_hub import HfApi, get_token

    from ..hub.card import has_own_card, refresh_card
    from ..hub.push import refuse_public

    folder = Path(options.folder)
    if not (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder of an adapter or a model: no adapter_config.json, no config.json")
    if get_token() is None:
        raise ValueError("you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    written = (folder / "adapter_config.json").is_file() and refresh_card(folder, options.repository)
    if written:
        print(f"README.md is written from what is known of {folder}.")
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        if base and Path(base).is_dir():
            print(
                f"The adapter's base is {base}, a folder that others have not: to be loaded by them, it needs the "
                "base's name on the Hub as base_model_name_or_path in its adapter_config.json.",
                file=sys.stderr,
            )
    api, ignored = HfApi(), IGNORED
    try:
        repository = api.create_repo(options.repository, private=options.private or None, exist_ok=True).repo_id
        if options.private:
            refuse_public(api.repo_info(repository))
        if options.revision:
            api.create_branch(repository, branch=options.revision, exist_ok=True)
        if written and has_own_card(api, repository, options.revision):
            ignored = [*IGNORED, "README.md"]
            print(f"{repository} has a card of its own, which stays as it is.")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=options.revision,
            commit_message=options.message,
            ignore_patterns=ignored,
        )
    except Exception as error:  # of many types: HTTP status, connection, names that can't be
        raise OSError(
            f"{folder} could not be pushed to {options.repository}; it is complete here, and the same command tries "
            f"again. The reason: {str(error).strip() or type(error).__name__}"
        ) from error
    print(f"{folder} is on the Hub: {commit.commit_url}")
