"""What a person sees while something runs."""

from __future__ import annotations

from diffkit import console


def test_a_log_file_gets_a_line_now_and_then(capsys, monkeypatch):
    """A long run into a file used to be silent until its last line."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.delenv("RANK", raising=False)
    assert list(console.progress(range(7), "encoding")) == list(range(7))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["encoding: 2 of 7", "encoding: 5 of 7"]


def test_other_processes_and_quiet_runs_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    console.warn("careful")
    assert list(console.progress([1, 2], "x")) == [1, 2]
    monkeypatch.setenv("RANK", "0")
    console.set_quiet(True)
    try:
        console.say("hello")
        console.warn("careful")
    finally:
        console.set_quiet(False)
    assert capsys.readouterr().err == "warning: careful\n"
