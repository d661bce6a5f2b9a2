"""The result files of an evaluation (metrics.json, a line for each sequence), and the check that it may continue."""

import hashlib
import json
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import sgfast
from sgfast.client.file_format import check_client_file
from sgfast.evaluation.canaries import check_canaries
from sgfast.evaluation.intervals import clustered_interval
from sgfast.evaluation.progress import Progress, write_json
from sgfast.evaluation.record_measurement import Measurement, number, selected_rates
from sgfast.evaluation.report_plots import (
    ATTACKS_PLOT,
    DIVERGENCES_PLOT,
    RANKS_PLOT,
    plot_attacks,
    plot_divergences,
    plot_ranks,
    strongest_attack,
)
from sgfast.evaluation.settings import RANK_ATTACKS, EvaluationError, Settings
from sgfast.training.run_record import versions
from sgfast.utils.files import replacing
from sgfast.utils.input_files import open_regular
from sgfast.utils.records import data_digest, read_records

METRICS_FILE, SEQUENCES_FILE, PARQUET_FILE = "metrics.json", "sequences.jsonl", "sequences.parquet"
RESULT_FILES = (METRICS_FILE, SEQUENCES_FILE, PARQUET_FILE, DIVERGENCES_PLOT, RANKS_PLOT, ATTACKS_PLOT)
_PARQUET_ROWS = 4096
# The rate that stands for a rank attack. The lists of `transformation` hold 10, 100 or 1000 tokens.
RANK_RATES = {
    "nearest": "nearest_neighbor_failure_rate",
    "farthest": "max_rank_failure_rate",
    "transformation": "token_transformation_rate_10",
}


def identity_of(settings: Settings) -> dict[str, Any]:
    """Return the identity of an evaluation: its settings without the seed, and digests of data and transform.

    Raises:
        EvaluationError: no such transform or data, no regular file, a file that is no transform, or a first record that
            cannot be used.
    """
    # An empty file or a file of another kind is refused before a digest reads it whole and before a model is loaded.
    try:
        with open_regular(settings.transform, wanted="text transform") as file:
            check_client_file(settings.transform)
            next(read_records(settings.data, text_unit=settings.text_unit))
            if settings.canaries is not None:
                check_canaries(settings.canaries, settings)
            transform = hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    files = {"data": data_digest(settings.data), "transform": transform}
    if settings.canaries is not None:
        files["canaries"] = data_digest(settings.canaries)
    return settings.compared() | files


def check_continues(settings: Settings, identity: dict[str, Any], resume: bool) -> bool:
    """Check that an evaluation may write to its folder; return True if the folder holds its finished results.

    Raises:
        EvaluationError: the folder holds an evaluation and ``resume`` is False, or the evaluation had other data,
            settings or another transform.
    """
    finished, progress = _read_json(settings.out / METRICS_FILE), Progress(settings.out)
    begun = progress.read_run()
    before = finished.get("identity") if finished is not None else begun and begun.get("identity")
    if finished is None and (before is None or not any(part.reached.records for part in progress.parts())):
        return False
    if not isinstance(before, dict):
        raise EvaluationError(f"{settings.out / METRICS_FILE} is of something else: give another --out")
    if not resume:
        raise EvaluationError(f"{settings.out} holds an evaluation: continue it by --resume, or give another --out")
    for name, now in identity.items():
        if before.get(name) == now:
            continue
        if name in ("data", "transform", "canaries"):
            path = getattr(settings, name)
            raise EvaluationError(f"--resume: {path} is not the {name} that {settings.out} was begun with")
        option = name.replace("_", "-")
        raise EvaluationError(
            f"--resume: {settings.out} was begun with --{option} {_shown(before.get(name))}; now it is {_shown(now)}"
        )
    return finished is not None


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_results(settings: Settings, progress: Progress, run: dict[str, Any], measurement: Measurement) -> None:
    """Write the values of all sequences, the plots, and last ``metrics.json``, which makes the state superfluous."""
    metrics, sequences = _metrics(settings, run, measurement, progress), settings.out / SEQUENCES_FILE
    with replacing(sequences) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(progress.sequences())
    if settings.parquet:
        write_parquet(settings.out / PARQUET_FILE, sequences)
    plot_divergences(settings.out / DIVERGENCES_PLOT, sequences, metrics["utility"])
    if "rank_histogram" in metrics:
        plot_ranks(settings.out / RANKS_PLOT, metrics["rank_histogram"])
    if metrics["strongest_attack"] is not None:
        plot_attacks(settings.out / ATTACKS_PLOT, metrics["attacks"])
    write_json(settings.out / METRICS_FILE, metrics)
    progress.remove()


