"""``sgfast voronoi`` and its script on a tiny saved model."""

import json
import runpy
import sys

import pytest

from sgfast.cli.main import main
from sgfast.metrics import compute_percentile_voronoi_l2_distance
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

SCRIPT = "sgfast.scripts.compute_percentile_voronoi_l2_distance"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, embedding table); two tokens share an embedding, and one, the padding, has none."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    base_model, _, _ = tiny_causal_lm("llama", vocab_size=len(tokenizer))
    weight = base_model.get_input_embeddings().weight.detach()
    weight[5], weight[0] = weight[3], 0
    base_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, weight


def sgfast(monkeypatch, *arguments) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["sgfast", *map(str, arguments)])
    try:
        main()
    except SystemExit as error:
        return error.code or 0
    return 0


@pytest.mark.parametrize(("flag", "half"), [((), True), (("--full",), False)])
def test_json_for_machines(model, monkeypatch, capsys, flag, half):
    folder, weight = model
    assert sgfast(monkeypatch, "voronoi", "--model", folder, "--percentile", 20, "--json", *flag) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == {
        "model": str(folder),
        "percentile": 20.0,
        "half": half,
        "voronoi_l2_distance": compute_percentile_voronoi_l2_distance(weight, 20, half),
        "rows": weight.shape[0],
        "distinct_nonzero_rows": weight.shape[0] - 2,
    }
    assert "loading" in captured.err
    rows = result["distinct_nonzero_rows"]
    assert f"{rows}/{rows}" in captured.err


def test_table_for_people(model, monkeypatch, capsys):
    folder, weight = model
    assert sgfast(monkeypatch, "voronoi", "--model", folder) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "half the distance to the nearest other embedding" in printed
    assert "(2 more are zero or equal to another)" in printed
    for percentile in (5, 50):
        assert f"{percentile} │ {compute_percentile_voronoi_l2_distance(weight, percentile):.6g}" in printed


def test_script(model, monkeypatch, capsys):
    folder, weight = model
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--model", str(folder), "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(SCRIPT, run_name="__main__")
    assert not ended.value.code
    value = json.loads(capsys.readouterr().out)["voronoi_l2_distance"]
    assert value == compute_percentile_voronoi_l2_distance(weight)


def test_wrong_input_is_one_line(model, monkeypatch, capsys, tmp_path):
    assert sgfast(monkeypatch, "voronoi", "--model", tmp_path / "absent") == 2
    error = capsys.readouterr().err
    message = error[error.index("sgfast:") :]
    assert "cannot be loaded" in message
    assert len(message.strip().splitlines()) == 1
    assert "Traceback" not in error
    for arguments in (["--percentile", "101"], ["--percentile", "many"], ["--unknown"]):
        assert sgfast(monkeypatch, "voronoi", "--model", model[0], *arguments) == 2
        assert "Traceback" not in capsys.readouterr().err
