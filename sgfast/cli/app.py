"""The subcommands and their options."""

from pathlib import Path
from typing import Annotated

import typer

from sgfast.cli.bench_options import bench

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
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 160,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same numbers on one machine.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text to train and measure on; default: Python's documentation.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Decoder layer whose outputs are distilled.")] = 5,
    alpha: Annotated[float, typer.Option(help="0: keep the model's behaviour; 1: hide the text.")] = 0.5,
    prompt: Annotated[str | None, typer.Option(help="A prompt to hide, attack and answer.")] = None,
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
def transform(
    file: Annotated[Path, typer.Argument(help="A transform saved for clients.")],
    prompt: Annotated[str, typer.Option(help="The user's message.")],
    out: Annotated[Path, typer.Option(help="Where to write inputs_embeds and attention_mask (safetensors).")],
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**64 - 1, help="To repeat an output; default: fresh randomness.", show_default=False),
    ] = None,
) -> None:
    """Transform a prompt into embeddings for a server: the client's half."""
    from safetensors.torch import save_file

    from sgfast.client import StainedGlassTransformForText
    from sgfast.utils.files import replacing

    client = StainedGlassTransformForText.from_pretrained(file)
    encoded = client.encode([{"role": "user", "content": prompt}], seed=seed)
    with replacing(out) as temporary:
        save_file(encoded, temporary)
    batch, tokens, width = encoded["inputs_embeds"].shape
    typer.echo(f"wrote {out}: {batch} x {tokens} tokens x {width} features")


@app.command()
def voronoi(
    model: Annotated[
        str | None, typer.Option(help="Hub id or path of a causal language model; default: the packaged SmolLM2-135M.")
    ] = None,
    percentile: Annotated[float, typer.Option(min=0, max=100, help="Which percentile of the distances.")] = 5.0,
    half: Annotated[
        bool, typer.Option("--half/--full", help="To the border of the Voronoi cell, or to the nearest embedding.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of a table.")] = False,
) -> None:
    """Measure how close together a model's token embeddings lie: a length for the catalyst loss."""
    from sgfast.cli.voronoi import run_voronoi

    run_voronoi(model=model, percentile=percentile, half=half, as_json=as_json)
