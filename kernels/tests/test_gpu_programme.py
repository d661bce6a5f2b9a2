"""The GPU programme without a GPU: parts that fail, and the logic of each part."""

import json
import sys

import pytest
from kernel_proofs import gpu, gpu_parts

WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"half\": 1}'); "


def part(name, code, seconds=30.0):
    return gpu.Part(name, [sys.executable, "-c", WRITE + code], seconds)


def test_one_failing_part_loses_no_other():
    parts = [
        part("first", ""),
        part("bad", "raise ValueError('broken')"),
        part("slow", "import time; time.sleep(60)", 5),
    ]
    found = gpu.run_parts([*parts, part("last", "")], minutes=1)
    assert list(found) == ["first", "bad", "slow", "last"]
    assert all(one["half"] == 1 for one in found.values())
    assert "error" not in found["first"]
    assert "error" not in found["last"]
    assert "ValueError: broken" in found["bad"]["error"]
    assert "exit status 1" in found["bad"]["error"]
    assert found["slow"]["error"] == "not done after 5 s"


def test_no_part_starts_after_the_last_minute():
    found = gpu.run_parts([part("late", "")], minutes=0)
    assert found == {"late": {"error": "no time was left", "seconds": 0.0}}


def test_limits_add_up_to_the_whole():
    in_seconds = {part.name: part.seconds for part in gpu.PARTS}
    assert sum(seconds for name, seconds in in_seconds.items() if name != "tests") < 6 * 60
    assert set(in_seconds) <= set(gpu_parts.PARTS)


def test_result_file_keeps_records_together(tmp_path):
    described = {"device": "Some GPU", "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "kind": "cuda"}
    parts = {"one": {"records": [{"a": 1}], "seconds": 1}, "two": {"error": "broken", "seconds": 2}}
    file = gpu.write_result(tmp_path, described, parts)
    content = json.loads(file.read_text())
    assert content["records"] == [{"a": 1}]
    assert content["parts"] == {"one": {"seconds": 1}, "two": {"error": "broken", "seconds": 2}}
    assert "Some-GPU" in file.name


@pytest.fixture
def notes(tmp_path):
    return gpu_parts.Notes(tmp_path / "found.json", 30)


def test_notes_are_on_disk_at_once(notes, tmp_path):
    notes.add("records", {"milliseconds": float("nan")})
    assert json.loads((tmp_path / "found.json").read_text()) == {"records": [{"milliseconds": None}]}


def test_large_rows_equal_themselves_alone(notes):
    gpu_parts.large(notes, "cpu", elements=3 * 151936)
    assert len(notes.found["cases"]) == 4
    assert all(case["equal"] for case in notes.found["cases"])


def test_large_rows_that_differ_are_named(notes, monkeypatch):
    def cases(device, elements):
        yield "index wrapped", lambda x: (x + len(x),), [gpu_parts.torch.ones(9, 2)]

    monkeypatch.setattr(gpu_parts, "large_cases", cases)
    with pytest.raises(RuntimeError, match="index wrapped"):
        gpu_parts.large(notes, "cpu")


def test_peers_and_growth_are_recorded(notes):
    gpu_parts.divergences(notes, "cpu", (3, 200))
    gpu_parts.growing(notes, "cpu", {"vocab": [128, 256], "tokens": [2], "top_k": [3]})
    records = notes.found["records"]
    assert {(one["top_k"], one["implementation"]) for one in records if one["sweep"] is None} >= {
        (k, by) for k in (None, 64) for by in ("sgfast", "eager PyTorch")
    }
    assert {row["sweep"] for row in notes.found["growth"]} == {"vocab"}


def test_missing_sanitizer_is_said(notes, monkeypatch):
    monkeypatch.setattr(gpu_parts, "find_sanitizer", lambda: None)
    gpu_parts.sanitizer(notes)
    assert notes.found["skipped"] == "compute-sanitizer is not installed"
