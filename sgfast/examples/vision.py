"""Image classification under a transform: ``python -m sgfast.examples.vision``.

A small convolutional network learns scikit-learn's handwritten digits (8 × 8 pixels, 1797 images). It is then frozen,
and two transforms are trained over it: `CloakNoiseLayerOneShot`, one mu and sigma for every pixel, and
`PatchCloakNoiseLayer`, whose mu and sigma follow from the pixels of a patch. For each transform the program prints the
accuracy on held-out images before and after, the mean sigma of the pixels that are kept, and the fraction of pixels
that is suppressed. A picture shows held-out images beside each transform's outputs for them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgfast.model import NoisyModel
from sgfast.model.noise_loss import check_interpolation
from sgfast.noise_layer import BaseNoiseLayer, CloakNoiseLayerOneShot, PatchCloakNoiseLayer, parameter_groups
from sgfast.ops.validation import check_count
from sgfast.utils.figures import load_pyplot, save_png
from sgfast.utils.files import check_output_file

BATCH_SIZE, HELD_OUT = 64, 360
BASE_EPOCHS, BASE_LEARNING_RATE = 20, 2e-3
EPOCHS, LEARNING_RATE, ALPHA = 40, 0.05, 0.05
SCALE = (1e-3, 1.0)
RHOS_INIT = -2.0
PATCH_SIZE = 4
DRAWS = 5  # of the noise, over which the accuracy is averaged


class Images(NamedTuple):
    """Images (N, 1, 8, 8) in [0, 1] and their classes."""

    train: Tensor
    train_classes: Tensor
    held_out: Tensor
    held_out_classes: Tensor


class Result(NamedTuple):
    """A trained transform on held-out images."""

    name: str
    accuracy: float
    mean_sigma: float  # of the features that are kept
    masked: float  # fraction of the features that are suppressed
    transformed: Tensor


def load_images(seed: int) -> Images:
    """Load scikit-learn's digits, shuffled and split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    classes = torch.tensor(digits.target)[order]
    return Images(images[HELD_OUT:], classes[HELD_OUT:], images[:HELD_OUT], classes[:HELD_OUT])


def train_base_model(images: Images) -> nn.Module:
    """Train a network of two convolutions."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=BASE_LEARNING_RATE)
    loss_function = nn.CrossEntropyLoss()
    for _ in range(BASE_EPOCHS):
        for batch in _batches(images):
            loss = loss_function(model(_augment(images.train[batch])), images.train_classes[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval()


def _augment(batch: Tensor) -> Tensor:
    """Erase up to 80 % of the pixels of every second image, so that the network learns to rely on no single one."""
    erased = torch.rand(batch.shape) < 0.8 * torch.rand(len(batch), 1, 1, 1)
    erased[::2] = False
    return torch.where(erased, 0, batch)


def _batches(images: Images) -> Sequence[Tensor]:
    """Yield batches of all training indices in random order."""
    return torch.split(torch.randperm(len(images.train)), BATCH_SIZE)


def train_transform(noisy_model: NoisyModel, images: Images, alpha: float | None, epochs: int) -> None:
    """Train the noise layer against the frozen network's own loss."""
    loss_function = noisy_model.noise_loss_wrapper(nn.CrossEntropyLoss(), alpha=alpha)
    optimizer = torch.optim.AdamW(parameter_groups(noisy_model, weight_decay=1e-4), lr=LEARNING_RATE)
    steps = epochs * -(-len(images.train) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noisy_model.train()
    for _ in range(epochs):
        for batch in _batches(images):
            output = noisy_model(images.train[batch])
            loss = loss_function(output, images.train_classes[batch])["composite_loss"]
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    noisy_model.eval()


@torch.no_grad()
def accuracy(logits: Tensor, classes: Tensor) -> float:
    """Return the fraction of images whose likeliest class is the true one."""
    return (logits.argmax(-1) == classes).float().mean().item()


@torch.no_grad()
def measure(name: str, noisy_model: NoisyModel, images: Images) -> Result:
    """Run the held-out images through the transform."""
    outputs = [noisy_model(images.held_out) for _ in range(DRAWS)]
    correct = sum(accuracy(output.base_model_output, images.held_out_classes) for output in outputs)
    output = outputs[0]
    assert output.std is not None
    assert output.mask is not None
    assert output.transformed is not None
    mean_sigma, masked = output.std[~output.mask].mean().item(), output.mask.float().mean().item()
    return Result(name, correct / DRAWS, mean_sigma, masked, output.transformed)


def draw(path: Path, images: Images, results: Sequence[Result], columns: int = 10) -> None:
    """Write a PNG: a row of held-out images, and a row of each transform's outputs for them."""
    pyplot = load_pyplot()
    rows = [("original", images.held_out), *((result.name, result.transformed) for result in results)]
    # The height is rounded: some versions of matplotlib cut off a fraction of a pixel, and 1.15 · 3 is just below 3.45.
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(columns, round(1.15 * len(rows), 2)), squeeze=False)
    for (name, pictures), row in zip(rows, axes, strict=True):
        for axis, picture in zip(row, pictures, strict=False):
            axis.imshow(picture[0].numpy(), cmap="gray_r")
            axis.set(xticks=[], yticks=[])
        row[0].set_title(name, loc="left", fontsize=9)
    figure.tight_layout()
    save_png(figure, path, dpi=120)


