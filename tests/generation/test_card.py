"""Cards of saved models."""

from __future__ import annotations

from diffkit.files import read_json, write_json
from diffkit.generation.card import add_to_card, read_card


def test_adding_to_a_card_keeps_what_else_it_says(tmp_path):
    """A student's card was once written over the names of its classes."""
    write_json(tmp_path / "diffkit.json", {"id2label": {"0": "cat"}, "steps": 25})
    add_to_card(tmp_path, {"guidance_scale": 1.0, "steps": 4})
    found = read_json(tmp_path / "diffkit.json")
    assert found == {"id2label": {"0": "cat"}, "steps": 4, "guidance_scale": 1.0}
    assert read_card(str(tmp_path)).steps == 4


def test_a_folder_without_a_card_gets_one(tmp_path):
    add_to_card(tmp_path, {"steps": 1})
    assert read_json(tmp_path / "diffkit.json") == {"steps": 1}