def read_metrics(out: Path) -> dict[str, Any]:
    """Read a finished evaluation's ``metrics.json``.

    Raises:
        EvaluationError: there is no such file.
    """
    metrics = _read_json(out / METRICS_FILE)
    if not metrics:
        raise EvaluationError(f"{out / METRICS_FILE} is not the result of an evaluation")
    return metrics


def _metrics(settings: Settings, run: dict[str, Any], measurement: Measurement, progress: Progress) -> dict[str, Any]:
    found = run["survey"]
    names = ("records", "tokens", "transformed_tokens", "longest", "truncated")
    by_rank = any(name in RANK_ATTACKS for name in settings.attacks)
    utility = {name: number(value) for name, value in measurement.utility.compute(all_processes=False).items()}
    metrics: dict[str, Any] = {
        "strongest_attack": None,
        "attacks": {},
        "utility": utility,
        "privacy": {},
        "left_out": run["left_out"],
        "data": {"file": settings.data.name, **{name: found[name] for name in names}},
        "identity": run["identity"],
        "memory_budget": settings.memory_budget,
        "device": run["device"],
        "versions": versions(),
        "commit": commit(),
    }
    if by_rank:
        rates = measurement.privacy.compute(all_processes=False)
        metrics["privacy"] = {name: number(value) for name, value in selected_rates(rates, settings.attacks).items()}
        metrics["rank_histogram"] = rank_histogram(measurement)
    metrics["attacks"] = _rank_attacks(settings, metrics["privacy"], progress) | run["attacks"]
    strongest = strongest_attack(metrics)
    metrics["strongest_attack"] = None if strongest is None else strongest[0]
    return metrics


def _rank_attacks(settings: Settings, rates: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Return failure rate, interval and tokens of the rank attacks, from the lines of the sequences."""
    names = {name: RANK_RATES[name] for name in settings.attacks if name in RANK_RATES}
    counts: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    if not names:
        return {}
    for line in progress.sequences():
        values = json.loads(line)
        for name, rate in names.items():
            if values.get(rate) is not None:
                counts[name].append((values[rate] * values["transformed_tokens"], values["transformed_tokens"]))
    return {
        name: {
            "failure_rate": rates.get(rate),
            "ci95": clustered_interval(counts[name]),
            "tokens": sum(tokens for _, tokens in counts[name]),
        }
        for name, rate in names.items()
    }


def rank_histogram(measurement: Measurement) -> dict[str, list[int]]:
    """Count tokens by rank: 0, 1, 2–3, 4–7, … up to the table's size. ``first_ranks`` are the bins' lower ends."""
    counts = measurement.privacy.rank_counts(all_processes=False).cpu()
    first_ranks = [0, *(2**bits for bits in range((len(counts) - 1).bit_length()))]
    ends = [*first_ranks[1:], len(counts)]
    tokens = [int(counts[first:end].sum()) for first, end in zip(first_ranks, ends, strict=True)]
    return {"first_ranks": first_ranks, "tokens": tokens, "table_size": [len(counts)]}


def commit() -> str | None:
    """Return the commit of the checkout that sgfast runs from, marked if files were changed; None if installed."""
    folder = Path(sgfast.__file__).parent
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", "__init__.py"], cwd=folder, check=True, **_QUIET)
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=folder, check=True, **_QUIET
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return str(described.stdout).strip()


_QUIET: dict[str, Any] = {"capture_output": True, "text": True}


def check_parquet() -> None:
    """Check that Parquet can be written.

    Raises:
        EvaluationError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as error:
        raise EvaluationError("--parquet needs pyarrow: pip install pyarrow") from error


def write_parquet(path: Path, sequences: Path) -> None:
    """Copy the lines of ``sequences.jsonl`` into a Parquet file, a few thousand at a time."""
    import pyarrow
    import pyarrow.parquet

    types = {"key": pyarrow.string(), "truncated": pyarrow.bool_()}
    integers = ("index", "line", "tokens", "transformed_tokens", "predicted_tokens")
    types |= {name: pyarrow.int64() for name in integers}
    with sequences.open(encoding="utf-8") as file, replacing(path) as temporary:
        lines: Iterator[dict[str, Any]] = map(json.loads, file)
        rows = list(islice(lines, _PARQUET_ROWS))
        schema = pyarrow.schema([(name, types.get(name, pyarrow.float64())) for name in rows[0]])
        with pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
            while rows:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
                rows = list(islice(lines, _PARQUET_ROWS))