def run(
    out: Path,
    *,
    percent_to_mask: float,
    alpha: float | None,
    epochs: int,
    patch_size: int = PATCH_SIZE,
    seed: int = 0,
) -> tuple[float, list[Result]]:
    """Train and measure everything, and write the picture. Return the clean accuracy and a result per transform.

    Raises:
        ValueError: an option out of range, before anything is trained.
        OSError: ``out`` lies in no folder or is no regular file; also before anything is trained.
    """
    settings: dict[str, Any] = {"scale": SCALE, "percent_to_mask": percent_to_mask, "rhos_init": RHOS_INIT}
    layers: list[tuple[type[BaseNoiseLayer], dict[str, Any]]] = [
        (CloakNoiseLayerOneShot, settings),
        (PatchCloakNoiseLayer, settings | {"patch_size": patch_size}),
    ]
    for layer_class, arguments in layers:
        layer_class(**arguments)
    check_count("epochs", epochs)
    if alpha is not None:
        check_interpolation(alpha)
    check_output_file(out)
    torch.manual_seed(seed)
    images = load_images(seed)
    base_model = train_base_model(images)
    with torch.no_grad():
        clean_accuracy = accuracy(base_model(images.held_out), images.held_out_classes)
    results = []
    for layer_class, arguments in layers:
        noisy_model = NoisyModel(layer_class, base_model, **arguments)
        train_transform(noisy_model, images, alpha, epochs)
        results.append(measure(layer_class.__name__, noisy_model, images))
    draw(out, images, results)
    return clean_accuracy, results


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(prog="python -m sgfast.examples.vision", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("vision.png"), help="the picture to write (%(default)s)")
    parser.add_argument("--percent-to-mask", type=float, default=0.6, help="features to suppress (%(default)s)")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of the transform's loss (%(default)s)")
    parser.add_argument("--adaptive", action="store_true", help="let alpha adapt itself, in place of --alpha")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="to train each transform (%(default)s)")
    parser.add_argument("--patch-size", type=int, default=PATCH_SIZE, help="of PatchCloakNoiseLayer (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # batches are too small to share
    try:
        clean_accuracy, results = run(
            options.out,
            percent_to_mask=options.percent_to_mask,
            alpha=None if options.adaptive else options.alpha,
            epochs=options.epochs,
            patch_size=options.patch_size,
            seed=options.seed,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: install sgfast[vision]")
    print(f"{'transform':<24} {'accuracy before':>15} {'after':>7} {'mean sigma':>11} {'masked':>7}")
    for result in results:
        print(
            f"{result.name:<24} {clean_accuracy:>15.1%} {result.accuracy:>7.1%} {result.mean_sigma:>11.3f} "
            f"{result.masked:>7.1%}"
        )
    print(f"originals beside transformed images: {options.out}")


if __name__ == "__main__":
    main()
