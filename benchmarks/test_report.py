"""The page shows the numbers of the files, and no others."""

import json
import re

import pytest

from benchmarks import report

ENVIRONMENT = {
    "device": "Some Device",
    "kind": "cuda",
    "threads": None,
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789",
    "sgfast": "0.1.0",
}
RECORD = {
    "family": "f",
    "task": "a task",
    "tokens": 7,
    "dtype": "float32",
    "milliseconds": 4.0,
    "peak_bytes": 3 * 2**20,
}


def page(tmp_path, content) -> str:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(content))
    assert report.main([str(file), "--out", str(tmp_path / "page.md")]) == 0
    return (tmp_path / "page.md").read_text()


def test_figures_under_device_date_and_commit(tmp_path):
    records = [
        {"sweep": None, "implementation": "eager PyTorch", **RECORD},
        {"sweep": None, "implementation": "sgfast", **RECORD, "milliseconds": 1.0, "value_error": 2e-7},
    ]
    text = page(tmp_path, {"environment": ENVIRONMENT, "records": records})
    assert "Some Device" in text
    assert "2026-01-02, commit 0123456789" in text
    # The remark about times on a CPU is absent here. The list of other files may name a CPU.
    assert "Times on a CPU" not in text
    assert "CPU" not in text[: text.index("## Other")]
    assert "| 7 | float32 | sgfast | 1 | 3.0 | 2e-07 | 0.25 |" in text
    assert "| 7 | float32 | eager PyTorch | 4 | 3.0 |  | 1.00 |" in text
    assert "floor GB/s |" not in text  # no record has one


def test_the_ratio_of_turns_comes_before_that_of_medians(tmp_path):
    records = [
        {"sweep": None, "implementation": "eager PyTorch", **RECORD},
        {"sweep": None, "implementation": "sgfast", **RECORD, "milliseconds": 1.0, "times_peer": 0.4},
    ]
    text = page(tmp_path, {"environment": ENVIRONMENT, "records": records})
    assert "| 7 | float32 | sgfast | 1 | 3.0 | 0.40 |" in text


def test_without_records_there_are_no_figures(tmp_path):
    text = page(tmp_path, {"environment": ENVIRONMENT, "records": []})
    section = text[text.index("## measured") : text.index("## Other")]
    assert "|" not in section
    assert re.findall(r"\d+\.\d+", section) == ["0.1"]  # the version of sgfast


def test_gpu_parts_and_their_failures(tmp_path):
    kernel = {"case": "a kernel", "rows": 9, "milliseconds": 2.0, "floor_gb_per_s": 3000.0, "percent_of_copy": 75.0}
    parts = {
        "kernels": {"cases": [kernel | {"torch_compile_ms": 5.0, "agrees": True}]},
        "large": {"error": "first\nout of luck", "cases": [{"case": "rows", "shape": [2, 3], "equal": False}]},
        "tests": {"summary": "12 passed in 3s"},
    }
    text = page(tmp_path, {"environment": ENVIRONMENT, "parts": parts, "records": []})
    assert "| a kernel | 9 | 2.000 | 3000 | 75 | 2.50 | yes |" in text
    assert "The part `large` failed: `out of luck`" in text
    assert "| rows | 2 x 3 | NO |" in text
    assert "12 passed" in text


def test_sweeps_are_drawn_and_fitted(tmp_path):
    records = [
        {"sweep": "tokens", "implementation": "sgfast", **RECORD, "tokens": tokens, "milliseconds": tokens / 8}
        for tokens in (8, 16)
    ]
    text = page(tmp_path, {"environment": ENVIRONMENT, "records": records})
    assert "| tokens 8 to 16 | a task | sgfast | 1.00 | 1.00 |  | 0.00 | 0.50 |" in text
    assert (tmp_path / "page" / "measured-growth.png").read_bytes().startswith(b"\x89PNG")
    assert "](page/measured-growth.png)" in text


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"records": []}', '{"environment": {"device": "x"}}'])
def test_files_without_origin_are_refused(content, tmp_path, capsys):
    file = tmp_path / "bad.json"
    file.write_text(content)
    assert report.main([str(file), "--out", str(tmp_path / "page.md")]) == 2
    assert "bad.json" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_the_page_is_made_from_the_results_that_are_there(tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    assert report.main(["--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    for path in (*report.RESULTS.glob("*-cpu.json"), *report.RESULTS.glob("*.md")):
        assert path.name in text


def test_results_show_no_cliff_over_the_vocabulary():
    """Time over eager PyTorch and memory per logit rise at most 1.3-fold from one vocabulary to the next."""
    content = report.read(report.RESULTS / "growth-cpu" / "divergences.json")
    rows = [row for row in report.growth(content["records"]) if row["sweep"] == "vocab" and "ratio_cliff" in row]
    ours = [row for row in rows if row["implementation"] == "sgfast"]
    assert {row["task"] for row in ours} == {"four metrics", "jensen_shannon with gradient"}
    for row in ours:
        assert (row["from"], row["to"]) == (1000, 262144)
        assert row["ratio_cliff"] <= 1.3
        assert row["peak_bytes_cliff"] <= 1.3
