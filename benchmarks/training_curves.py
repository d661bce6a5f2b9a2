"""The effect of each loss: sigma with a higher strength weight, divergence with a lower alpha.

The program trains transforms over SmolLM2-135M-Instruct by each loss, all from one start on one sequence of batches:
with the weights of ``sgfast train``, with a higher strength weight and, if the loss has an alpha, with a lower alpha.
The results are ``benchmarks/results/training-curves.json`` and ``.png``.

    python -m benchmarks.training_curves [--steps 300] [--out benchmarks/results]

The batches are small and the base model is in bfloat16, so the run takes about ten minutes on one idle core. The curves
show directions, not good transforms.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.demo.text import read_text, split_passages
from sgfast.huggingface.assets import PACKAGED_MODEL, load_causal_lm
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.metrics.utility import mean_over_sequences, token_divergences
from sgfast.training.building import Models, build_loss, models_over
from sgfast.training.configuration import LoraOptions
from sgfast.training.history_plot import smoothed
from sgfast.training.objectives import DEFAULT_OPTIONS
from sgfast.training.run_record import versions
from sgfast.utils.files import check_output_file, replacing

DIVERGENCE = "next_token_utility/jensen_shannon"
LEARNING_RATE, WARM_UP_STEPS, SEED = 5e-4, 10, 0
HELD_OUT, WORDS_PER_PASSAGE = 8, 40


class Setup(NamedTuple):
    """The training of a loss, and the options that are changed."""

    steps: int
    batch_size: int
    tokens: int
    common: dict[str, Any]  # changes to the weights of `sgfast train`
    utility: str  # the component that measures utility
    stronger: dict[str, float]
    truer: dict[str, float]


_SHALLOW = {"distillation_layer_index": 2}
# A loss that reads logits runs all 30 layers. Its batches are smaller and fewer.
SETUPS = {
    "distillation": Setup(
        300, 4, 12, _SHALLOW, "distillation_layer_cosine_distance", {"std_log_ratio_loss_weight": 1.0}, {"alpha": 0.1}
    ),
    "mutual_information_distillation": Setup(
        300, 4, 12, _SHALLOW, "distillation_layer_l2_distance", {"mutual_information_loss_weight": 0.5}, {"alpha": 0.1}
    ),
    "jigsaw": Setup(
        300, 4, 12, _SHALLOW, "distillation_layer_cosine_distance", {"std_log_ratio_loss_weight": 1.0}, {"alpha": 0.1}
    ),
    "cross_entropy_distillation": Setup(
        200, 2, 10, {}, "distillation_cross_entropy", {"absolute_cosine_similarity_penalty_weight": 10.0}, {}
    ),
    "mutual_information_cross_entropy_distillation": Setup(
        200, 2, 10, {}, "distillation_cross_entropy", {"mutual_information_loss_weight": 1.0}, {}
    ),
}


def run_one(base_model: Any, wrapper: TokenizerWrapper, name: str, changed: dict[str, float], steps: int) -> Any:
    """Train one transform. Return its curves and its effect on held-out text."""
    setup = SETUPS[name]
    torch.manual_seed(SEED)
    models = models_over(base_model, wrapper, {}, LoraOptions() if name == "jigsaw" else None)
    options = DEFAULT_OPTIONS[name] | setup.common | changed
    loss_function, get_losses, _ = build_loss(models, name, options)
    trained = list(_trained_models(models))
    parameters = {id(p): p for model in trained for p in model.parameters() if p.requires_grad}.values()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
    curves: dict[str, list[float]] = {"mean_sigma": []}
    passages = split_passages(read_text(None), WORDS_PER_PASSAGE, HELD_OUT, SEED)
    started = time.perf_counter()
    for inputs in _batches(wrapper, passages.train, setup.batch_size, setup.tokens, steps):
        for model in trained:
            model.train()(**inputs)
        sigma = models.noisy_model.noise_layer.std.detach()[inputs["noise_mask"]].mean()
        loss = loss_function(inputs["loss_mask"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for component, value in {**get_losses(), "mean_sigma": sigma}.items():
            curves.setdefault(component, []).append(float(value))
    seconds = time.perf_counter() - started
    held_out = measure(models, next(_batches(wrapper, passages.held_out, HELD_OUT, setup.tokens, 1)))
    if models.student is not None:
        models.student.base_model.unload()  # removes the adapters from the base, from which the next run starts
    return {"options": options, "held_out": held_out, "seconds": round(seconds, 1), "curves": curves}


def _trained_models(models: Models) -> Iterator[Any]:
    if models.student is not None:
        yield models.student
    yield models.noisy_model


def _batches(
    wrapper: TokenizerWrapper, passages: Sequence[str], batch_size: int, tokens: int, steps: int
) -> Iterator[dict[str, Tensor]]:
    for step in range(steps):
        chosen = [passages[(step * batch_size + row) % len(passages)] for row in range(batch_size)]
        yield wrapper.encode_text(chosen, truncation=True, max_length=tokens)


@torch.no_grad()
def measure(models: Models, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Return mean sigma, and the divergence between noisy and clean next-token distributions in nats."""
    torch.manual_seed(SEED)
    outputs = [model.eval()(**inputs).base_model_output for model in _trained_models(models)]
    attended = inputs["attention_mask"] != 0
    # Noisy logits of the student or of the only model, clean logits of the teacher or of the same model.
    divergence = token_divergences(outputs[0].noisy_logits, outputs[-1].clean_logits, attended, None)[DIVERGENCE]
    sigma = models.noisy_model.noise_layer.std[inputs["noise_mask"]].mean()
    return {"mean_sigma": float(sigma), DIVERGENCE: float(mean_over_sequences(divergence, attended))}


