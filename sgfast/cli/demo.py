"""``sgfast demo``: train, measure, save and use a transform, with a report of every step."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sgfast._version import __version__
from sgfast.cli.progress import OnStep, show_training, working
from sgfast.demo.held_out import TOP_K, known_transform_failure_rate, known_transform_reading, measure
from sgfast.demo.summary_plot import plot_summary
from sgfast.demo.text import read_text, split_passages
from sgfast.huggingface.assets import PACKAGED_MODEL, check_model_exists, load_causal_lm, model_sizes
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.loss.distillation import distillation_loss_factory
from sgfast.loss.factory import LossFunctions
from sgfast.metrics.per_sequence import UTILITY_DIVERGENCES
from sgfast.model.decoder import check_layer_index
from sgfast.training.building import Models, models_over
from sgfast.training.configuration import Configuration
from sgfast.training.data import TokenizedRecords
from sgfast.training.run_record import components_in
from sgfast.training.trainer_run import History, train
from sgfast.utils.devices import find_device
from sgfast.utils.files import check_output_file, replacing
from sgfast.utils.one_writer import one_writer
from sgfast.utils.records import TextRecords

DEFAULT_PROMPT = "I am Ada Lovelace. Explain in one sentence what a Python function is."
WORDS_PER_PASSAGE, HELD_OUT, MAX_LENGTH, BATCH_SIZE = 60, 32, 128, 8
LEARNING_RATE = 1e-3  # from 2e-3 on, sigma outruns the distillation in the first 30 steps
NOISE_LAYER = {"scale": (1e-3, 1.0), "rhos_init": -2.0}
LOSS_WEIGHTS = {
    "std_log_ratio_loss_weight": 0.2,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 10.0,
}
METRICS_FILE, RECORD_FILE, PLOT_FILE, TRANSFORM_FILE = _WRITTEN = (
    "metrics.json",
    "training.json",
    "training.png",
    "transform.safetensors",
)

_ATTACKS = ("known_transform_failure_rate", "nearest_neighbor_failure_rate", "nearest_neighbor_failure_rate_cosine")
# The reason for the first line of the table.
_MEANING = (
    "The owner of the model made the transform, so a server may know its mean shift and its noise for every candidate "
    "token. Only the noise hides a token from such a server: a mean shift makes the nearest neighbour fail and hides "
    "nothing."
)
_TABLE_ROWS = {
    "attacker who knows the transform fails": ("known_transform_failure_rate", "{:.1%}"),
    "next-token agreement": ("next_token_agreement", "{:.1%}"),
    "perplexity, clean model": ("clean_perplexity", "{:.2f}"),
    "perplexity, through the transform": ("noisy_perplexity", "{:.2f}"),
    "mean sigma": ("mean_sigma", "{:.4f}"),
    "nearest-neighbour failure, L2": ("nearest_neighbor_failure_rate", "{:.1%}"),
    "nearest-neighbour failure, cosine": ("nearest_neighbor_failure_rate_cosine", "{:.1%}"),
    "changed ids of its reconstruction": ("percentage_changed_ids", "{:.1%}"),
}


def run_demo(
    *,
    steps: int,
    out: Path,
    model: str | None,
    seed: int,
    data: Path | None,
    layer: int,
    alpha: float,
    prompt: str,
    device: str = "auto",
) -> None:
    """Run the demo. Wrong input raises ValueError before any file is written. Ctrl-C saves the transform so far."""
    on = find_device(device)
    check_model_exists(model)
    layers = model_sizes(model).layers
    if layers is not None:
        check_layer_index(layer, layers)
    with one_writer(out):
        for name in _WRITTEN:
            check_output_file(out / name)
        _run(steps, out, model, seed, data, layer, alpha, prompt, on)


def _run(
    steps: int,
    out: Path,
    model: str | None,
    seed: int,
    data: Path | None,
    layer: int,
    alpha: float,
    prompt: str,
    device: torch.device,
) -> None:
    console = Console()
    passages = split_passages(read_text(data), WORDS_PER_PASSAGE, HELD_OUT, seed)
    console.print(
        f"text: {data or 'Python documentation'}, {len(passages.train)} passages, {len(passages.held_out)} more"
    )
    name = model or PACKAGED_MODEL
    console.print(f"loading {name}")
    base_model, tokenizer = load_causal_lm(model)
    base_model.to(device)
    torch.manual_seed(seed)
    models = models_over(base_model, TokenizerWrapper(tokenizer, type(base_model)), NOISE_LAYER)
    models.noisy_model.to(device)
    noisy_model, client = models.noisy_model, models.client
    loss_functions = distillation_loss_factory(noisy_model, layer, alpha, **LOSS_WEIGHTS)
    positions = getattr(base_model.config, "max_position_embeddings", None) or MAX_LENGTH
    measuring = {"batch_size": BATCH_SIZE, "max_length": min(MAX_LENGTH, positions), "seed": seed}
    with working(console, "measuring the untrained transform on held-out text"):
        before = _measure(models, passages.held_out, measuring)
    reading_before = _attacker_reads(models, prompt, client([{"role": "user", "content": prompt}], seed=seed))

    length = measuring["max_length"]
    history, finished = _train(console, models, loss_functions, passages.train, steps, length, seed, device)
    noisy_model.eval()
    transform_path = out / TRANSFORM_FILE
    client.save_pretrained(transform_path)
    if not finished:
        console.print(f"interrupted after {len(history)} of {steps} steps; what was trained is in {transform_path}")
        raise SystemExit(130)

    with working(console, "measuring the trained transform on held-out text"):
        after = _measure(models, passages.held_out, measuring)
    hyperparameters = loss_functions[2]()
    run = {"model": name, "steps": steps, "sgfast": __version__, "torch": torch.__version__}
    _write_json(out / RECORD_FILE, {**run, "hyperparameters": hyperparameters, "components": _components(history)})
    _write_json(out / METRICS_FILE, {"before": before, "after": after})
    plot_summary(out / PLOT_FILE, history, before, after)
    console.print(_table(before, after))
    console.print(_MEANING, highlight=False)
    with working(console, "using the saved transform in a new process"):
        sent = _transform_elsewhere(transform_path, prompt, seed)
    embeddings, attention_mask = (tensor.to(device) for tensor in sent)
    conversation = _conversation(models, prompt, reading_before, embeddings, attention_mask)
    for label, text in conversation.items():
        console.print(f"[bold]{label}[/bold]")
        console.print(Padding(Text(json.dumps(text, ensure_ascii=False)), (0, 0, 0, 4)))
    console.print(f"in {out}: {', '.join(_WRITTEN)}")


def _train(
    console: Console,
    models: Models,
    loss_functions: LossFunctions,
    passages: Sequence[str],
    steps: int,
    max_length: int,
    seed: int,
    device: torch.device,
) -> tuple[History, bool]:
    """Train as ``sgfast train`` does, without checkpoints; return the history, and True if all steps were taken."""
    with tempfile.TemporaryDirectory() as folder:
        records = TextRecords(passages, "the demo's passages")
        configuration = Configuration(
            data=records.path,
            out=Path(folder),
            steps=steps,
            batch_size=BATCH_SIZE,
            max_length=max_length,
            learning_rate=LEARNING_RATE,
            seed=seed % 2**32,  # the trainer takes no larger one
            device=str(device),
        )
        examples = TokenizedRecords(records, models.tokenizer_wrapper, max_length=max_length)

        def training(on_step: OnStep) -> tuple[History, bool]:
            return train(
                configuration, models, loss_functions, examples, resume=False, keep_checkpoints=False, on_step=on_step
            )

        history, finished = show_training(console, steps, _progress_text, training, bar_width=10)
    return history, finished


def _measure(models: Models, passages: Sequence[str], measuring: dict[str, int]) -> dict[str, float]:
    """Measure on held-out text; the failure rate of the strongest attack that ran stands first."""
    figures = measure(models.noisy_model, models.tokenizer_wrapper, passages, **measuring)
    figures["known_transform_failure_rate"] = known_transform_failure_rate(
        models.noisy_model,
        models.tokenizer_wrapper,
        passages,
        max_length=measuring["max_length"],
        seed=measuring["seed"],
    )
    strongest = min(figures[name] for name in _ATTACKS)
    return {"strongest_attack_failure_rate": strongest, **figures}


def _components(history: History) -> list[dict[str, float]]:
    """The loss's components of every step, and their weighted sum as ``total``."""
    names = {name: "total" if name == "loss" else name for name in components_in(history) if name != "mean_sigma"}
    return [{key: step[name] for name, key in names.items()} for step in history]


