"""Subcommands of ``sgfast`` and their options."""

from pathlib import Path
from typing import Annotated

import typer

from sgfast.cli.bench_options import bench
from sgfast.cli.option_checks import MOST, finite, text
from sgfast.evaluation.settings import Precision
from sgfast.utils.records import TextAs, TextUnit

app = typer.Typer(
    name="sgfast",
    help="Train, measure and use Stained Glass Transforms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench)


@app.callback()
def _options() -> None:
    """Train, measure and use Stained Glass Transforms."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Training steps.")] = 160,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same numbers on one machine.")
    ] = 0,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text for training and measuring; default: Python's documentation.")
    ] = None,
    layer: Annotated[int, typer.Option(min=-MOST, max=MOST, help="Decoder layer whose outputs are distilled.")] = 5,
    alpha: Annotated[
        float, typer.Option(callback=finite, help="0 keeps the model's behaviour; 1 hides the text.")
    ] = 0.5,
    prompt: Annotated[str | None, typer.Option(callback=text, help="Prompt to hide, to attack and to answer.")] = None,
) -> None:
    """Train a transform on a real language model, measure it, save it, and use it as a client would."""
    from sgfast.cli.demo import DEFAULT_PROMPT, run_demo

    run_demo(
        steps=steps,
        out=out,
        model=model,
        seed=seed,
        data=data,
        layer=layer,
        alpha=alpha,
        prompt=DEFAULT_PROMPT if prompt is None else prompt,
    )


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings (docs/training.md).")] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL file (keys text or messages).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    loss: Annotated[str | None, typer.Option(help="Name of the loss, for example distillation or jigsaw.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records of a micro-batch on each device.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches of an optimizer step.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Maximum number of tokens of a record; the rest is cut.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of AdamW after the warm-up.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same numbers on one machine.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting: --set loss.alpha=0.3")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest checkpoint in --out.")] = False,
) -> None:
    """Train a transform for any causal language model. Flags override the YAML file."""
    from sgfast.cli.train import run_train

    flags = {
        "data": data,
        "model": model,
        "out": out,
        "loss.name": loss,
        "steps": steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "precision": precision,
        "seed": seed,
    }
    run_train(config, flags, override or [], resume)


@app.command()
def evaluate(
    transform: Annotated[
        list[Path], typer.Option(help="Transform saved for clients. Several transforms are compared.")
    ],
    data: Annotated[Path, typer.Option(help="Text or JSONL file (keys text or messages).")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("evaluation-output"),
    num_logits: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Restrict divergences to the K largest logits of each side; default: all."),
    ] = None,
    memory_budget: Annotated[
        str, typer.Option(help="Limit of resident bytes beyond the loaded model and one pass through its body.")
    ] = "2GiB",
    attacks: Annotated[
        str | None,
        typer.Option(
            help="all, none, or a comma-separated list of nearest, farthest, transformation, repeated, learned, "
            "information; default: all that can run.",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[
        int, typer.Option(min=1, max=MOST, help="An attack succeeds if the token is among the BETA nearest.")
    ] = 1,
    attack_tokens: Annotated[
        int, typer.Option(min=8, max=MOST, help="Tokens sampled for the attacks repeated, learned and information.")
    ] = 4096,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same numbers on one machine.")
    ] = 0,
    text_unit: Annotated[TextUnit, typer.Option(help="Unit of a record in a text file.")] = "line",
    text_as: Annotated[
        TextAs, typer.Option(help="Take a text as a user's message, or plain, without a chat template.")
    ] = "message",
    max_length: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Maximum number of tokens of a record; default: the model's positions."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Dtype of the model's weights.")] = "float32",
    parquet: Annotated[bool, typer.Option("--parquet", help="Also write sequences.parquet (needs pyarrow).")] = False,
    save_seconds: Annotated[
        float, typer.Option(min=0, callback=finite, help="Seconds between two saves of the state.")
    ] = 10.0,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the evaluation in --out, if there is one.")] = False,
) -> None:
    """Measure utility and privacy of transforms on a file of any size, within a memory budget."""
    from sgfast.cli.evaluate import run_evaluate
    from sgfast.evaluation.settings import ATTACKS, Settings, parse_attacks, parse_bytes, result_folders

    settings = [
        Settings(
            model=model,
            transform=path,
            data=data,
            out=folder,
            attacks=ATTACKS if attacks is None else parse_attacks(attacks),
            num_logits=num_logits,
            beta=beta,
            attack_tokens=attack_tokens,
            memory_budget=parse_bytes(memory_budget),
            seed=seed,
            text_unit=text_unit,
            text_as=text_as,
            max_length=max_length,
            precision=precision,
            parquet=parquet,
            save_seconds=save_seconds,
        )
        for path, folder in zip(transform, result_folders(transform, out), strict=True)
    ]
    run_evaluate(settings, out=out, resume=resume, attacks_are_chosen=attacks is not None)


@app.command()
def transform(
    file: Annotated[Path, typer.Argument(help="Transform saved for clients.")],
    out: Annotated[Path, typer.Option(help="File for inputs_embeds and attention_mask (safetensors).")],
    prompt: Annotated[str | None, typer.Option(callback=text, help="The user's message; or give --data.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text or JSONL file; gives tensors KEY.inputs_embeds and KEY.attention_mask."),
    ] = None,
    text_unit: Annotated[TextUnit, typer.Option(help="Unit of a record in a text file.")] = "line",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**64 - 1, help="The same seed repeats an output; default: fresh randomness.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if the file exists.")] = False,
) -> None:
    """Transform a prompt, or the texts and chats of a file, into embeddings that a client sends to a server."""
    from sgfast.cli.transform import run_transform

    run_transform(file=file, prompt=prompt, data=data, out=out, seed=seed, text_unit=text_unit, force=force)


@app.command()
def voronoi(
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    percentile: Annotated[
        float, typer.Option(min=0, max=100, callback=finite, help="Percentile of the distances.")
    ] = 5.0,
    half: Annotated[
        bool,
        typer.Option("--half/--full", help="Distance to the border of the Voronoi cell, or to the nearest embedding."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead of a table.")] = False,
) -> None:
    """Measure the distances between a model's token embeddings, to choose a length for the catalyst loss."""
    from sgfast.cli.voronoi import run_voronoi

    run_voronoi(model=model, percentile=percentile, half=half, as_json=as_json)
