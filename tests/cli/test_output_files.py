"""What the commands do to files: nothing to what is no file, nothing half, one run at a time, equal bytes, no seed."""

import contextlib
import hashlib
import json
import os
import resource
import subprocess
import sys
import time

import pytest

from sgfast.client import StainedGlassTransformForText
from sgfast.evaluation import run as evaluation_run
from sgfast.examples import vision
from sgfast.utils.files import replacing
from sgfast.utils.one_writer import one_writer
from tests.processes import forked
from tests.seed_search import SEED, SMALL_SEED, assert_tells_no_seed

FOLDERS = ("train", "evaluate", "demo", "bench divergences")
FILES = ("transform prompt", "transform data")
WRITTEN = {
    "train": ("training.json", "training.png", "transform.safetensors"),
    "evaluate": ("metrics.json", "options.json", "sequences.jsonl", "divergences.png", "ranks.png"),
    "demo": ("metrics.json", "training.json", "training.png", "transform.safetensors"),
    "bench divergences": ("divergences.json", "divergences-growth.png"),
}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kinds of files, locks and limits of POSIX")


def assert_one_line(error: str, message: str) -> None:
    lines = [line for line in error.splitlines() if line.startswith("sgfast: ")]
    assert len(lines) == 1, error
    assert message in lines[0], error
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a link"])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_what_is_no_file_is_refused_before_anything_is_loaded(command, tmp_path, name, kind):
    for written in WRITTEN.get(name, [None]):
        out = tmp_path / str(written)
        path = out if written is None else out / written
        path.parent.mkdir(exist_ok=True)
        if kind == "a pipe":
            os.mkfifo(path)
        elif kind == "a folder":
            path.mkdir()
        else:
            path.symlink_to(path)
        before = os.lstat(path)
        code, error = command(name, out=out)
        assert code == 2
        what = "Too many levels of symbolic links" if kind == "a link" else f"it is {kind}, not a"
        assert_one_line(error, f"{path} cannot be written: {what}")
        assert "loading" not in error
        assert os.path.samestat(os.lstat(path), before)
        assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_folder_is_refused(command, tmp_path, name):
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "file", "it is a file"), (tmp_path / "pipe", "it is a pipe")):
        code, error = command(name, out=path)
        assert code == 2
        assert_one_line(error, f"{path} must be a folder; {kind}")
    code, error = command(name, out=tmp_path / "file" / "inside")
    assert code == 2
    assert_one_line(error, "must be a folder: Not a directory")
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_there_is_replaced_by_force_alone(command, tmp_path, name):
    out = tmp_path / "out"
    for path in (out, tmp_path / "link"):
        out.write_text("old")
        if path != out:
            path.symlink_to(out)
        code, error = command(name, out=path)
        assert code == 2
        assert_one_line(error, f"--out {path} exists: give another file, or replace it with --force")
        assert out.read_text() == "old"
        assert command(name, "--force", out=path) == (0, command(name, "--force", out=path)[1])
        assert out.read_bytes()[8:9] == b"{"
    assert (tmp_path / "link").is_symlink()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """A disk that is full once a file has so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("transform prompt", 500), ("transform data", 2000), ("transform data", 30_000)),
        *(("train", 2000), ("train", 60_000), ("evaluate", 2000), ("evaluate", 9000), ("demo", 2000)),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(command, tmp_path, name, size):
    out = tmp_path / "out"
    with files_of_at_most(size):
        code, error = command(name, out=out)
    assert code == 2
    assert_one_line(error, str(out))
    assert "File too large" in error or "cannot be written" in error
    whole = [path for path in out.rglob("*") if path.is_file() and "progress" not in path.parts]
    assert not any(path.name.startswith(".") for path in whole)
    for path in whole:
        if path.suffix == ".json":
            json.loads(path.read_text())
        assert path.suffix != ".safetensors" or "checkpoints" in path.parts
    if name == "demo":
        return
    # With room again it goes on, as if nothing had been.
    resumed = ("--resume",) if name in ("train", "evaluate") else ()
    assert command(name, *resumed, out=out)[0] == 0
    if name == "evaluate":
        assert command(name, out=tmp_path / "straight")[0] == 0
        assert (out / "sequences.jsonl").read_bytes() == (tmp_path / "straight" / "sequences.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["train", "evaluate", "demo"])
def test_a_folder_has_one_writer(command, tmp_path, name):
    def hold(begun):
        with one_writer(tmp_path / "out"):
            begun()
            time.sleep(60)

    with forked(hold):
        resumed = () if name == "demo" else ("--resume",)
        for arguments in ((), resumed):
            code, error = command(name, *arguments, out=tmp_path / "out")
            assert code == 2
            assert_one_line(error, f"{tmp_path / 'out'} is being written by another run")
            assert "loading" not in error
        assert os.listdir(tmp_path / "out") == []
    if name != "demo":
        assert command(name, out=tmp_path / "out")[0] == 0  # its holder is killed


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_one_writer(command, tmp_path, name):
    def hold(begun):
        with replacing(tmp_path / "out") as temporary:
            temporary.write_text("half")
            begun()
            time.sleep(60)

    with forked(hold):
        code, error = command(name, out=tmp_path / "out")
        assert code == 2
        assert_one_line(error, f"{tmp_path / 'out'} is being written by another process")
    assert command(name, out=tmp_path / "out")[0] == 0
    assert os.listdir(tmp_path) == ["out"]


def test_an_evaluation_is_not_resumed_while_it_runs(command, tmp_path, monkeypatch):
    """What gave 793 lines for 400 records."""
    out, inside = tmp_path / "out", []
    measure = evaluation_run.measure_example

    def measuring(settings, subject, budget, example):
        if example.index == 3 and not inside:
            inside.append(subprocess.run(again, capture_output=True, text=True, check=False))
        return measure(settings, subject, budget, example)

    monkeypatch.setattr(evaluation_run, "measure_example", measuring)
    code, _ = command("evaluate", out=tmp_path / "absent", data=tmp_path / "absent")  # fills in sys.argv
    assert code == 2
    again = [sys.executable, "-m", *sys.argv, "--resume"]
    again[again.index(str(tmp_path / "absent"))] = str(tmp_path / "data")
    again = [str(out) if part == str(tmp_path / "absent") else part for part in again]
    (tmp_path / "data").write_text("the class\n" * 8)
    assert command("evaluate", out=out, data=tmp_path / "data", save_seconds=0)[0] == 0
    (second,) = inside
    assert second.returncode == 2
    assert_one_line(second.stderr, f"{out} is being written by another run")
    assert len((out / "sequences.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("name", "seed"), [("train", SMALL_SEED), ("evaluate", SEED), *((name, SEED) for name in FILES)]
)
def test_no_file_tells_the_seed(command, tmp_path, monkeypatch, name, seed):
    if name == "evaluate":  # also what an interrupted one leaves
        monkeypatch.setattr("sgfast.evaluation.progress.Progress.remove", lambda self: None)
    options = {"train": {"set": "save_steps=1"}, "evaluate": {"attacks": "nearest,repeated,information"}}.get(name, {})
    arguments = ("--set", "loss.distillation_layer_index=1") if name == "train" else ()
    folder = tmp_path / "out"
    if name in FILES:
        folder.mkdir()
    out = folder / "sent.safetensors" if name in FILES else folder
    assert command(name, *arguments, out=out, seed=seed, **options)[0] == 0
    if name == "evaluate":
        survey = json.loads((out / "progress" / "run.json").read_text())["survey"]
        assert survey["sample"]
        assert all(set(one) == {"index", "tokens"} for one in survey["sample"])  # no priority, which tells the seed
    assert_tells_no_seed(folder, seed)


@pytest.mark.parametrize("name", ["train", "evaluate", "transform data"])
def test_one_seed_gives_equal_bytes(command, tmp_path, name):
    files = {"train": ("transform.safetensors", "training.png"), "evaluate": WRITTEN["evaluate"]}.get(name, [""])
    for out in ("one", "two"):
        assert command(name, out=tmp_path / out, seed=3)[0] == 0
    for file in files:
        one, two = (hashlib.sha256((tmp_path / out / file).read_bytes()).hexdigest() for out in ("one", "two"))
        assert one == two, file


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_behind_the_printed_result_is_one_line(tiny_model_folder):
    command = [sys.executable, "-m", "sgfast", "voronoi", "--model", str(tiny_model_folder), "--json"]
    with open("/dev/full", "w") as full:
        finished = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert finished.returncode == 2
    assert_one_line(finished.stderr, "No space left on device")
    assert "Exception ignored" not in finished.stderr


def test_the_vision_example_and_saves_in_python_likewise(tiny_transform, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    client = StainedGlassTransformForText.from_pretrained(tiny_transform)
    for path, message in ((tmp_path / "pipe", "it is a pipe, not a regular file"), (tmp_path, "it is a folder")):
        with pytest.raises(OSError, match=message):
            vision.run(path, percent_to_mask=0.5, alpha=0.5, epochs=1)
        with pytest.raises(OSError, match=message):
            client.save_pretrained(path)
    assert os.listdir(tmp_path) == ["pipe"]
