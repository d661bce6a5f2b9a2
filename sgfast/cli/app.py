"""Subcommands of ``sgfast`` and their options."""

from pathlib import Path
from typing import Annotated

import typer

from sgfast._version import __version__
from sgfast.cli.bench_options import bench
from sgfast.cli.option_checks import MOST, Device, choice, finite, text
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


_TextUnit = Annotated[TextUnit, choice(TextUnit, help="Unit of a record in a text file.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sgfast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, measure and use Stained Glass Transforms."""


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Print versions, devices and the implementation that runs, for a report of a fault."""
    from sgfast.cli.env import run_env

    run_env(as_json=as_json)


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
    device: Device = "auto",
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
        device=device,
    )


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="YAML file with settings (docs/training.md).")] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL file (keys text or messages).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: train-output.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="Name of the loss, for example jigsaw; default: distillation.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of optimizer steps; default: 300.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Records of a micro-batch on each device; default: 8.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches of an optimizer step; default: 1.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Maximum number of tokens of a record, the rest is cut; default: 128.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of AdamW after the warm-up; default: 0.001.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: float32.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same numbers on one machine; default: 0.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, mps or auto (a GPU if there is one); default: auto.", metavar="DEVICE"),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting of docs/training.md: --set loss.alpha=0.3. May be given several times.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume the run in --out, with its settings; give the seed again (no file has it)."
        ),
    ] = False,
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
        "device": device,
    }
    run_train(config, flags, override or [], resume)


@app.command()
def evaluate(
    context: typer.Context,
    transform: Annotated[
        list[Path] | None, typer.Option(help="Transform saved for clients. Several transforms are compared.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Text or JSONL file (keys text or messages).")] = None,
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
            help="all, none, or a comma-separated list of nearest, farthest, transformation, repeated, learned, known, "
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
    known_tokens: Annotated[
        int, typer.Option(min=1, max=MOST, help="Tokens that the attack known reads, in whole beginnings of records.")
    ] = 256,
    canaries: Annotated[
        Path | None,
        typer.Option(help="File of secrets in the data, one a record; the attack known reports how many it reads."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same numbers on one machine.")
    ] = 0,
    text_unit: _TextUnit = "line",
    text_as: Annotated[
        TextAs, choice(TextAs, help="Take a text as a user's message, or plain, without a chat template.")
    ] = "message",
    max_length: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Maximum number of tokens of a record; default: the model's positions."),
    ] = None,
    precision: Annotated[Precision, choice(Precision, help="Dtype of the model's weights.")] = "float32",
    device: Device = "auto",
    parquet: Annotated[bool, typer.Option("--parquet", help="Also write sequences.parquet (needs pyarrow).")] = False,
    save_seconds: Annotated[
        float, typer.Option(min=0, callback=finite, help="Seconds between two saves of the state.")
    ] = 10.0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the evaluation in --out with its options; give the seed again (no file has it).",
        ),
    ] = False,
) -> None:
    """Measure utility and privacy of transforms on a file of any size, within a memory budget."""
    from sgfast.cli.evaluate import run_evaluate

    options = {
        "transform": transform,
        "data": data,
        "model": model,
        "out": out,
        "num_logits": num_logits,
        "memory_budget": memory_budget,
        "attacks": attacks,
        "beta": beta,
        "attack_tokens": attack_tokens,
        "known_tokens": known_tokens,
        "canaries": canaries,
        "seed": seed,
        "text_unit": text_unit,
        "text_as": text_as,
        "max_length": max_length,
        "precision": precision,
        "device": device,
        "parquet": parquet,
        "save_seconds": save_seconds,
        "resume": resume,
    }
    # The name of the source is the same in click and in the copy of click that newer versions of typer have.
    sources = {name: context.get_parameter_source(name) for name in options}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    run_evaluate(options, given)


@app.command()
def transform(
    file: Annotated[Path, typer.Argument(help="Transform saved for clients.")],
    out: Annotated[Path, typer.Option(help="File for inputs_embeds and attention_mask (safetensors).")],
    prompt: Annotated[str | None, typer.Option(callback=text, help="The user's message; or give --data.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Text or JSONL file; gives tensors KEY.inputs_embeds and KEY.attention_mask."),
    ] = None,
    text_unit: _TextUnit = "line",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**64 - 1, help="The same seed repeats an output; default: fresh randomness.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if the file exists.")] = False,
    device: Device = "auto",
) -> None:
    """Transform a prompt, or the texts and chats of a file, into embeddings that a client sends to a server."""
    from sgfast.cli.transform import run_transform

    run_transform(
        file=file, prompt=prompt, data=data, out=out, seed=seed, text_unit=text_unit, force=force, device=device
    )


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
    device: Device = "auto",
) -> None:
    """Measure the distances between a model's token embeddings, to choose a length for the catalyst loss."""
    from sgfast.cli.voronoi import run_voronoi

    run_voronoi(model=model, percentile=percentile, half=half, as_json=as_json, device=device)
