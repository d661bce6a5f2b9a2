"""The command line in this process, with what takes long (training, measuring) left out."""

import io
import os
import random
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from sgfast.cli.main import main
from tests.fuzz import text_cases

_NUMBERS = [
    "0",
    "1",
    "-1",
    "5",
    "nan",
    "inf",
    "-inf",
    "1e-3",
    "9" * 400,
    "9" * 5000,
    "1.5",
    "",
    "x",
    "0x10",
    "²",
    "1e400",
]
_STRINGS = [
    "",
    " ",
    "\ud800",
    "\udce9",
    "a\0b",
    "é",
    "[bold]x[/bold]",
    "-",
    "--",
    "x" * 5000,
    "\n",
    "{}",
    "%s",
    "\x1b[31m",
]
_SIZES = ["1", "8,16", "0", "-1", "1,,2", "9" * 400, "9" * 5000, "2147483647", "100000000000", "", "a", "1.5", "1" * 19]
_BYTES = ["2GiB", "0", "-1", "1e9", "9" * 400 + "GiB", "nan", "", "1", "1 QB", "٣GiB"]
_CHOICES = [
    "line",
    "paragraph",
    "message",
    "plain",
    "float32",
    "bfloat16",
    "float64",
    "",
    "distillation",
    "jigsaw",
    "\0",
]
_ATTACKS = ["all", "none", "nearest,learned", "", ",", "odd", "all,none", "nearest" * 1000]
_OVERRIDES = [
    "loss.alpha=.3",
    "loss=[a]",
    "loss.name=[a]",
    "steps=" + "9" * 400,
    "x",
    "=1",
    "a.b.c.d.e.f=1",
    "lora.r=99999999",
]
_OVERRIDES += [
    "noise_layer.mean_num_hidden_layers=100000000",
    "loss.alpha=.nan",
    "seed=-1",
    "a=" + "[" * 500,
    "steps=&a [*a]",
]
_OVERRIDES += ["noise_layer.scale=[1, 0]", "noise_layer.scale='12'", "noise_layer.percent_to_mask=2", "data=", "out=''"]
_COMMANDS: dict[str, dict[str, Any]] = {
    "demo": {"steps": _NUMBERS, "out": "out", "model": "model", "seed": _NUMBERS, "data": "file", "layer": _NUMBERS,
             "alpha": _NUMBERS, "prompt": _STRINGS},
    "train": {"": "yaml", "data": "file", "model": "model", "out": "out", "loss": _CHOICES, "steps": _NUMBERS,
              "batch-size": _NUMBERS, "accumulation": _NUMBERS, "max-length": _NUMBERS, "learning-rate": _NUMBERS,
              "precision": _CHOICES, "seed": _NUMBERS, "set": _OVERRIDES, "resume": None},
    "evaluate": {"transform": "client", "data": "file", "model": "model", "out": "out", "num-logits": _NUMBERS,
                 "memory-budget": _BYTES, "attacks": _ATTACKS, "beta": _NUMBERS, "attack-tokens": _NUMBERS,
                 "seed": _NUMBERS, "text-unit": _CHOICES, "text-as": _CHOICES, "max-length": _NUMBERS,
                 "precision": _CHOICES, "parquet": None, "save-seconds": _NUMBERS, "resume": None},
    "transform": {"": "client", "out": "out", "prompt": _STRINGS, "data": "file", "text-unit": _CHOICES,
                  "seed": _NUMBERS},
    "voronoi": {"model": "model", "percentile": _NUMBERS, "half": None, "json": None},
    "bench divergences": {"tokens": _SIZES, "vocab": _SIZES, "top-k": _SIZES, "dtype": _CHOICES, "impl": _CHOICES,
                          "device": _STRINGS, "seconds": _NUMBERS, "out": "out"},
    "bench hidden": {"tokens": _SIZES, "width": _SIZES, "seconds": _NUMBERS, "out": "out"},
    "bench noise": {"tokens": _SIZES, "width": _SIZES, "seconds": _NUMBERS, "out": "out"},
    "bench train": {"tokens": _SIZES, "vocab": _SIZES, "seconds": _NUMBERS, "out": "out"},
}  # fmt: skip
# Without these a command ends before it looks at anything.
_NEEDED = {"train": ["data", "model"], "evaluate": ["transform", "data", "model"], "transform": ["", "out"]}
_NEEDED |= {"demo": ["model", "out", "data"], "voronoi": ["model"]} | {
    f"bench {family}": ["out"] for family in ("divergences", "hidden", "noise", "train")
}


