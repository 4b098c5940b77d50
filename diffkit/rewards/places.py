"""Where the weights of a reward lie: a file, a folder, or a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.models.loading import is_hub_id

__all__ = ["find_weights"]


def find_weights(reward: str, place: str, names: Sequence[str]) -> Path:
    """The file of weights of a reward, on this machine.

    Arguments:
        reward: its name, for messages.
        place: a file, a folder, or a hub id, from which it is fetched into the hub's cache.
        names: of the file in a folder or on the hub, the first that is there.

    Raises `UserError` when the place is none of them, has no such file, or cannot be reached.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{reward}: {path} holds none of {', '.join(names)}.")
    if is_hub_id(place):
        return _fetched(reward, place, names)
    raise UserError(f"{reward}: {place} is no file, folder or hub id.")


def _fetched(reward: str, repository: str, names: Sequence[str]) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    say(f"{reward}: weights from {repository}")
    reason = f"it holds none of {', '.join(names)}"
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:  # of one name, or of all where there is no network
            if type(error).__name__ == "LocalEntryNotFoundError":
                reason = "there is no network, and it is not in the hub's cache"
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            break
    raise UserError(
        f"{reward}: its weights could not be fetched from {repository}: {reason}. "
        f"Give them as a file: {reward}:PATH."
    )
