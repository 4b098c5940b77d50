"""Lists of prompts."""

from __future__ import annotations

import pytest

from diffkit.data.prompts import read_prompts
from diffkit.errors import UserError


def test_kinds_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("# a comment\nred apple\n\n  blue car \n#x\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text('id,prompt\n1,"red, apple"\n2,blue car\n')
    (tmp_path / "a.jsonl").write_text('{"prompt": "red apple", "n": 1}\n{"prompt": "blue car"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["red apple", "blue car"]
    assert read_prompts(str(tmp_path / "a.csv")) == ["red, apple", "blue car"]
    assert read_prompts(tmp_path / "a.jsonl") == ["red apple", "blue car"]
    assert read_prompts(["x", "y"]) == ["x", "y"]


REFUSED = {
    "a.txt": ("# only a comment\n", "holds no prompts"),
    "b.csv": ("text\nx\n", 'no column "prompt"'),
    "c.jsonl": ('{"prompt": "x"}\n{"prompt": 3}\n', "prompt 2 must be a text, not 3"),
    "d.jsonl": ('{"prompt": "x"}\n{"other": "y"}\n', "prompt 2 must be a text, not None"),
    "e.pdf": ("", "must be a .jsonl, .csv or .parquet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path, name):
    text, message = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_prompts(tmp_path / name)
    assert name in str(error.value)


def test_missing_files(tmp_path):
    for name in ("none.txt", "none.csv"):
        with pytest.raises(UserError, match=r"none\.\w+: .*[Nn]o such file"):
            read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts([])
