"""Progress where there is no terminal: plain lines now and then. On a terminal: a bar."""

import io

import pytest
from rich.console import Console

from sgfast.cli import progress
from sgfast.cli.progress import Follower, show_training, working


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def written(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert all(character.isprintable() or character == "\n" for character in text)
    return text.splitlines()


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def test_a_line_for_every_tenth(clock):
    console = plain()
    with Follower(console) as follower:
        follower.begin("measuring", 1000, "tokens")
        for _ in range(500):
            clock[0] += 0.01
            follower.advance(2)
    assert written(console) == [
        f"measuring: {done}/1000 tokens ({done // 10}%)" + (", 200 a second" if done > 100 else "")
        for done in range(100, 1001, 100)
    ]


def test_slow_work_is_told_after_half_a_minute(clock):
    console = plain()
    with Follower(console) as follower:
        follower.begin("checking", 0, "records")
        for _ in range(65):
            clock[0] += 1
            follower.advance(3)
        follower.begin("attack: [learned]", 1000, "records")
        clock[0] += 31
        follower.advance(1)
    assert written(console) == [
        "checking: 90 records, 3 a second",
        "checking: 180 records, 3 a second",
        "attack: [learned]: 1/1000 records (0%), 0.032 a second, 516 min left",
    ]


def test_minutes_that_remain_are_told_from_one_on(clock):
    console = plain()
    with Follower(console) as follower:
        follower.begin("", 10, "steps")
        for step in range(1, 11):
            clock[0] += 20
            follower.reach(step, "loss 1")
    remaining = ["3 min", "3 min", "2 min", "2 min", "2 min", "1 min", "1 min"]
    assert written(console) == [
        *(f"{n}/10 steps ({n * 10}%), 0.05 a second, {left} left, loss 1" for n, left in enumerate(remaining, 1)),
        *(f"{n}/10 steps ({n * 10}%), 0.05 a second, loss 1" for n in (8, 9, 10)),
    ]


def test_a_resumed_training_counts_its_own_rate(clock):
    console = plain()

    def training(on_step):
        for step in range(51, 101):
            clock[0] += 0.5
            on_step(step, {"loss": 1 / step})
        return "trained"

    assert show_training(console, 100, lambda values: f"loss {values['loss']:.3f}", training) == "trained"
    lines = written(console)
    assert lines[0] == "60/100 steps (60%), 2 a second, loss 0.017"
    assert lines[-1] == "100/100 steps (100%), 2 a second, loss 0.010"
    assert len(lines) == 5


def test_a_terminal_has_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with Follower(console) as follower:
        follower.begin("measuring", 10, "tokens")
        follower.advance(10)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "━" in shown
    assert "10/10 tokens" in shown
    dumb = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})
    with Follower(dumb) as follower:
        follower.begin("measuring", 10, "tokens")
        follower.advance(10)
    assert written(dumb) == ["measuring: 10/10 tokens (100%)"]


def test_work_without_stages_is_named_once():
    console = plain()
    with working(console, "measuring [all]"):
        pass
    assert written(console) == ["measuring [all]"]
