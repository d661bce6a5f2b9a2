"""The subcommands of ``sgfast bench`` and their options."""

from pathlib import Path
from typing import Annotated

import typer

from sgfast.cli.option_checks import finite

bench = typer.Typer(
    name="bench",
    help="Time, memory and accuracy here, beside plain PyTorch: a table, JSON and plots.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

_Sizes = Annotated[str | None, typer.Option(metavar="N,N,…", help="Sizes to measure; all others held.")]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
_Impl = Annotated[
    str, typer.Option(help="Of sgfast, separated by commas: auto, torch, compile (then PyTorch's formula too), triton.")
]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU where there is one.")]
_Seconds = Annotated[
    float, typer.Option(min=0, max=60, callback=finite, help="Spent on each time, three rounds at least.")
]
_Out = Annotated[Path, typer.Option(help="Folder for the results.")]


@bench.command("divergences")
def bench_divergences(
    tokens: _Sizes = None,
    vocab: _Sizes = None,
    top_k: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: _Device = None,
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Divergences between logits against vocabulary, tokens and top-k; their accuracy against noise."""
    from sgfast.cli.bench import run_bench

    axes = {"vocab": vocab, "tokens": tokens, "top_k": top_k}
    run_bench("divergences", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)


@bench.command("hidden")
def bench_hidden(
    tokens: _Sizes = None,
    width: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: _Device = None,
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Distances between hidden states against tokens and width."""
    from sgfast.cli.bench import run_bench

    axes = {"tokens": tokens, "width": width}
    run_bench("hidden", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)


@bench.command("noise")
def bench_noise(
    tokens: _Sizes = None,
    width: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: _Device = None,
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Noise on embeddings against tokens and width."""
    from sgfast.cli.bench import run_bench

    axes = {"tokens": tokens, "width": width}
    run_bench("noise", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)


@bench.command("train")
def bench_train(
    tokens: _Sizes = None,
    vocab: _Sizes = None,
    dtype: _Dtype = "float32",
    impl: _Impl = "auto",
    device: _Device = None,
    seconds: _Seconds = 0.2,
    out: _Out = Path("bench-output"),
) -> None:
    """Whole training steps of a small model: a transform, and a student of a teacher."""
    from sgfast.cli.bench import run_bench

    axes = {"tokens": tokens, "vocab": vocab}
    run_bench("train", axes=axes, dtype=dtype, impl=impl, device=device, seconds=seconds, out=out)
