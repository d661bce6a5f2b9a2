"""README: every Python block runs as written, in order; every command line exists and runs on small inputs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line for language, text in BLOCKS if not language for line in text.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the blocks have run."""
    folder = tmp_path_factory.mktemp("readme")
    program = "\n".join([*PYTHON, "print(tuple(embeddings.shape)[0::2], value.item() > 0, sorted(values))"])
    (folder / "readme.py").write_text(program, encoding="utf-8")
    (folder / "held_out.txt").write_text("The letter is for Ada.\n" * 4, encoding="utf-8")
    (folder / "texts.txt").write_text("My name is Ada.\nThe invoice is still open.\n" * 8, encoding="utf-8")
    (folder / "docs").symlink_to(ROOT / "docs")
    run = subprocess.run([sys.executable, "readme.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "(1, 576) True ['jeffreys', 'total_variation']"
    return folder


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_every_command_is_known():
    """A new kind of command line needs a test of its own below."""
    words = {" ".join(line.split()[:2]) for line in COMMANDS}
    assert words == {"python -m", "make demo", "make test", "sgfast train", "sgfast evaluate", "sgfast transform"}


def test_make_has_the_targets_and_pyproject_the_extras():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert f"\n{target}:" in makefile, target
    project = (ROOT / "pyproject.toml").read_text()
    (sentence,) = re.findall(r"\[Extras\].*?\.$", README, flags=re.M | re.S)
    named = set(re.findall(r"`([a-z]+)`", sentence))
    table = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert named == set(re.findall(r"^([a-z]+) = \[", table, flags=re.M))
    for extras in re.findall(r"\[([a-z,]+)\]'", README):
        assert all(f"\n{extra} = [" in project for extra in extras.split(",")), extras


def test_the_commands_run(folder):
    """As written but for the number of steps and the size of the evaluation."""
    small = {"train": ["--steps", "2", "--set", "batch_size=2"], "evaluate": ["--attacks", "nearest"], "transform": []}
    for line in COMMANDS:
        if line.startswith("sgfast "):
            words = shlex.split(line)[1:]
            run = subprocess.run(
                [sys.executable, "-m", "sgfast", *words, *small[words[0]]],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"{line}\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    assert (folder / "run" / "transform.safetensors").exists()
    assert (folder / "results" / "metrics.json").exists()
    assert (folder / "prompt.safetensors").exists()


def test_every_link_and_program_exists():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for module in re.findall(r"python -m (sgfast[a-z_.]+|benchmarks[a-z_.]*)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
