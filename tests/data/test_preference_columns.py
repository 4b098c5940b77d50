"""Which columns of a table are pairs, and what a row prefers."""

from __future__ import annotations

import pytest

from diffkit.data.columns import has_pair_columns
from diffkit.data.preference_columns import PairColumns, find_pair_columns, verdict
from diffkit.errors import UserError

PICK_A_PIC = (
    *("are_different", "best_image_uid", "caption", "created_at", "has_label", "image_0_uid"),
    *("image_0_url", "image_1_uid", "image_1_url", "jpg_0", "jpg_1", "label_0", "label_1"),
    *("model_0", "model_1", "ranking_id", "user_id", "num_example_per_prompt"),
)


def test_the_columns_of_pick_a_pic():
    columns = find_pair_columns(PICK_A_PIC, "set")
    assert columns == PairColumns(
        ("jpg_0", "jpg_1"), "caption", ("label_0", "label_1", "has_label")
    )
    assert len(columns.used) == 6 and "user_id" not in columns.used


def test_the_columns_of_folders():
    numbered = find_pair_columns(("image_0", "image_1", "label_0", "text", "prompt"), "t")
    assert numbered == PairColumns(("image_0", "image_1"), "text", ("label_0",))
    ranked = find_pair_columns(("loser", "winner", "prompt"), "t")
    assert ranked == PairColumns(("winner", "loser"), "prompt", ())
    assert find_pair_columns(("winner", "loser", "said"), "t", "said").caption == "said"
    assert find_pair_columns(("winner", "loser"), "t").caption is None
    assert has_pair_columns(("winner",)) and not has_pair_columns(("file_name", "text"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("file_name", "text"), "names no pairs of pictures; expected winner and loser, or"),
        (("image_0", "image_1", "winner", "loser"), "holds winner, loser, image_0, image_1; keep"),
        (("image_0", "image_1", "jpg_0", "label_0"), "holds image_0, image_1, jpg_0; keep one"),
        (("image_0", "label_0"), 'has no column "image_1"'),
        (("winner", "text"), 'has no column "loser"'),
        (("image_0", "image_1", "text"), 'has no column "label_0", which says'),
        (("jpg_0", "jpg_1", "label_1"), 'has no column "label_0"'),
        (("winner", "loser", "label_0"), "has label_0 beside winner and loser"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_columns_that_there_are(columns, message):
    with pytest.raises(UserError, match=message) as caught:
        find_pair_columns(columns, "table")
    assert f"Its columns: {', '.join(columns)}." in str(caught.value)


def test_a_caption_column_that_is_not_there():
    with pytest.raises(UserError, match='no column "said". Its columns: winner, loser'):
        find_pair_columns(("winner", "loser"), "table", "said")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"label_0": 1}, "first"),
        ({"label_0": 0.0, "label_1": 1.0}, "second"),
        ({"label_0": "0.5", "label_1": "0.5", "has_label": "True"}, "tie"),
        ({"label_0": None}, "no label"),
        ({"label_0": float("nan")}, "no label"),
        ({}, "no label"),
        ({"label_0": 1, "has_label": False}, "no label"),
        ({"label_0": 0, "label_1": 0, "has_label": "false"}, "no label"),
        ({"label_0": -1, "has_label": 0}, "no label"),
        ({"label_0": 1, "has_label": None}, "first"),
    ],
)
def test_verdicts(row, expected):
    columns = PairColumns(("jpg_0", "jpg_1"), None, ("label_0", "label_1", "has_label"))
    assert verdict(row, columns) == expected


def test_a_row_without_labels_prefers_its_first_picture():
    assert verdict({"winner": "a"}, PairColumns(("winner", "loser"), None, ())) == "first"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label_0": 2}, '"label_0" must be 0, 0.5 or 1, not 2'),
        ({"label_0": "yes"}, "not 'yes'"),
        ({"label_0": True}, "not True"),
        ({"label_0": 1, "label_1": 1}, '"label_0" is 1 and "label_1" is 1; their sum must be 1'),
        ({"label_0": 1, "has_label": "maybe"}, "must be true or false, not 'maybe'"),
    ],
)
def test_wrong_labels(row, message):
    columns = PairColumns(("jpg_0", "jpg_1"), None, ("label_0", "label_1", "has_label"))
    with pytest.raises(ValueError, match=message):
        verdict(row, columns)