def leave_out_long_work() -> None:
    """Stop each command where its input is checked and the work would begin."""
    import sgfast.cli.bench as bench
    import sgfast.cli.demo as demo
    import sgfast.cli.evaluate as evaluate
    import sgfast.cli.train as train
    from sgfast.huggingface import assets

    def stop(*_: Any, **__: Any) -> Any:
        raise SystemExit(0)

    train._follow = stop
    evaluate.evaluate = stop
    demo.measure = stop
    assets._packaged_folder = _no_packaged_model
    bench.copy_gb_per_s = stop


def run_command(arguments: Sequence[str]) -> str:
    """Run it; anything but success, or one line and exit code 2, is an AssertionError or an exception."""
    written = io.StringIO()
    code: Any = 0
    with redirect_stdout(io.StringIO()), redirect_stderr(written):
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code or 0
    text = written.getvalue()
    if code == 0:
        return "done"
    lines = [line for line in text.splitlines() if line.startswith("sgfast: ")]
    is_usage = "Usage: " in text or "Error" in text
    if code != 2 or "Traceback" in text or not (len(lines) == 1 or (not lines and is_usage)):
        raise AssertionError(f"exit code {code}, standard error {text[-500:]!r}")
    if any(len(line) > 2000 for line in lines):
        raise AssertionError(f"standard error has {len(text)} characters")
    return "usage" if not lines else "one line"


def _no_packaged_model() -> Path:
    raise ValueError("the packaged model takes half a minute to load")


class Files:
    """Hostile and good files in one folder."""

    def __init__(self, folder: Path, good_client: Path, model: Path) -> None:
        self.folder = folder
        pipe, text, empty = folder / "pipe", folder / "text.txt", folder / "empty.jsonl"
        if not pipe.exists():
            os.mkfifo(pipe)
            text.write_text("the keyword of the function and the class\n" * 200)
            empty.write_text("\n")
            (folder / "zeros.txt").write_bytes(bytes(2**16))
            (folder / "sparse.jsonl").touch()
            os.truncate(folder / "sparse.jsonl", 2**33)
            (folder / "loop").symlink_to(folder / "loop")
            (folder / "caf\udce9.txt").write_text("the keyword\n" * 20)
        odd = [pipe, empty, folder, folder / "absent", folder / "loop", Path("/dev/zero"), Path("/dev/null")]
        strange = ["", "a\0b", "\ud800", "x" * 5000, folder / "zeros.txt", folder / "sparse.jsonl", text]
        self.paths = {
            "file": [*[text] * 8, *odd, *strange, folder / "caf\udce9.txt"],
            "client": [*[good_client] * 8, *odd, *strange],
            "yaml": [*odd, *strange],
            "model": [*[model] * 8, folder / "absent", folder, text, "", "a\0b", "\ud800", "../..", pipe, good_client],
            "out": ["{new}"] * 8 + ["{new}\0", "{new}\ud800", "{new}/" + "x" * 300],
        }
        self.good = {"file": text, "client": good_client, "model": model}

    def arguments(self, generator: random.Random) -> list[str]:
        """A command with some of its options."""
        command = generator.choice(sorted(_COMMANDS))
        options = _COMMANDS[command]
        needed = _NEEDED[command] if generator.random() < 0.95 else []
        others = [name for name in options if name not in needed]
        chosen = [*needed, *generator.sample(others, min(len(others), generator.choice([0, 1, 1, 2, 3])))]
        arguments = command.split()
        for name in chosen:
            kind = options[name]
            if kind is None:
                arguments.append(f"--{name}")
                continue
            value = str(generator.choice(self.paths[kind] if isinstance(kind, str) else kind))
            value = value.replace("{new}", str(self.folder / f"out{generator.randrange(10**9)}"))
            arguments += [f"--{name}", value] if name else [value]
        return arguments

    def settings_arguments(self, generator: random.Random, path: Path) -> list[str]:
        """``sgfast train`` with settings in YAML."""
        path.write_bytes(text_cases.settings(generator))
        model = ["--model", str(self.good["model"])]
        flags = ["--out", str(self.folder / "out"), "--set", "loss.distillation_layer_index=1"]
        data = ["--data", str(self.good["file"])]
        chosen = [model, *(one for one in (flags, data) if generator.random() < 0.8)]
        return ["train", str(path), *(argument for one in chosen for argument in one)]

    def records_arguments(self, generator: random.Random, path: Path) -> list[str]:
        """A command that reads records."""
        path.write_bytes(text_cases.records(generator))
        out = str(self.folder / "out.safetensors")
        model, client = str(self.good["model"]), str(self.good["client"])
        return generator.choice(
            [
                ["transform", client, "--data", str(path), "--out", out],
                [
                    "train",
                    "--data",
                    str(path),
                    "--model",
                    model,
                    "--batch-size",
                    "1",
                    "--out",
                    str(self.folder / "out"),
                ],
                ["evaluate", "--transform", client, "--data", str(path), "--model", model],
                ["demo", "--data", str(path), "--model", model],
            ]
        )
