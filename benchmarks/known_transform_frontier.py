"""Utility against the attacker who knows the transform: transforms over SmolLM2-135M-Instruct by several objectives.

Each objective trains one transform in stages of rising strength. After each stage, held-out passages of Python's
documentation give the utility as ``sgfast demo`` measures it, and `known_transform_attack` reads at least 200 of their
transformed tokens, once with the model itself as the prior and once with a uniform prior. The results are
``benchmarks/results/known_transform_frontier.json`` and ``docs/benchmarks/known_transform_frontier.png``.

    python -m benchmarks.known_transform_frontier [--objective NAME] [--seed 0] [--report]

A run over all objectives takes about an hour on one idle core. ``--objective`` runs one and keeps the others' points.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgfast.demo.held_out import as_chats, measure
from sgfast.demo.text import read_text, split_passages
from sgfast.huggingface.assets import PACKAGED_MODEL, load_causal_lm
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.metrics.known_transform import known_transform_attack
from sgfast.model.decoder import embedding_table_of
from sgfast.ops.nearest import nearest_embeddings
from sgfast.training.building import Models, build_loss, models_over
from sgfast.training.configuration import Configuration
from sgfast.training.data import TokenizedRecords
from sgfast.training.run_record import versions
from sgfast.training.trainer_run import train
from sgfast.utils.figures import load_pyplot, save_png
from sgfast.utils.files import check_output_file, replacing
from sgfast.utils.records import TextRecords

RESULTS = Path(__file__).parent / "results" / "known_transform_frontier.json"
PLOT = Path(__file__).parents[1] / "docs" / "benchmarks" / "known_transform_frontier.png"
WORDS_PER_PASSAGE, HELD_OUT = 60, 32
BATCH_SIZE, MAX_LENGTH, WARMUP_STEPS = 4, 96, 10
MEASURED, MEASURED_LENGTH = 16, 128
ATTACKED_TOKENS, CANDIDATES = 200, 256
DRAW = 3  # the seed of the noise that is attacked
SEED_OF_REFERENCES = 0
SUBSTITUTED = (0.1, 0.3, 0.5)


class Stage(NamedTuple):
    """Steps by one loss of ``sgfast train``."""

    steps: int
    loss: str
    options: dict[str, Any]


class Objective(NamedTuple):
    """One transform, trained in stages."""

    noise_layer: dict[str, Any]
    stages: Sequence[Stage]


_LAYER = {"distillation_layer_index": 5, "alpha": 0.5}
_NOISE_LAYER = {"scale": (1e-3, 2.0), "rhos_init": -2.0}


def _distillation(steps: int, std: float, similarity: float, attack: float) -> Stage:
    weights = {
        "std_log_ratio_loss_weight": std,
        "input_embedding_similarity_loss_weight": similarity,
        "distillation_layer_cosine_distance_loss_weight": 10.0,
        "known_transform_attack_loss_weight": attack,
    }
    return Stage(steps, "distillation", _LAYER | weights)


def _mutual_information(steps: int, weight: float) -> Stage:
    weights = {"distillation_layer_l2_distance_loss_weight": 1.0, "mutual_information_loss_weight": weight}
    return Stage(steps, "mutual_information_distillation", _LAYER | weights)


OBJECTIVES = {
    "distillation": Objective(
        {"scale": (1e-3, 1.0), "rhos_init": -2.0}, [_distillation(80, 0.2, 0.5, 0.0), _distillation(80, 2.0, 2.0, 0.0)]
    ),
    "mutual information": Objective(_NOISE_LAYER, [_mutual_information(50, 0.1), _mutual_information(30, 0.7)]),
    "mutual information, one stage": Objective(_NOISE_LAYER, [_mutual_information(50, 3.0)]),
    "known transform": Objective(_NOISE_LAYER, [_distillation(120, 0.0, 0.0, 0.02), _distillation(60, 0.0, 0.0, 0.1)]),
    "known transform, one stage": Objective(_NOISE_LAYER, [_distillation(120, 0.0, 0.0, 0.1)]),
}


def run_stages(name: str, seed: int, keep: Path | None) -> list[dict[str, Any]]:
    """Train one transform in stages. Return a point after each stage."""
    objective = OBJECTIVES[name]
    passages = split_passages(read_text(None), WORDS_PER_PASSAGE, HELD_OUT, seed)
    base_model, tokenizer = load_causal_lm(None)
    torch.manual_seed(seed)
    models = models_over(base_model, TokenizerWrapper(tokenizer, type(base_model)), objective.noise_layer)
    points, taken = [], 0
    for number, stage in enumerate(objective.stages):
        _train(models, stage, passages.train, seed + number)
        taken += stage.steps
        if keep is not None:
            models.client.save_pretrained(keep / f"{name.replace(' ', '_')}-{number}-{seed}.safetensors")
        point = {"objective": name, "stage": number, "seed": seed, "steps": taken}
        point |= {"loss": stage.loss, "options": stage.options, "noise_layer": objective.noise_layer}
        points.append(point | measured(models, base_model, passages.held_out, seed))
        print(json.dumps(points[-1]), flush=True)
    return points


def _train(models: Models, stage: Stage, passages: Sequence[str], seed: int) -> None:
    models.noisy_model.train()
    loss_functions = build_loss(models, stage.loss, stage.options)
    with tempfile.TemporaryDirectory() as folder:
        records = TextRecords(passages, "the passages")
        configuration = Configuration(
            data=records.path,
            out=Path(folder),
            steps=stage.steps,
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            warmup_steps=WARMUP_STEPS,
            seed=seed,
        )
        examples = TokenizedRecords(records, models.tokenizer_wrapper, max_length=MAX_LENGTH)
        train(configuration, models, loss_functions, examples, resume=False, keep_checkpoints=False)
    models.noisy_model.eval()


def measured(models: Models, base_model: Any, passages: Sequence[str], seed: int) -> dict[str, Any]:
    """Return the utility on held-out passages, and the attack's failures on the first of them."""
    utility = measure(
        models.noisy_model,
        models.tokenizer_wrapper,
        passages[:MEASURED],
        batch_size=2 * BATCH_SIZE,
        max_length=MEASURED_LENGTH,
        seed=seed,
    )
    inputs = models.tokenizer_wrapper(as_chats(passages), truncation=True, max_length=MEASURED_LENGTH)
    selected = inputs["noise_mask"].bool() & inputs["attention_mask"].bool()
    rows = int((selected.sum(1).cumsum(0) < ATTACKED_TOKENS).sum()) + 1
    inputs, selected = {name: value[:rows] for name, value in inputs.items()}, selected[:rows]
    layer, table = models.noisy_model.noise_layer, models.client.embedding_table()
    with torch.no_grad():
        transformed = layer(
            table[inputs["input_ids"]], inputs["noise_mask"], attention_mask=inputs["attention_mask"], seed=DRAW
        )
    layer.clear()
    attacks = {}
    for prior, language_model in (("model", base_model), ("uniform", None)):
        result = known_transform_attack(
            transformed,
            layer,
            table,
            inputs["noise_mask"],
            attention_mask=inputs["attention_mask"],
            input_ids=inputs["input_ids"],
            candidates=CANDIDATES,
            language_model=language_model,
        )
        attacks[prior] = {
            "failure_rate": float(result.failure_rate),
            "top_10_failure_rate": float(result.top_10_failure_rate),
            "not_among_candidates": float((result.ranks[selected] == len(table)).float().mean()),
        }
    return {"utility": utility, "attacked_tokens": int(selected.sum()), "attack": attacks}