def plot(path: Path, results: dict[str, Any]) -> None:
    """Plot a row for each loss: sigma at two strengths, the utility component at two alphas or two strengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(results), 2, figsize=(11, 2.6 * len(results)), squeeze=False)
    for (name, runs), (left, right) in zip(results.items(), grid, strict=True):
        setup = SETUPS[name]
        for axes, other, changed, curve, measured, color in (
            (left, "stronger", setup.stronger, "mean_sigma", "mean_sigma", "tab:orange"),
            (right, *_second_claim(setup), setup.utility, DIVERGENCE, "tab:blue"),
        ):
            (option, value), defaults = next(iter(changed.items())), runs["base"]["options"]
            for key, setting, shade in (("base", defaults[option], "0.6"), (other, value, color)):
                values = runs[key]["curves"][curve]
                label = f"{option.removesuffix('_loss_weight').replace('_', ' ')} = {setting:g}"
                held_out = f"{runs[key]['held_out'][measured]:.3g}"
                unit = "sigma" if axes is left else "JS"
                axes.plot(range(1, len(values) + 1), values, color=shade, alpha=0.25, linewidth=0.7)
                axes.plot(
                    range(1, len(values) + 1),
                    smoothed(values),
                    color=shade,
                    label=f"{label}; held out: {unit} {held_out}",
                )
            axes.set_title(f"{name.replace('_', ' ')}: {curve.replace('_', ' ')}", fontsize=9)
            bottom, top = axes.get_ylim()
            axes.set_ylim(bottom, top + 0.3 * (top - bottom))
            axes.legend(fontsize=7, frameon=False, loc="upper left")
            axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, format="png", dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="of every loss, in place of its own number")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--loss", choices=SETUPS, action="append", help="only these losses; the others' curves stay")
    arguments = parser.parse_args()
    path = arguments.out / "training-curves.json"
    for file in (path, path.with_suffix(".png")):
        check_output_file(file)
    base_model, tokenizer = load_causal_lm(None, torch.bfloat16)
    wrapper = TokenizerWrapper(tokenizer, type(base_model))
    results: dict[str, Any] = json.loads(path.read_text())["losses"] if arguments.loss and path.exists() else {}
    for name in arguments.loss or SETUPS:
        setup = SETUPS[name]
        steps = arguments.steps or setup.steps
        results[name] = {"steps": steps, "batch_size": setup.batch_size, "tokens": setup.tokens}
        for label, changed in {"base": {}, "stronger": setup.stronger, **dict([_second_claim(setup)])}.items():
            run = results[name][label] = run_one(base_model, wrapper, name, changed, steps)
            print(name, label, changed, run["held_out"], f"{run['seconds']} s", flush=True)
        about = {"model": PACKAGED_MODEL, "learning_rate": LEARNING_RATE, "versions": versions()}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({**about, "losses": rounded(results)}) + "\n")
        with replacing(arguments.out / "training-curves.png") as temporary:
            plot(temporary, results)


def _second_claim(setup: Setup) -> tuple[str, dict[str, float]]:
    """Return the name of the run whose divergence is compared with the base."""
    return ("truer", setup.truer) if setup.truer else ("stronger", setup.stronger)


def rounded(value: Any) -> Any:
    """Round every float to five digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
