"""Command ``sgfast train``: training of a transform from a YAML file or flags."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from sgfast.cli.progress import OnStep, show_training
from sgfast.huggingface.assets import PACKAGED_MODEL, check_model_exists
from sgfast.huggingface.trainer_checkpoint import Trained, checkpoints, save_adapters, trained_state
from sgfast.loss.factory import LossFunctions
from sgfast.training.building import Models, build_loss, build_models, check_sizes
from sgfast.training.configuration import (
    Configuration,
    ConfigurationError,
    configuration_from,
    parse_override,
    read_yaml,
    with_overrides,
)
from sgfast.training.data import TokenizedRecords, check_trainable
from sgfast.training.history_plot import plot_history
from sgfast.training.run_record import (
    CHECKPOINTS,
    RECORD_FILE,
    check_continues,
    components_in,
    ends,
    with_settings_of_run,
    write_record,
)
from sgfast.training.trainer_run import History, runs_on_cpu, train
from sgfast.utils.files import check_output_file, check_output_folder
from sgfast.utils.one_writer import one_writer
from sgfast.utils.records import IndexedRecords, data_digest

TRANSFORM_FILE, PLOT_FILE, ADAPTER_FOLDER = "transform.safetensors", "training.png", "adapter"


def run_train(config: Path | None, flags: dict[str, Any], overrides: Sequence[str], resume: bool) -> None:
    """Train a transform. Wrong input raises ValueError before any file is written. Ctrl-C saves the transform so far.

    With several processes (torchrun, accelerate launch), all train, and only the first one writes and reports.
    """
    settings = _settings(config, flags, overrides)
    configuration = _configuration(config, settings, resume)
    on_cpu = runs_on_cpu(configuration)
    check_model_exists(configuration.model)
    processes = PartialState(cpu=on_cpu)
    with one_writer(configuration.out):
        for name in (TRANSFORM_FILE, RECORD_FILE, PLOT_FILE):
            check_output_file(configuration.out / name)
        for name in (CHECKPOINTS, ADAPTER_FOLDER):
            check_output_folder(configuration.out / name)
        _run(configuration, processes, resume, seed_is_given=settings.get("seed") is not None)


def _run(configuration: Configuration, processes: PartialState, resume: bool, seed_is_given: bool) -> None:
    console = Console(stderr=True, quiet=not processes.is_main_process)
    records = IndexedRecords(configuration.data, text_unit=configuration.text_unit)
    batch = configuration.batch_size * processes.num_processes
    if len(records) < batch:
        raise ConfigurationError(f"{configuration.data} holds {len(records)} records, fewer than a batch of {batch}")
    digest = data_digest(configuration.data)
    check_continues(configuration, digest, resume)
    console.print(f"data: {configuration.data}, {len(records)} records", highlight=False)
    check_sizes(configuration)
    if resume and not seed_is_given and checkpoints(configuration.out / CHECKPOINTS):
        console.print(
            f"no seed was given: the run goes on with seed {configuration.seed}; if it was begun with another seed, "
            "noise and order of the data change from here on",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"loading {configuration.model or PACKAGED_MODEL}", highlight=False)
    models = build_models(configuration)
    examples = TokenizedRecords(
        records, models.tokenizer_wrapper, max_length=configuration.max_length, text_as=configuration.text_as
    )
    check_trainable(examples)
    loss = build_loss(models, configuration.loss_name, configuration.loss_options)
    data, scale = {"records": len(records), "sha256": digest}, models.noisy_model.noise_layer.scale
    if processes.is_main_process:
        write_record(configuration, data, scale)  # --resume recognizes a killed run by this record
    history, finished = _follow(console, configuration, models, loss, examples, resume)
    trained = None if models.student is None else trained_state(models.student)
    if not processes.is_main_process:
        return
    _save(configuration, models, trained)
    write_record(configuration, data, scale, history, finished=finished)
    plot_history(configuration.out / PLOT_FILE, history)
    if not finished:
        console.print(
            f"interrupted after {len(history)} of {configuration.steps} steps; the transform so far is in "
            f"{configuration.out}, and --resume goes on from here",
            highlight=False,
        )
        raise SystemExit(130)
    written = [TRANSFORM_FILE, RECORD_FILE, PLOT_FILE, *([f"{ADAPTER_FOLDER}/"] if models.student else [])]
    result = Console()
    result.print(_table(history))
    result.print(f"in {configuration.out}: {', '.join(written)}", highlight=False)


def _settings(config: Path | None, flags: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that the user gave, in the file or on the command line."""
    given = [(name, value) for name, value in flags.items() if value is not None]
    settings = {} if config is None else read_yaml(config)
    with _naming(config):
        return with_overrides(settings, [*given, *map(parse_override, overrides)])


def _configuration(config: Path | None, settings: dict[str, Any], resume: bool) -> Configuration:
    with _naming(config):
        return configuration_from(with_settings_of_run(settings) if resume else settings)


@contextlib.contextmanager
def _naming(config: Path | None) -> Iterator[None]:
    """Put the name of the settings' file in front of errors."""
    try:
        yield
    except ConfigurationError as error:
        if config is None:
            raise
        raise ConfigurationError(f"{config}: {error}") from error


def _follow(
    console: Console,
    configuration: Configuration,
    models: Models,
    loss: LossFunctions,
    examples: TokenizedRecords,
    resume: bool,
) -> tuple[History, bool]:
    """Train under a progress bar."""

    def description(values: dict[str, float]) -> str:
        return f"loss {values['loss']:.4g} sigma {values['mean_sigma']:.4g}"

    def training(on_step: OnStep) -> tuple[History, bool]:
        return train(configuration, models, loss, examples, resume=resume, on_step=on_step)

    return show_training(console, configuration.steps, description, training)


def _save(configuration: Configuration, models: Models, trained: Trained | None) -> None:
    models.noisy_model.eval()
    models.client.save_pretrained(configuration.out / TRANSFORM_FILE)
    if trained is not None:
        save_adapters(models.student, trained, configuration.out / ADAPTER_FOLDER)


def _table(history: History) -> Table:
    table = Table(title="means over the first and over the last tenth of the steps", title_justify="left")
    table.add_column("")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for name in components_in(history):
        first, last = ends(history, name)
        table.add_row(name.replace("_", " "), f"{first:.4g}", f"{last:.4g}")
    return table
