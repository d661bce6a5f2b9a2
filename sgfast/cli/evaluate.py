"""Command ``sgfast evaluate``: utility and privacy of transforms on a file of any size."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sgfast.cli.progress import Follower
from sgfast.evaluation.options import OPTIONS_FILE, with_options_of, write_options
from sgfast.evaluation.processes import Processes, joined
from sgfast.evaluation.report import (
    PARQUET_FILE,
    RESULT_FILES,
    SEQUENCES_FILE,
    check_continues,
    check_parquet,
    identity_of,
    read_metrics,
    write_parquet,
)
from sgfast.evaluation.report_plots import COMPARISON_PLOT, plot_comparison
from sgfast.evaluation.run import InterruptedEvaluationError, evaluate
from sgfast.evaluation.settings import (
    ATTACKS,
    EvaluationError,
    Settings,
    parse_attacks,
    parse_bytes,
    result_folders,
)
from sgfast.evaluation.subject import check_sizes, load_model, load_subject
from sgfast.huggingface.assets import PACKAGED_MODEL, check_model_exists
from sgfast.utils.devices import find_device
from sgfast.utils.files import check_output_file
from sgfast.utils.one_writer import one_writer
from sgfast.utils.records import read_records

_ROWS = {
    "same likeliest next token": ("utility", "next_token_agreement", "{:.1%}"),
    "total variation of the next token": ("utility", "next_token_utility/total_variation", "{:.4f}"),
    "Jeffreys divergence, nats": ("utility", "next_token_utility/jefferys", "{:.4g}"),
    "Jensen-Shannon divergence, nats": ("utility", "next_token_utility/jensen_shannon", "{:.4f}"),
    "squared Hellinger distance": ("utility", "next_token_utility/squared_hellinger_distance", "{:.4f}"),
    "perplexity, clean model": ("utility", "clean_perplexity", "{:.2f}"),
    "perplexity, through the transform": ("utility", "noisy_perplexity", "{:.2f}"),
    "nearest neighbour fails": ("privacy", "nearest_neighbor_failure_rate", "{:.1%}"),
    "farthest rank fails": ("privacy", "max_rank_failure_rate", "{:.1%}"),
    "mean rank of the true token": ("privacy", "mean_reconstruction_rank", "{:.0f}"),
    "true token not among the nearest 100": ("privacy", "token_transformation_rate_100", "{:.1%}"),
    "known transform fails": ("known", "failure_rate", "{:.1%}"),
    "  the tenth that the attacker is surest of": ("known", "worst_decile_failure_rate", "{:.1%}"),
    "  texts read without an error": ("known", "exact_sequence_rate", "{:.1%}"),
    "  canaries read": ("known", "canary_recall", "{:.1%}"),
    "learned inversion fails, held-out text": ("learned", "failure_rate", "{:.1%}"),
    "  guessing the most frequent token": ("learned", "unigram_failure_rate", "{:.1%}"),
    "  trained on shuffled embeddings": ("learned", "shuffled_failure_rate", "{:.1%}"),
    "one embedding tells at most, nats": ("information", "kl_upper", "{:.4g}"),
    "one embedding tells at least, nats": ("information", "bhattacharyya_lower", "{:.4g}"),
    "  any attack on it errs at least (Fano)": ("information", "fano_error_bound", "{:.1%}"),
    "  any attack on it succeeds at most (PAC)": ("information", "pac_success_bound", "{:.1%}"),
}


# What the rate of the strongest attack says.
_MEANINGS = {
    "known": "the strongest attacker knows the transform, as its owner does. The tokens that this attacker reads are "
    "disclosed to such a server; a failure says only that this search failed.",
    "learned": "the strongest attacker trained a decoder on own texts. The tokens that this attacker reads are "
    "disclosed to anyone who can run the transform; a failure says only that this decoder failed.",
    "repeated": "the strongest attacker averages transforms of one text. Do not send a text twice; a failure says only "
    "that averaging failed.",
    "nearest": "the strongest attacker takes the nearest token. The tokens that this attacker reads are disclosed to "
    "anyone who has the embedding table; a failure proves nothing about other attacks.",
    "farthest": "the strongest attacker takes the farthest token. A failure proves nothing about other attacks.",
}
_FIRST_OF_PRIVACY = "nearest neighbour fails"


def run_evaluate(options: Mapping[str, Any], given: set[str]) -> None:
    """Evaluate one transform or several. Wrong input raises ValueError before any file is written.

    Args:
        options: options of the command, by name.
        given: names of the options that the user gave. To resume, the others come from the folder of the evaluation.
    """
    out = options["out"]
    if options["resume"]:
        options = with_options_of(out, options, given)
    settings = _settings(options)
    if settings[0].parquet:
        check_parquet()
    find_device(options["device"])
    folders = dict.fromkeys([out, *(one.out for one in settings)])
    with joined() as processes, contextlib.ExitStack() as writers:
        for folder in folders:
            writers.enter_context(one_writer(folder))
        for path in (folder / name for folder in folders for name in (*RESULT_FILES, COMPARISON_PLOT, OPTIONS_FILE)):
            check_output_file(path)
        console = Console(stderr=True, quiet=processes.rank > 0, markup=False)
        try:
            _evaluate_all(settings, options, processes, console)
        except (InterruptedEvaluationError, KeyboardInterrupt):
            console.print(
                f"interrupted; what was measured is in {out}, and --resume goes on from here",
                highlight=False,
                soft_wrap=True,
            )
            raise SystemExit(130) from None
        if processes.rank == 0:
            _show(settings, out)


def _settings(options: Mapping[str, Any]) -> list[Settings]:
    """Return the settings of each transform. They differ only in ``transform`` and ``out``."""
    for name in ("transform", "data"):
        if not options[name]:
            nothing = f"; {options['out']} holds no evaluation to resume" if options["resume"] else ""
            raise EvaluationError(f"give --{name}{nothing}")
    attacks = options["attacks"]
    shared = {
        **{field.name: options[field.name] for field in dataclasses.fields(Settings) if field.name in options},
        "attacks": ATTACKS if attacks is None else parse_attacks(attacks),
        "memory_budget": parse_bytes(options["memory_budget"]),
    }
    folders = result_folders(options["transform"], options["out"])
    pairs = zip(options["transform"], folders, strict=True)
    return [Settings(**{**shared, "transform": transform, "out": folder}) for transform, folder in pairs]


def _evaluate_all(
    settings: Sequence[Settings], options: Mapping[str, Any], processes: Processes, console: Console
) -> None:
    identities = [identity_of(one) for one in settings]
    begun = []
    for one, identity in zip(settings, identities, strict=True):
        if not check_continues(one, identity, options["resume"]):
            begun.append((one, identity))
        elif one.parquet and processes.rank == 0:  # the finished evaluation may have run without --parquet
            write_parquet(one.out / PARQUET_FILE, one.out / SEQUENCES_FILE)
    if not begun:
        return
    check_model_exists(options["model"])
    for _ in read_records(settings[0].data, text_unit=settings[0].text_unit):
        pass  # a faulty line is an error here, before the model is loaded
    check_sizes(settings[0])
    console.print(f"loading {settings[0].model or PACKAGED_MODEL}", highlight=False)
    model = load_model(settings[0], find_device(options["device"]))
    if len(begun) > 1:
        # All transforms are loaded once first: a transform for another model must not fail after hours of work.
        for one, _ in begun:
            load_subject(model, one)
    for one, identity in begun:
        subject = load_subject(model, one)
        if len(settings) > 1:
            console.print(f"transform {one.transform}", highlight=False)
        with Follower(console) as follower:
            evaluate(
                one,
                subject,
                identity,
                processes,
                follower,
                resume=options["resume"],
                attacks_are_chosen=options["attacks"] is not None,
                on_begin=lambda: write_options(options["out"], options),
            )


def _show(settings: Sequence[Settings], out: Path) -> None:
    """Print a table of all results, and plot a comparison if there are several transforms."""
    names = [one.out.name if len(settings) > 1 else one.transform.stem for one in settings]
    results = {name: read_metrics(one.out) for name, one in zip(names, settings, strict=True)}
    if len(results) > 1:
        plot_comparison(out / COMPARISON_PLOT, results)
    console = Console(markup=False)  # names of files may have brackets
    console.print(_table(results))
    for name, metrics in results.items():
        if metrics["strongest_attack"] is not None:
            console.print(f"{name}: {_MEANINGS[metrics['strongest_attack']]}", highlight=False, soft_wrap=True)
        for attack, reason in metrics["left_out"].items():
            console.print(f"{name}: the attack {attack} was left out: {reason}", highlight=False, soft_wrap=True)
    console.print(f"in {out}: {_written(settings, out)}", highlight=False, soft_wrap=True)


def _written(settings: Sequence[Settings], out: Path) -> str:
    folders = [out] if len(settings) == 1 else [out, settings[0].out]
    return ", ".join(sorted(str(path.relative_to(out)) for folder in folders for path in folder.glob("*.*")))


def _table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    data = next(iter(results.values()))["data"]
    cut = f", {data['truncated']} cut at the greatest length" if data["truncated"] else ""
    title = f"{data['file']}: {data['records']} records{cut}, {data['tokens']} tokens"
    table = Table(title=f"{title}, {data['transformed_tokens']} of them transformed", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for label, values in _labelled(results):
        if any(value != "" for value in values):
            table.add_row(label, *values)
    return table


def _labelled(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = []
    for label, (group, name, form) in _ROWS.items():
        if label == _FIRST_OF_PRIVACY:
            rows.append(("strongest attack fails", [_strongest(metrics) for metrics in results.values()]))
        groups = [
            metrics[group] if group in metrics else metrics["attacks"].get(group, {}) for metrics in results.values()
        ]
        rows.append((label, [_cell(found, name, form) for found in groups]))
    repeated = [metrics["attacks"].get("repeated", {}).get("failure_rates", {}) for metrics in results.values()]
    if draws := next((list(rates)[-1] for rates in repeated if rates), None):
        place = 1 + [label for label, _ in rows].index("true token not among the nearest 100")
        values = [f"{rates[draws]:.1%}" if rates else "" for rates in repeated]
        rows.insert(place, (f"nearest neighbour fails, mean of {draws} draws", values))
    return rows


def _strongest(metrics: Mapping[str, Any]) -> str:
    name = metrics["strongest_attack"]
    if name is None:
        return ""
    attack = metrics["attacks"][name]
    interval = attack.get("ci95")
    return f"{attack['failure_rate']:.1%} ({name}" + (
        ")" if interval is None else ", {:.0%} to {:.0%})".format(*interval)
    )


def _cell(found: Mapping[str, Any], name: str, form: str) -> str:
    if found.get(name) is None:
        return ""
    return form.format(found[name]) + ("" if found.get("are_bounds", True) else " (estimate)")
