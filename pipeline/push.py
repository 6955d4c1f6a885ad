"""`latentline train --push`: the adapter's folder to the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from manifests.errors import LatentlineError, UsageError

TOKEN = "HF_TOKEN"


def check_push(repo_id: str) -> None:
    """Raise `UsageError`, before anything is trained, if there is no token or the name cannot be a repository's."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"--push {repo_id!r}: {str(error).splitlines()[0]}") from error
    if repo_id.count("/") != 1:
        raise UsageError(f"--push {repo_id!r}: write it as OWNER/NAME")
    if not os.environ.get(TOKEN):
        raise UsageError(f"--push {repo_id!r}: needs a token that may write, in the environment variable {TOKEN}")


def push(folder: Path, repo_id: str) -> str:
    """Upload the folder, to a new private repository if there is none of that name; return its address.

    Raises `LatentlineError` if the hub refuses or cannot be reached; the folder stays as it is.
    """
    api = HfApi(token=os.environ[TOKEN])
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Adapter trained with latentline", ignore_patterns=".*"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LatentlineError(
            f"--push {repo_id!r}: {reason}; the adapter is whole in {folder}, run the same command to push again"
        ) from error
    return str(done.repo_url if hasattr(done, "repo_url") else repo_id)
