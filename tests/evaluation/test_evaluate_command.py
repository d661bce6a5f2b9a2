"""``sgfast evaluate`` on a tiny saved model: what it writes and prints, wrong input, processes that are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from sgfast.cli.main import main
from sgfast.evaluation.progress import Part
from tests.tiny_evaluation import records, save_transform
from tests.tiny_models import tiny_causal_lm

WRITTEN = ["attacks.png", "divergences.png", "metrics.json", "options.json", "ranks.png", "sequences.jsonl"]


@pytest.fixture
def evaluate(monkeypatch, model_folder, transform_file, data_file, tmp_path):
    """Run the command in this process with few attacks; return its exit code."""

    def run(*arguments, out="out", **options) -> int:
        settings = {"model": model_folder, "transform": transform_file, "data": data_file, "out": tmp_path / out}
        settings |= {"attacks": "nearest"} | options
        flags = [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["sgfast", "evaluate", *map(str, [*flags, *arguments])])
        try:
            main()
        except SystemExit as error:
            return error.code or 0
        return 0

    return run


def metrics_of(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_results_and_table(evaluate, tmp_path, capsys):
    assert evaluate("--num-logits", 20, "--memory-budget", "64MiB", attacks="nearest,information") == 0
    assert sorted(os.listdir(tmp_path / "out")) == WRITTEN
    metrics = metrics_of(tmp_path / "out")
    assert list(metrics)[:2] == ["strongest_attack", "attacks"]
    assert metrics["strongest_attack"] == "nearest"
    assert list(metrics["attacks"]) == ["nearest", "information"]
    nearest = metrics["attacks"]["nearest"]
    assert nearest["failure_rate"] == metrics["privacy"]["nearest_neighbor_failure_rate"]
    assert nearest["ci95"][0] <= nearest["failure_rate"] <= nearest["ci95"][1]
    assert nearest["tokens"] == metrics["data"]["transformed_tokens"]
    assert set(metrics["privacy"]) == {"nearest_neighbor_failure_rate", "mean_reconstruction_rank"}
    assert metrics["memory_budget"] == 2**26
    assert {"sgfast", "torch", "transformers"} == set(metrics["versions"])
    assert "seed" not in metrics["identity"]
    assert len(metrics["identity"]["data"]) == len(metrics["identity"]["transform"]) == 64
    printed = capsys.readouterr()
    assert "13 records" in printed.out
    assert f"{nearest['failure_rate']:.1%} (nearest, " in printed.out
    assert "a failure proves nothing about other attacks" in printed.out
    agreement = f"{metrics['utility']['next_token_agreement']:.1%}"
    assert any("same likeliest next token" in line and agreement in line for line in printed.out.splitlines())
    assert "13 records" in printed.err  # the survey's bar


def test_another_seed_is_another_draw(evaluate, tmp_path):
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert evaluate(out=out, seed=seed) == 0
    one, two, three = (metrics_of(tmp_path / out) for out in ("one", "two", "three"))
    assert one == two
    assert one["utility"] != three["utility"]
    assert one["utility"]["clean_perplexity"] == three["utility"]["clean_perplexity"]


def test_several_transforms_are_compared(evaluate, base_model, tmp_path, capsys):
    weak = save_transform(base_model, tmp_path / "weak.safetensors", rhos_init=-4.0)
    assert evaluate("--transform", weak) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["options.json", "transform", "utility_privacy.png", "weak"]
    strong, faint = (metrics_of(tmp_path / "out" / name) for name in ("transform", "weak"))
    name = "next_token_utility/jefferys"
    assert faint["utility"][name] < strong["utility"][name]
    assert faint["privacy"]["nearest_neighbor_failure_rate"] < strong["privacy"]["nearest_neighbor_failure_rate"]
    assert (tmp_path / "out" / "utility_privacy.png").read_bytes().startswith(b"\x89PNG")
    assert any("transform" in line and "weak" in line for line in capsys.readouterr().out.splitlines())


def test_resume_of_nothing_of_a_finished_one_and_of_another(evaluate, base_model, tmp_path, capsys):
    assert evaluate("--resume", attacks="none") == 0
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    assert "13 records" in capsys.readouterr().out
    assert evaluate("--resume", attacks="none") == 0  # finished: the table again, without the model
    printed = capsys.readouterr()
    assert "13 records" in printed.out
    assert "loading" not in printed.err
    assert evaluate(attacks="none") == 2
    assert "holds an evaluation: continue it by --resume" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the class"}\n')
    weak = save_transform(base_model, tmp_path / "weak.safetensors", rhos_init=-4.0)
    for options, message in (
        ({"data": other}, "is not the data that"),
        ({"transform": weak}, "is not the transform that"),
        ({"beta": 3}, "was begun with --beta 1; now it is 3"),
        ({"attacks": "nearest"}, "was begun with --attacks none; now it is nearest"),
    ):
        assert evaluate("--resume", **({"attacks": "none"} | options)) == 2
        error = capsys.readouterr().err
        assert "--resume" in error
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


def test_resume_reads_the_options_of_the_folder(evaluate, base_model, tmp_path, monkeypatch, capsys):
    weak = save_transform(base_model, tmp_path / "weak.safetensors", rhos_init=-4.0)
    options = {"beta": 2, "num-logits": 7, "memory-budget": "64MiB", "text-as": "plain", "attacks": "nearest,farthest"}
    assert evaluate("--transform", weak, **options) == 0
    out = tmp_path / "out"
    before = {name: (out / name / "metrics.json").read_bytes() for name in ("transform", "weak")}
    assert b"271828" not in (out / "options.json").read_bytes()
    assert "seed" not in (out / "options.json").read_text()

    def resume(*arguments):
        monkeypatch.setattr(sys, "argv", ["sgfast", "evaluate", "--out", str(out), "--resume", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert resume() == 0
    printed = capsys.readouterr()
    assert "loading" not in printed.err
    assert any("transform" in line and "weak" in line for line in printed.out.splitlines())
    for path in (out / "weak").iterdir():  # as if it had been killed between the two
        path.unlink()
    assert resume() == 0
    assert {name: (out / name / "metrics.json").read_bytes() for name in before} == before
    capsys.readouterr()
    for arguments, message in (
        (["--beta", 3], "was begun with --beta 2; now it is 3"),
        (["--num-logits", 8], "was begun with --num-logits 7; now it is 8"),
        (["--attacks", "nearest"], "was begun with --attacks nearest,farthest; now it is nearest"),
    ):
        assert resume(*arguments) == 2
        assert message in capsys.readouterr().err
    assert resume("--beta", 2, "--attacks", "farthest,nearest") == 0
    for damaged in ("[]", "{", '{"beta": "2"}', '{"transform": [3]}', '{"seed": 1}'):
        (out / "options.json").write_text(damaged)
        capsys.readouterr()
        assert resume() == 2
        assert "options.json is damaged" in capsys.readouterr().err
    (out / "options.json").unlink()
    assert resume() == 2
    assert "give --transform; " in capsys.readouterr().err


def test_wrong_input_is_one_line_and_writes_nothing(evaluate, tmp_path, model_folder, capsys):
    files = {}
    for name, content in {
        "broken.jsonl": b'{"text": "x"}\n{"text": "y"\n',
        "empty.jsonl": b"\n",
        "bytes.txt": b"good\n\xff\n",
        "role.jsonl": b'{"text": "x"}\n\n{"messages": [{"role": "x", "content": "y"}]}',
        "answers.jsonl": b'{"messages": [{"role": "assistant", "content": "y"}]}',
        "damaged.safetensors": b"no transform",
    }.items():
        files[name] = tmp_path / name
        files[name].write_bytes(content)
    other = tiny_causal_lm("llama", vocab_size=299)[0]
    stranger = save_transform(other, tmp_path / "stranger.safetensors")
    for options, message in (
        ({"data": files["broken.jsonl"]}, f"{files['broken.jsonl']}, line 2: not JSON"),
        ({"data": files["empty.jsonl"]}, "holds no records"),
        ({"data": files["bytes.txt"]}, f"{files['bytes.txt']}, line 2: not UTF-8"),
        ({"data": files["role.jsonl"]}, f"{files['role.jsonl']}, line 3: message 1"),
        ({"data": files["answers.jsonl"]}, "the masks select no token to transform"),
        ({"data": tmp_path / "absent"}, "absent cannot be read"),
        ({"transform": tmp_path / "absent"}, "absent cannot be read"),
        ({"transform": files["damaged.safetensors"]}, "damaged.safetensors"),
        ({"transform": stranger}, "is a transform for another model"),
        ({"model": tmp_path / "absent"}, "cannot be loaded"),
        ({"memory-budget": "5KiB"}, "--memory-budget 5 KiB is too small"),
        ({"memory-budget": "lots"}, "--memory-budget must be a size"),
        ({"attacks": "nearest,guess"}, "--attacks must be"),
        ({"attacks": "nearst"}, "got 'nearst'. Did you mean 'nearest'?"),
        ({"device": "cuda:7"}, "--device cuda:7: PyTorch finds "),
        ({"num-logits": 10**6}, "--num-logits"),
        ({"beta": 10**6}, "--beta"),
        ({"max-length": 10**6}, "--max-length"),
    ):
        assert evaluate(**options) == 2, message
        error = capsys.readouterr().err
        assert message in error, error
        assert [line for line in error.splitlines() if line.startswith("sgfast: ")], error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists(), message


def test_sizes_are_checked_before_the_weights_are_loaded(evaluate, monkeypatch, capsys):
    monkeypatch.setattr("sgfast.evaluation.subject.load_causal_lm", None)
    for options, message in (
        ({"num-logits": 10**6}, "--num-logits is 1000000, the model has "),
        ({"beta": 10**6}, "--beta is 1000000, the model has "),
        ({"max-length": 10**6}, "--max-length is 1000000, the model has "),
    ):
        assert evaluate(**options) == 2
        assert message in capsys.readouterr().err


def test_ctrl_c_ends_after_a_record_and_resume_goes_on(evaluate, tmp_path, monkeypatch, capsys):
    from sgfast.evaluation import run

    measured, measure_example = [], run.measure_example

    def interrupted(settings, subject, budget, example):
        measured.append(example.index)
        if len(measured) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return measure_example(settings, subject, budget, example)

    monkeypatch.setattr(run, "measure_example", interrupted)
    assert evaluate() == 130
    assert "--resume goes on from here" in capsys.readouterr().err
    assert evaluate("--resume", seed=3) == 2  # which no file says: a record measured again does
    error = capsys.readouterr().err
    assert f"{tmp_path / 'out'} was begun with another --seed" in error
    assert "Traceback" not in error
    assert evaluate("--resume") == 0
    assert measured == [0, 1, 2, 0, 0, *range(3, 13)]


def test_names_with_brackets_are_shown_as_they_are(evaluate, data_file, tmp_path, capsys):
    data = tmp_path / "[draft].jsonl"
    data.write_bytes(data_file.read_bytes())
    assert evaluate(data=data, out="[v2]", attacks="none") == 0
    printed = capsys.readouterr().out
    assert "[draft].jsonl: 13 records" in printed
    assert f"in {tmp_path / '[v2]'}: " in printed


def test_the_table_calls_estimates_by_their_name(evaluate, base_model, tmp_path, capsys):
    masked = save_transform(base_model, tmp_path / "masked.safetensors", percent_to_mask=0.25)
    assert evaluate("--transform", masked, attacks="information") == 0
    upper = [
        metrics_of(tmp_path / "out" / name)["attacks"]["information"]["kl_upper"] for name in ("transform", "masked")
    ]
    line = next(line for line in capsys.readouterr().out.splitlines() if "one embedding tells at most" in line)
    assert [cell.strip() for cell in line.split("│")[2:4]] == [f"{upper[0]:.4g}", f"{upper[1]:.4g} (estimate)"]


def test_parquet_needs_its_library(evaluate, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert evaluate("--parquet") == 2
    assert "--parquet needs pyarrow" in capsys.readouterr().err


def test_parquet_of_a_finished_evaluation_may_be_asked_for_later(evaluate, tmp_path, monkeypatch):
    from sgfast.cli import evaluate as command

    copied = []
    monkeypatch.setattr(command, "check_parquet", lambda: None)
    monkeypatch.setattr(command, "write_parquet", lambda path, lines: copied.append((path, lines.read_text())))
    assert evaluate(attacks="none") == 0
    assert evaluate("--resume", "--parquet", attacks="none") == 0
    assert copied == [(tmp_path / "out" / "sequences.parquet", (tmp_path / "out" / "sequences.jsonl").read_text())]


def processes_of_two(command, port):
    """What torchrun starts, without it: so that each can be killed."""
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_killed_and_resumed_by_torchrun(evaluate, model_folder, transform_file, tmp_path):
    """Two processes with uneven shares, killed, and resumed by torchrun; one process left alone: the same bytes."""
    data = tmp_path / "many.jsonl"
    data.write_text("\n".join(map(json.dumps, records(151))) + "\n")
    options = {"model": model_folder, "transform": transform_file, "data": data, "out": tmp_path / "killed"}
    options |= {"attacks": "nearest,repeated", "attack-tokens": 100, "save-seconds": 0}
    flags = ["-m", "sgfast", "evaluate"]
    flags += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    started = processes_of_two(flags, free_port())
    parts = [tmp_path / "killed" / "progress" / f"1-{rank}.safetensors" for rank in range(2)]
    try:
        deadline = time.monotonic() + 200
        while not all(path.exists() for path in parts):
            assert all(process.poll() is None for process in started)
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()
    reached = [Part.read(path).reached for path in parts]
    assert 2 <= sum(part.records for part in reached) < 151
    assert not (tmp_path / "killed" / "metrics.json").exists()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [sys.executable, *launcher, *flags, "--resume"],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert evaluate(data=data, out="whole", attacks="nearest,repeated", **{"attack-tokens": 100}) == 0
    for name in ("metrics.json", "sequences.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
