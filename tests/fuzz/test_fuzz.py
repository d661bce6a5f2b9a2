"""A short run of the fuzzer; a long one is `python -m tests.fuzz`."""

import itertools
from pathlib import Path

from tests.fuzz.__main__ import _cases, fuzz
from tests.fuzz.worker import KINDS


def test_no_input_ends_in_anything_but_success_or_one_line(tmp_path):
    found = fuzz(_cases(240, list(KINDS), 0), tmp_path, seed=20261130, seconds=60)
    assert found.findings == []
    assert set(found.outcomes) == set(KINDS)
    # Not everything is refused, or nothing behind the first check would be reached.
    reached = {outcome for outcomes in found.outcomes.values() for outcome in outcomes}
    assert {"used", "refused at loading", "refused at a call", "done", "one line"} <= reached


def test_a_process_that_dies_or_does_not_end_is_a_finding(tmp_path, monkeypatch):
    from tests.fuzz import __main__ as harness

    monkeypatch.setattr(harness, "_PATIENCE", 3.0)
    monkeypatch.setattr(harness, "work", _broken)
    found = fuzz(itertools.product(("mutated",), range(4)), Path(tmp_path), seed=0, seconds=60)
    assert [(number, what) for _, number, what in found.findings] == [
        (0, "the process ended with 7"),
        (1, "no end within 3 s"),
        (2, "5.0 s of processor time; used"),
        (3, "2048 MiB more memory; used"),
    ]


def _broken(connection, _folder, _seed):
    import os
    import time

    connection.send("ready")
    while True:
        _, number = connection.recv()
        if number == 0:
            os._exit(7)
        if number == 1:
            time.sleep(60)
        connection.send(("used", False, 5.0 if number == 2 else 0.1, 2**31 if number == 3 else 0))