@torch.no_grad()
def references(seed: int) -> dict[str, float]:
    """Return figures without a transform, over the held-out passages that measure utility.

    ``failure_rate_of_the_prior_alone``: the model guesses each token from the true tokens before it.
    ``agreement_of_mean_embedding``: next-token agreement if the mean embedding replaces every transformed token.
    ``agreement_of_substitution_F``: the same if one of the 8 nearest tokens replaces a random fraction F of the tokens.
    """
    passages = split_passages(read_text(None), WORDS_PER_PASSAGE, HELD_OUT, seed).held_out[:MEASURED]
    base_model, tokenizer = load_causal_lm(None)
    wrapper, table = TokenizerWrapper(tokenizer, type(base_model)), embedding_table_of(base_model)
    generator = torch.Generator().manual_seed(seed)
    counts: dict[str, int] = {}
    for passage in passages:
        inputs = wrapper(as_chats([passage]), truncation=True, max_length=MEASURED_LENGTH)
        tokens, selected = inputs["input_ids"], inputs["noise_mask"].bool()
        clean = base_model(input_ids=tokens).logits.argmax(-1)
        replaced = {"mean_embedding": torch.where(selected[..., None], table.mean(0), table[tokens])}
        _, nearest = nearest_embeddings(table[tokens], table, 9)
        pick = torch.randint(1, 9, tokens.shape, generator=generator)
        other = nearest.gather(-1, pick[..., None])[..., 0]
        draw = torch.rand(tokens.shape, generator=generator)
        for fraction in SUBSTITUTED:
            replaced[f"substitution_{fraction}"] = table[torch.where(selected & (draw < fraction), other, tokens)]
        found = {
            "guessed": (clean[:, :-1] != tokens[:, 1:])[selected[:, 1:]],
            "tokens": torch.ones_like(tokens[selected]),
        }
        for name, embeddings in replaced.items():
            found[name] = (base_model(inputs_embeds=embeddings).logits.argmax(-1) == clean)[selected]
        for name, events in found.items():
            counts[name] = counts.get(name, 0) + int(events.sum())
    tokens_in_all, failed = counts.pop("tokens"), counts.pop("guessed")
    rates = {f"agreement_of_{name}": count / tokens_in_all for name, count in counts.items()}
    return {"failure_rate_of_the_prior_alone": failed / tokens_in_all, **rates}


