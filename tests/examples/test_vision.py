"""The digits example: what it promises, on the command line and in its numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgfast.examples import vision

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The example with its own settings."""
    out = tmp_path_factory.mktemp("vision") / "digits.png"
    clean_accuracy, results = vision.run(out, percent_to_mask=0.6, alpha=vision.ALPHA, epochs=vision.EPOCHS)
    return out, clean_accuracy, results


def test_at_most_five_points_of_accuracy_are_lost(trained):
    _, clean_accuracy, results = trained
    assert clean_accuracy > 0.95
    assert [result.name for result in results] == ["CloakNoiseLayerOneShot", "PatchCloakNoiseLayer"]
    for result in results:
        assert result.accuracy >= clean_accuracy - 0.05
        assert result.masked == pytest.approx(int(0.6 * 64) / 64)
        assert 0.05 < result.mean_sigma < 1.0


def test_the_picture_shows_originals_beside_transformed_images(trained):
    from matplotlib import pyplot

    picture = pyplot.imread(trained[0])
    dark = (picture[..., :3].mean(-1) < 0.5).any(1).nonzero()[0]
    assert len(picture) > 300
    assert dark.min() < len(picture) / 3
    assert dark.max() > len(picture) * 2 / 3
    assert pyplot.get_fignums() == []


def test_transforms_hide_the_pixels_they_suppress(trained):
    """A one-shot transform gives suppressed pixels the same value in every image."""
    one_shot = trained[2][0].transformed
    constant = (one_shot == one_shot[:1]).all(0).flatten()
    assert constant.sum() == int(0.6 * 64)


def run_command(*arguments, cwd):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels/torch-ext'}", "PATH": "", "HOME": str(cwd)}
    command = [sys.executable, "-m", "sgfast.examples.vision", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_command_line(tmp_path):
    finished = run_command("--epochs", "1", "--out", "digits.png", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "CloakNoiseLayerOneShot" in finished.stdout
    assert "PatchCloakNoiseLayer" in finished.stdout
    assert finished.stdout.count("59.4%") == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == ["digits.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--percent-to-mask", "1.5"], "percent_to_mask must lie in [0, 1]; got 1.5"),
        (["--alpha", "2"], "alpha must lie in [0, 1]; got 2.0"),
        (["--patch-size", "0"], "patch_size must be at least 1; got 0"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--out", "missing/digits.png"], "missing"),
    ],
)
def test_wrong_options_end_with_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    with pytest.raises(SystemExit) as caught:
        vision.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