def _progress_text(values: dict[str, float]) -> str:
    short = {
        "loss": "loss",
        "distillation_layer_cosine_distance": "cos",
        "std_log_ratio": "std",
        "input_embedding_similarity": "sim",
    }
    return " ".join(f"{label} {values[name]:.3f}" for name, label in short.items() if name in values)


def _table(before: dict[str, float], after: dict[str, float]) -> Table:
    table = Table(title="the transform on held-out text", title_justify="left")
    table.add_column("")
    table.add_column("untrained", justify="right")
    table.add_column("trained", justify="right")
    rates = [f"{figures['strongest_attack_failure_rate']:.1%}" for figures in (before, after)]
    table.add_row("strongest attack fails", *rates, style="bold", end_section=True)
    for name in UTILITY_DIVERGENCES:
        label = name.removeprefix("next_token_utility/").removesuffix("_distance").replace("_", " ")
        for suffix, where in (("", "full"), (f"_top_{TOP_K}", f"top {TOP_K}")):
            table.add_row(f"{label}, {where}", f"{before[name + suffix]:.4f}", f"{after[name + suffix]:.4f}")
    for label, (name, form) in _TABLE_ROWS.items():
        table.add_row(label, form.format(before[name]), form.format(after[name]))
    return table


def _attacker_reads(models: Models, prompt: str, embeddings: torch.Tensor) -> str:
    """The text that the strongest attacker reads in the transformed prompt."""
    tokens = models.tokenizer_wrapper([{"role": "user", "content": prompt}], add_generation_prompt=True)
    attention_mask, noise_mask = (tokens[name].to(embeddings.device) for name in ("attention_mask", "noise_mask"))
    tokenizer = models.tokenizer_wrapper.tokenizer
    return known_transform_reading(models.noisy_model, embeddings, attention_mask, noise_mask, tokenizer)


