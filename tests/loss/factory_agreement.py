"""Compare the values and gradients of every loss factory with an independent float64 rewrite.

    python -m tests.loss.factory_agreement [--out benchmarks/results/factories-cpu.md]

A tiny Llama in float32 runs one training step: forward, loss, backward. The rewrite (``tests.loss.rewrites``) runs a
float64 copy of the model by hand, on the same noise, and writes every formula out row by row.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from sgfast.utils.files import check_output_file, replacing
from tests.loss.factory_cases import CASES, COMBINE, MASK, four_rows, rewritten
from tests.loss.rewrites import Rewrite, learning_parameters, relative_error
from tests.tiny_models import tiny_pair, uneven_tokens

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "factories-cpu.md"
HEADING = """# Loss factories beside float64 rewrites

`python -m tests.loss.factory_agreement`: one training step of a tiny Llama (4 layers of width 16) in float32 on four
padded rows of text, every component weighted, beside an independent rewrite in float64 that runs the model by hand.
`loss` and `component` are relative differences of values, the latter that of the worst component (a cosine counts by
its absolute difference: it may cross 0), `gradients` is ‖g - g64‖ / ‖g64‖ over all parameters that learn.

| factory | settings | loss | component | worst component | gradients |
|---|---|---|---|---|---|
"""
SUPPRESSED = {"percent_to_mask": 0.25}
# Changes of the model's arguments and of the factory's arguments.
SETTINGS = {
    "": ({}, {}),
    "a quarter of the features suppressed": (SUPPRESSED, {}),
    "at the logits": ({}, {"distillation_layer_index": None}),
    "noise masks not combined": ({}, {COMBINE: False}),
    "protection over all attended tokens": ({}, {MASK: False}),
}


class Row(NamedTuple):
    """The differences between one factory and its rewrite."""

    loss: float
    component: float
    worst: str
    gradients: float


def applies(name: str, changed: dict[str, object]) -> bool:
    """Return whether a factory has the changed arguments."""
    extra = {COMBINE: "mutual" in name, MASK: name == "jigsaw"}
    return all(extra.get(argument, argument in CASES[name][1]) for argument in changed)


def compare(name: str, model_arguments: dict[str, float], changed: dict[str, object]) -> Row:
    """Compare one training step with its rewrite."""
    teacher, student = tiny_pair(**model_arguments)
    models = (teacher, student) if name == "jigsaw" else (teacher,)
    batch = four_rows(uneven_tokens())
    factory, arguments = CASES[name]
    arguments = arguments | changed
    loss_function, get_losses, _ = factory(*models, **arguments)
    for model in models:
        model.train()(**batch)
    loss = loss_function(batch["loss_mask"])
    loss.backward()
    student = student if name == "jigsaw" else None
    gradients = {parameter: p.grad for parameter, p in learning_parameters(teacher, student)}
    rewrite = Rewrite(teacher, batch, arguments.get("distillation_layer_index"), student)
    components, total = rewritten(rewrite, arguments)
    losses = get_losses()
    errors = {
        component: abs(losses[component].item() - value.item()) / (1 if "similarity" in component else value.item())
        for component, value in components.items()
    }
    worst = max(errors, key=errors.get)
    return Row(
        abs(loss.item() / total.item() - 1),
        errors[worst],
        worst,
        relative_error(gradients, rewrite.gradients(total)),
    )


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description="Every loss factory beside a float64 rewrite")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    check_output_file(arguments.out)
    text = HEADING
    for name in CASES:
        for setting, (model_arguments, changed) in SETTINGS.items():
            if applies(name, changed):
                row = compare(name, model_arguments, changed)
                cells = [name, setting, f"{row.loss:.1e}", f"{row.component:.1e}", row.worst, f"{row.gradients:.1e}"]
                text += f"| {' | '.join(cells)} |\n"
    text += f"\nCPU, torch {torch.__version__}.\n"
    print(text)
    with replacing(arguments.out) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
