"""Resident memory of the utility metrics, measured in processes of their own."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def lines_of(*arguments):
    command = [sys.executable, "-m", "benchmarks.metrics_memory", *arguments]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_logits_are_read_in_place_whatever_the_sizes():
    whole, split, top_whole, top_split = lines_of("--rows", "2", "--length", "48")
    assert whole["inputs_mib"] > 50
    for line in (whole, split, top_whole, top_split):
        assert line["peak_mib"] < 32, line  # a float32 copy of one side alone would take 56
    assert split["jefferys"] == pytest.approx(whole["jefferys"], rel=1e-6)
    assert top_split["jefferys"] == pytest.approx(top_whole["jefferys"], rel=1e-6)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_logits_of_hidden_states_keep_to_the_budget():
    lines = lines_of(
        "--rows", "1", "--length", "160", "--vocabulary", "49152", "--hidden", "64", "--budgets", "16", "32"
    )
    for line in lines:
        assert line["logits_would_take_mib"] == 60
        assert line["peak_mib"] < line["budget_mib"]
    assert lines[0]["jefferys"] == pytest.approx(lines[1]["jefferys"], rel=1e-6)
