"""Saved models and adapters to the hub, through huggingface_hub."""

from __future__ import annotations

import os
from pathlib import Path

from diffkit.errors import RunFailed, UserError
from diffkit.models.model_card import CARD_FILE

__all__ = ["check_destination", "push_folder"]


def check_destination(repo_id: str, *, online: bool = False) -> None:
    """Find out before hours of work whether a folder could be pushed to `repo_id`.

    Without `online` nothing is sent: the name and the presence of a token are looked at. With it
    the hub is asked whose token it is.

    Raises `UserError` naming what is missing.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id}: is no name of a hub repository ({error})") from error
    if "/" not in repo_id:
        raise UserError(f"{repo_id}: give the owner too, as OWNER/{repo_id}.")
    if get_token() is None:
        raise UserError(
            f"{repo_id}: pushing needs a token of the hub; log in with `hf auth login`, or set "
            "HF_TOKEN."
        )
    if not online:
        return
    try:
        HfApi(endpoint=_endpoint()).whoami()
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed.") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{repo_id}: the hub does not accept the token ({_first(error)})"
        ) from error
    except OSError as error:
        raise UserError(f"{repo_id}: the hub cannot be reached ({_first(error)})") from error


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    message: str = "Upload with diffkit",
) -> str:
    """Upload a saved model or adapter as one commit; returns the address of the repository.

    Args:
        folder: with the README.md that diffkit writes into everything it saves.
        repo_id: OWNER/NAME; made when it does not exist.
        private: whether a new repository is private; an existing one stays as it is.
        message: of the commit.

    Raises:
        UserError: the folder holds no saved model or adapter.
        RunFailed: the hub refused or could not be reached; the folder stays as it was.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    place = Path(folder)
    if not (place / CARD_FILE).is_file() or not list(place.rglob("*.safetensors")):
        raise UserError(
            f"{place}: holds no saved model or adapter ({CARD_FILE} and .safetensors files)."
        )
    api = HfApi(endpoint=_endpoint())
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        # What other programs left in the folder is not part of the model.
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=place,
            commit_message=message,
            ignore_patterns=["*.tmp", ".*", "**/.*"],
        )
    except (HfHubHTTPError, OSError) as error:
        raise RunFailed(
            f"{place}: is saved, but was not pushed to {repo_id} ({_first(error)}). Push it with: "
            f"diffkit push {place} {repo_id}"
        ) from error
    return str(address)


def _endpoint() -> str | None:
    # Read at the call: huggingface_hub keeps what the variable was at its import.
    return os.environ.get("HF_ENDPOINT")


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
