"""The subcommands and their options."""

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
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same numbers on one machine.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text to train and measure on; default: Python's documentation.")
    ] = None,
    layer: Annotated[int, typer.Option(min=-MOST, max=MOST, help="Decoder layer whose outputs are distilled.")] = 5,
    alpha: Annotated[
        float, typer.Option(callback=finite, help="0: keep the model's behaviour; 1: hide the text.")
    ] = 0.5,
    prompt: Annotated[str | None, typer.Option(callback=text, help="A prompt to hide, attack and answer.")] = None,
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
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings (docs/training.md).")] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL file (keys text or messages).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    loss: Annotated[str | None, typer.Option(help="Name of the loss, distillation or jigsaw, say.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records of a micro-batch, on each device.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches of a step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens kept of a record.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW, after the warm-up.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same numbers on one machine.")] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting: --set loss.alpha=0.3")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
) -> None:
    """Train a transform over any causal language model. Flags override the YAML file."""
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
        list[Path], typer.Option(help="A transform saved for clients; several are compared with each other.")
    ],
    data: Annotated[Path, typer.Option(help="Text or JSONL file (keys text or messages).")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("evaluation-output"),
    num_logits: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Restrict divergences to both sides' top-k logits; default: all."),
    ] = None,
    memory_budget: Annotated[
        str, typer.Option(help="Peak of resident bytes beyond the loaded model and one pass through its body.")
    ] = "2GiB",
    attacks: Annotated[
        str | None,
        typer.Option(
            help="all, none, or of nearest, farthest, transformation, repeated, learned, information; "
            "default: all that can be run.",
            show_default=False,
        ),
    ] = None,
    beta: Annotated[
        int, typer.Option(min=1, max=MOST, help="An attack succeeds if the token is among so many nearest.")
    ] = 1,
    attack_tokens: Annotated[
        int, typer.Option(min=8, max=MOST, help="Tokens sampled for the attacks repeated, learned and information.")
    ] = 4096,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same numbers on one machine.")] = 0,
    text_unit: Annotated[TextUnit, typer.Option(help="What a record of a text file is.")] = "line",
    text_as: Annotated[
        TextAs, typer.Option(help="A text as a user's message, or without a chat template.")
    ] = "message",
    max_length: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Tokens kept of a record; default: the model's positions.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the model's weights.")] = "float32",
    parquet: Annotated[bool, typer.Option("--parquet", help="Write sequences.parquet too (needs pyarrow).")] = False,
    save_seconds: Annotated[float, typer.Option(min=0, callback=finite, help="Save the state so often.")] = 10.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the evaluation in --out, if there is one.")
    ] = False,
) -> None:
    """Measure what transforms cost and what they hide, over a file of any size within a memory budget."""
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
    file: Annotated[Path, typer.Argument(help="A transform saved for clients.")],
    out: Annotated[Path, typer.Option(help="Where to write inputs_embeds and attention_mask (safetensors).")],
    prompt: Annotated[str | None, typer.Option(callback=text, help="The user's message.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Or a text or JSONL file: tensors KEY.inputs_embeds and KEY.attention_mask.")
    ] = None,
    text_unit: Annotated[TextUnit, typer.Option(help="What a record of a text file is.")] = "line",
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**64 - 1, help="To repeat an output; default: fresh randomness.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is there already.")] = False,
) -> None:
    """Transform a prompt, or the texts and chats of a file, into embeddings for a server: the client's half."""
    from sgfast.cli.transform import run_transform

    run_transform(file=file, prompt=prompt, data=data, out=out, seed=seed, text_unit=text_unit, force=force)


@app.command()
def voronoi(
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    percentile: Annotated[
        float, typer.Option(min=0, max=100, callback=finite, help="Which percentile of the distances.")
    ] = 5.0,
    half: Annotated[
        bool, typer.Option("--half/--full", help="To the border of the Voronoi cell, or to the nearest embedding.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Measure how close together a model's token embeddings lie: a length for the catalyst loss."""
    from sgfast.cli.voronoi import run_voronoi

    run_voronoi(model=model, percentile=percentile, half=half, as_json=as_json)
