"""Subcommands of ``sgfast bench`` and their options."""

from pathlib import Path
from typing import Annotated

import typer

from sgfast.cli.option_checks import Device, finite

bench = typer.Typer(
    name="bench",
    help="Measure time, memory and accuracy on this machine, beside plain PyTorch. Gives a table, JSON and plots.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_Sizes = Annotated[str | None, typer.Option(metavar="N,N,…", help="Sizes of this axis; other axes keep their default.")]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
_Impl = Annotated[
    str,
    typer.Option(
        help="Implementations of sgfast, separated by commas: auto, torch, compile, triton. "
        "compile also compiles PyTorch's formula."
    ),
]
_Seconds = Annotated[
    float,
    typer.Option(min=0, max=60, callback=finite, help="Seconds for each time, but at least three rounds."),
]
_Out = Annotated[Path, typer.Option(help="Folder for the results.")]


@bench.command("divergences")
def bench_divergences(
    tokens: _Sizes = None,
    vocab: _Sizes = None,
    top_k: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: Device = "auto",
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Measure divergences between logits over vocabulary, tokens and top-k, and their accuracy over noise."""
    from sgfast.cli.bench import run_bench

    axes = {"vocab": vocab, "tokens": tokens, "top_k": top_k}
    run_bench("divergences", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)


@bench.command("hidden")
def bench_hidden(
    tokens: _Sizes = None,
    width: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: Device = "auto",
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Measure distances between hidden states over tokens and width."""
    from sgfast.cli.bench import run_bench

    axes = {"tokens": tokens, "width": width}
    run_bench("hidden", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)


@bench.command("noise")
def bench_noise(
    tokens: _Sizes = None,
    width: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: Device = "auto",
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Measure noise on embeddings over tokens and width."""
    from sgfast.cli.bench import run_bench

    axes = {"tokens": tokens, "width": width}
    run_bench("noise", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)


@bench.command("train")
def bench_train(
    tokens: _Sizes = None,
    vocab: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: Device = "auto",
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Measure whole training steps of a small model: a transform, and a student with its teacher."""
    from sgfast.cli.bench import run_bench

    axes = {"tokens": tokens, "vocab": vocab}
    run_bench("train", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)
