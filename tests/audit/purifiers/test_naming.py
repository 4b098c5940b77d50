"""What a report may say of the files of this machine."""

from __future__ import annotations

import pytest

from diffkit.audit.purifiers.naming import public_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/drive/mine/pictures/x.png cannot be read", "x.png cannot be read"),
        ("sdedit0.2:/drive/mine/model,jpeg75", "sdedit0.2:model,jpeg75"),
        ("alex:~/weights/alex.pth", "alex:alex.pth"),
        ("stabilityai/sd-turbo", "stabilityai/sd-turbo"),
        ("Download https://a.org/b/c.pth", "Download https://a.org/b/c.pth"),
        ("clean/sub", "clean/sub"),
    ],
)
def test_folders_of_absolute_paths_are_left_out(text: str, shown: str) -> None:
    """audit.json and the page held whole paths of CLEAN, PROTECTED, models and weights."""
    assert public_text(text) == shown