def _transform_elsewhere(transform_path: Path, prompt: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings and mask that another process makes of the prompt. That process has only the saved file."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder) / "prompt.safetensors"
        command = [sys.executable, "-m", "sgfast", "transform", str(transform_path)]
        command += ["--prompt", prompt, "--out", str(sent), "--seed", str(seed)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise ValueError(f"the client process failed: {finished.stderr.strip()}")
        tensors = load_file(sent)
    return tensors["inputs_embeds"], tensors["attention_mask"]


def _conversation(
    models: Models, prompt: str, reading_before: str, embeddings: torch.Tensor, attention_mask: torch.Tensor
) -> dict[str, str]:
    tokenizer, base_model = models.tokenizer_wrapper.tokenizer, models.noisy_model.base_model
    tokens = models.tokenizer_wrapper([{"role": "user", "content": prompt}], add_generation_prompt=True)
    tokens = {name: tensor.to(embeddings.device) for name, tensor in tokens.items()}
    options = {
        "max_new_tokens": 48,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    prompt_length = tokens["input_ids"].shape[1]
    clean = base_model.generate(tokens["input_ids"], attention_mask=tokens["attention_mask"], **options)
    through = base_model.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)
    return {
        "prompt": prompt,
        "an attacker reads, untrained transform": reading_before,
        "an attacker reads, trained transform": _attacker_reads(models, prompt, embeddings),
        "answer, clean": tokenizer.decode(clean[0, prompt_length:], skip_special_tokens=True),
        "answer, from transformed embeddings": tokenizer.decode(through[0], skip_special_tokens=True),
    }


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