def best_points(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of which no other has both a higher agreement and a higher failure rate, by agreement."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=coordinates, reverse=True):
        if not best or coordinates(point)[1] > coordinates(best[-1])[1]:
            best.append(point)
    return best


def coordinates(point: dict[str, Any]) -> tuple[float, float]:
    """Return next-token agreement, and the failure rate of the attack with the model as prior."""
    return point["utility"]["next_token_agreement"], point["attack"]["model"]["failure_rate"]


def plot(path: Path, points: Sequence[dict[str, Any]], ends: dict[str, float]) -> None:
    """Plot agreement against the attack's failure rate, a marker for each objective, and the best frontier."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 5))
    for (objective, marker), color in zip(
        zip(OBJECTIVES, "osD^vP*X", strict=False), pyplot.cm.tab10.colors, strict=False
    ):
        own = [coordinates(point) for point in points if point["objective"] == objective]
        if own:
            axes.scatter(*zip(*own, strict=True), marker=marker, s=55, color=color, label=objective)
    axes.plot(
        *zip(*map(coordinates, best_points(points)), strict=True), color="0.5", linewidth=1, zorder=0, label="best"
    )
    axes.set(
        xlabel="next token unchanged", ylabel="attacker with the model as prior fails", xlim=(0, 1), ylim=(-0.03, 1)
    )
    axes.axhline(ends["failure_rate_of_the_prior_alone"], color="0.7", linestyle=":", label="prior alone, no embedding")
    axes.axvline(ends["agreement_of_mean_embedding"], color="0.7", linestyle="--", label="mean embedding, no token")
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save_png(figure, path, dpi=120)


def _strength(point: dict[str, Any]) -> float:
    """Return the weight of the term that changes between the points of an objective."""
    names = ("known_transform_attack_loss_weight", "mutual_information_loss_weight", "std_log_ratio_loss_weight")
    return next(point["options"][name] for name in names if point["options"].get(name))


def table(points: Sequence[dict[str, Any]]) -> str:
    """Return the points as a table in Markdown, by agreement."""
    lines = [
        "| objective | weight | steps | seed | next token unchanged | perplexity | mean sigma "
        "| nearest neighbour fails | attack fails, model as prior | attack fails, uniform prior "
        "| true token no candidate |",
        "|---|" + 10 * "---:|",
    ]
    for point in sorted(points, key=coordinates, reverse=True):
        utility, attack = point["utility"], point["attack"]
        lines.append(
            f"| {point['objective']} | {_strength(point)} | {point['steps']} | {point['seed']} "
            f"| {utility['next_token_agreement']:.1%} "
            f"| {utility['noisy_perplexity']:.0f} | {utility['mean_sigma']:.2f} "
            f"| {utility['nearest_neighbor_failure_rate']:.1%} | {attack['model']['failure_rate']:.1%} "
            f"| {attack['uniform']['failure_rate']:.1%} | {attack['model']['not_among_candidates']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, action="append", help="only these; the others' points stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="print the table and draw the plot of the points so far")
    parser.add_argument("--keep", type=Path, help="a folder for the trained transforms")
    arguments = parser.parse_args()
    for file in (RESULTS, PLOT):
        check_output_file(file)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"points": []}
    points = content["points"]
    for objective in [] if arguments.report else arguments.objective or OBJECTIVES:
        points = [p for p in points if (p["objective"], p["seed"]) != (objective, arguments.seed)]
        points += run_stages(objective, arguments.seed, arguments.keep)
        content |= {"model": PACKAGED_MODEL, "candidates": CANDIDATES, "versions": versions(), "points": points}
        content.setdefault("references", references(SEED_OF_REFERENCES))
        with replacing(RESULTS) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
    plot(PLOT, points, content["references"])
    print(table(points))


if __name__ == "__main__":
    main()
