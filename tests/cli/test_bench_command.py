"""``sgfast bench`` at sizes that take no time."""

import json

import pytest

from sgfast.cli.main import main

PNG, EAGER = b"\x89PNG", "eager PyTorch"


def sgfast(*arguments) -> int:
    """Run the command line in this process; return its exit code."""
    try:
        main([str(one) for one in arguments])
    except SystemExit as error:
        return error.code or 0
    return 0


def test_divergences_write_table_json_and_plots(tmp_path, capsys):
    sizes = ["--vocab", "64,256", "--tokens", "2,4", "--top-k", "1,3", "--seconds", "0", "--device", "cpu"]
    assert sgfast("bench", "divergences", *sizes, "--out", tmp_path / "new") == 0
    printed = capsys.readouterr().out
    assert "say nothing about a GPU" in " ".join(printed.split())
    assert "4 x 256 k=3" in printed
    content = json.loads((tmp_path / "new" / "divergences.json").read_text())
    assert content["environment"]["kind"] == "cpu"
    records = content["records"]
    swept = {(one["sweep"], one["tokens"], one["vocab"], one["top_k"]) for one in records if one["sweep"] != "noise"}
    # While one size varies the others stay at the largest asked for.
    assert swept == {
        *(("vocab", 4, vocab, None) for vocab in (64, 256)),
        *(("tokens", tokens, 256, None) for tokens in (2, 4)),
        *(("top_k", 4, 256, k) for k in (1, 3)),
    }
    ours = [one for one in records if one["implementation"] == "sgfast"]
    assert max(one["value_error"] for one in ours) < 1e-6
    assert max(one.get("gradient_error", 0) for one in ours if one["dtype"] == "float32") < 1e-6
    kept = {by: [one["kept_bytes_per_element"] for one in records if _in_full(one, by)] for by in ("sgfast", EAGER)}
    assert max(kept["sgfast"]) < 1  # a few numbers a row
    assert min(kept[EAGER]) >= 16
    eager = {one["noise"]: one["relative_value_error"] for one in records if _eager_in_float32(one)}
    assert eager[0.001] > 100 * eager[1.0]
    assert {row["sweep"] for row in content["growth"]} == {"vocab", "tokens", "top_k"}
    memory = [row for row in content["growth"] if row["sweep"] == "vocab" and row["implementation"] == "eager PyTorch"]
    assert all(row["peak_bytes_exponent"] == pytest.approx(1, abs=0.1) for row in memory)
    for name in ("growth", "accuracy"):
        assert (tmp_path / "new" / f"divergences-{name}.png").read_bytes().startswith(PNG)


def _in_full(record, implementation) -> bool:
    return record["implementation"] == implementation and not record["top_k"] and "kept_bytes_per_element" in record


def _eager_in_float32(record) -> bool:
    wanted = ("noise", "eager PyTorch", "float32", "jensen_shannon with gradient")
    return tuple(record[name] for name in ("sweep", "implementation", "dtype", "task")) == wanted


@pytest.mark.parametrize(
    ("family", "sizes", "tasks"),
    [
        ("hidden", ["--tokens", "3", "--width", "16,32"], {"distances", "distances with gradient"}),
        ("noise", ["--tokens", "3", "--width", "16,32"], {"apply_noise", "apply_noise with gradients"}),
        ("train", ["--tokens", "4", "--vocab", "64,96"], {"transform", "student"}),
    ],
)
def test_other_families(family, sizes, tasks, tmp_path):
    chosen = ["--impl", "torch", "--dtype", "bfloat16", "--seconds", "0", "--device", "cpu"]
    assert sgfast("bench", family, *sizes, *chosen, "--out", tmp_path) == 0
    records = json.loads((tmp_path / f"{family}.json").read_text())["records"]
    assert {one["task"] for one in records} == tasks
    assert {one["implementation"] for one in records} == {"eager PyTorch", "sgfast torch"}
    assert {one["dtype"] for one in records} == {"bfloat16"}
    assert all(one["milliseconds"] > 0 and one["peak_bytes"] > 0 for one in records)
    assert (tmp_path / f"{family}-growth.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["divergences", "--vocab", "many"], "--vocab must be whole numbers"),
        (["divergences", "--tokens", "0"], "--tokens must be whole numbers"),
        (["divergences", "--vocab", "50", "--top-k", "51"], "--top-k must be at most the vocabulary, 50; got 51"),
        (["hidden", "--dtype", "int8"], "--dtype must be one of float32"),
        (["hidden", "--dtype", "flaot32"], "got 'flaot32'. Did you mean 'float32'?"),
        (["noise", "--impl", "fast"], "--impl must be among auto"),
        (["noise", "--impl", "tritn"], "got 'tritn'. Did you mean 'triton'?"),
        (["train", "--device", "tpu"], "--device must be auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, capsys):
    assert sgfast("bench", *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_unknown_family_is_a_usage_error(capsys):
    assert sgfast("bench", "everything") == 2
    assert "Traceback" not in capsys.readouterr().err
