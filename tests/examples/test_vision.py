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
    """What the example makes of its own settings."""
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


def test_the_picture_shows_originals_above_transformed_images(trained, tmp_path):
    from matplotlib import pyplot

    left_is_dark = torch.zeros(1, 1, 8, 8)
    left_is_dark[..., :4] = 1.0
    classes = torch.zeros(1, dtype=torch.long)
    images = vision.Images(left_is_dark, classes, left_is_dark, classes)
    mirrored = vision.Result("mirrored", 1.0, 0.1, 0.0, left_is_dark.flip(-1))
    vision.draw(tmp_path / "pair.png", images, [mirrored], columns=1)
    light = pyplot.imread(tmp_path / "pair.png")[..., :3].mean(-1)
    top, bottom = light[: len(light) // 2], light[len(light) // 2 :]
    middle = light.shape[1] // 2
    assert top[:, :middle].mean() < top[:, middle:].mean() - 0.2
    assert bottom[:, middle:].mean() < bottom[:, :middle].mean() - 0.2
    assert pyplot.get_fignums() == []
    assert pyplot.imread(trained[0]).shape[:2] == (414, 1200)


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
def test_wrong_options_end_before_anything_is_trained(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(vision, "load_images", lambda _: pytest.fail("it began"))
    with pytest.raises(SystemExit) as caught:
        vision.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
