"""One evaluation: survey the file, measure every record, then attack a sample. It can be interrupted and resumed."""

import json
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from sgfast.evaluation.attacks import LEAST_TEXTS, RECORDS_READ, SampleAttacks
from sgfast.evaluation.budget import readable_bytes
from sgfast.evaluation.processes import Processes
from sgfast.evaluation.progress import PartWriter, Progress
from sgfast.evaluation.record_measurement import (
    Measurement,
    add_measured,
    budget_of,
    max_length_of,
    measure_example,
    numbers,
)
from sgfast.evaluation.report import write_results
from sgfast.evaluation.settings import SAMPLE_ATTACKS, EvaluationError, Settings
from sgfast.evaluation.subject import Subject
from sgfast.evaluation.survey import Survey, check_survey, read_examples
from sgfast.utils.interruption import noting_interruption
from sgfast.utils.records import RecordError

# Two measurements of one record under one seed may differ by this part of their size.
_SAME_DRAW = 0.05


class Watcher(Protocol):
    """A protocol for objects that follow the progress of an evaluation."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Begin a stage of this many units; 0 if the number is not known."""

    def advance(self, amount: int) -> None:
        """Count units that are done."""


class InterruptedEvaluationError(Exception):
    """Ctrl-C interrupted the evaluation. The measurements are saved."""


def evaluate(
    settings: Settings,
    subject: Subject,
    identity: dict[str, Any],
    processes: Processes,
    watcher: Watcher,
    *,
    resume: bool,
    attacks_are_chosen: bool,
    on_begin: Callable[[], None] = lambda: None,
) -> None:
    """Evaluate one transform and write the results, together with all processes.

    Args:
        settings: settings of the evaluation. The folder must be free, or with ``resume`` hold the same evaluation
            (`sgfast.evaluation.report.check_continues`).
        subject: model and transform.
        identity: identity of the evaluation, from `sgfast.evaluation.report.identity_of`.
        processes: this process and the number of all processes.
        watcher: follows the progress.
        resume: go on from the state in the folder, if there is one.
        attacks_are_chosen: True makes an attack that cannot be run an error. False leaves it out and records the
            reason.
        on_begin: called by the first process when the data is checked, before any file is written.

    Raises:
        EvaluationError: the budget is too small, there is nothing to measure, an attack cannot be run, or earlier
            measurements had another seed.
        RecordError: a record that cannot be read or tokenized.
        InterruptedEvaluationError: Ctrl-C.
    """
    progress = Progress(settings.out)
    run = processes.gather(progress.read_run() if resume else None)[0]
    if run is None or run["identity"] != identity:  # of others there is nothing measured, or we would not be here
        found = survey(settings, subject, processes, watcher)
        run = {"identity": identity, "survey": found.to_json(), "attacks": {}, "device": subject.table.device.type}
        left_out = attacks_left_out(settings, subject, found, run, attacks_are_chosen)
        if processes.rank == 0:
            on_begin()
            progress.begin(run | {"left_out": left_out})
        processes.gather(None)
    found = Survey.from_json(run["survey"])
    budget_of(settings, subject).chunk_bytes(found.longest)
    run["left_out"] = attacks_left_out(settings, subject, found, run, attacks_are_chosen)
    check_seed(settings, subject, run, progress, processes)
    measure_file(settings, subject, found, progress, processes, watcher)
    processes.gather(None)
    if processes.rank == 0:
        attack_sample(settings, subject, found, run, progress, watcher)
        measurement = Measurement(settings, subject)
        for part in progress.parts():
            measurement.add(part.counts)
        write_results(settings, progress, run, measurement)
    processes.gather(None)


def survey(settings: Settings, subject: Subject, processes: Processes, watcher: Watcher) -> Survey:
    """Read and tokenize the whole file once, so that every fault of the file shows before the measurements.

    Raises:
        RecordError: a record that cannot be read or tokenized, on every process.
        EvaluationError: nothing to measure, or too small a budget for the longest record.
    """
    own, refused = Survey(), None
    watcher.begin("checking", 0, "records")
    try:
        for example in read_examples(
            settings,
            subject.tokenizer_wrapper,
            max_length_of(settings, subject),
            lambda index: index % processes.count == processes.rank,
        ):
            own.add(example, settings.seed, settings.attack_tokens)
            watcher.advance(1)
    except RecordError as error:
        refused = str(error)
    found = Survey()
    for part, refusal in processes.gather((own, refused)):
        if refusal is not None:
            raise RecordError(refusal)
        found.merge(part, settings.attack_tokens)
    check_survey(found, settings)
    budget_of(settings, subject).chunk_bytes(found.longest)
    return found


def attacks_left_out(
    settings: Settings, subject: Subject, found: Survey, run: dict[str, Any], attacks_are_chosen: bool
) -> dict[str, str]:
    """Return the attacks that cannot be run, and the reasons.

    Raises:
        EvaluationError: the user asked for an attack that cannot be run.
    """
    budget = budget_of(settings, subject)
    needs = {
        "learned": budget.inversion_needs(found.sampled_tokens),
        "known": budget.known_needs(RECORDS_READ, found.longest, subject.cache_bytes),
    }
    reasons = {}
    for name, needed in needs.items():
        if name not in settings.attacks or name in run["attacks"]:
            continue
        if name == "learned" and len(found.sample) < LEAST_TEXTS:
            count = len(found.sample)
            reasons[name] = f"it needs {LEAST_TEXTS} different texts; the data has {count} with transformed tokens"
        elif needed > settings.memory_budget:
            budgeted = readable_bytes(settings.memory_budget)
            reasons[name] = f"it needs {readable_bytes(needed)} of memory, --memory-budget is {budgeted}"
    if attacks_are_chosen and reasons:
        name, reason = next(iter(reasons.items()))
        raise EvaluationError(f"the attack {name} cannot be run: {reason}")
    return reasons


def check_seed(
    settings: Settings, subject: Subject, run: dict[str, Any], progress: Progress, processes: Processes
) -> None:
    """Check the seed of earlier measurements. No file holds the seed, so one record is measured again.

    Raises:
        EvaluationError: the record's figures differ; on every process.
    """
    before = None
    if processes.rank == 0 and run["device"] == subject.table.device.type:
        before = next((json.loads(line) for line in progress.sequences()), None)
    differs = False
    if before is not None:
        wrapper, longest = subject.tokenizer_wrapper, max_length_of(settings, subject)
        example = next(read_examples(settings, wrapper, longest, lambda index: index == before["index"]))
        measured = measure_example(settings, subject, budget_of(settings, subject), example)
        now = add_measured(settings, Measurement(settings, subject), example, measured)
        # Devices and budgets change the last digits. Another draw of the noise changes the first digits.
        pairs = [(value, before[name]) for name, value in now.items() if isinstance(value, float)]
        differs = not all(math.isclose(one, other or 0.0, rel_tol=_SAME_DRAW, abs_tol=1e-6) for one, other in pairs)
    if any(processes.gather(differs)):
        raise EvaluationError(
            f"--resume: {settings.out} was begun with another --seed; give that one (it is stored nowhere)"
        )


def measure_file(
    settings: Settings,
    subject: Subject,
    found: Survey,
    progress: Progress,
    processes: Processes,
    watcher: Watcher,
) -> None:
    """Measure this process's share of the records that no part in the folder covers, into a new part.

    The measurements are saved whatever ends the function.

    Raises:
        InterruptedEvaluationError: Ctrl-C, after the record that it interrupts.
    """
    before = [part.reached for part in progress.parts()]
    run = max(processes.gather(progress.next_run()))  # all have listed the folder before any of them writes
    watcher.begin("measuring", -(-found.tokens // processes.count), "tokens")
    watcher.advance(sum(reached.tokens for reached in before) // processes.count)
    measurement, budget = Measurement(settings, subject), budget_of(settings, subject)

    def wanted(index: int) -> bool:
        own = index % processes.count == processes.rank
        return own and not any(reached.covers(index) for reached in before)

    examples = read_examples(settings, subject.tokenizer_wrapper, max_length_of(settings, subject), wanted)
    writer = PartWriter(progress.folder, run, processes.rank, processes.count)
    saved = time.monotonic()
    with noting_interruption() as interrupted:
        try:
            for example in examples:
                measured = measure_example(settings, subject, budget, example)
                values = add_measured(settings, measurement, example, measured)
                writer.add(example.index, len(example.input_ids), values)
                watcher.advance(len(example.input_ids))
                if interrupted.is_set():
                    raise InterruptedEvaluationError
                if time.monotonic() - saved >= settings.save_seconds:
                    writer.save(measurement.counts())
                    saved = time.monotonic()
        except Exception:  # not a second Ctrl-C, which may come between the accumulators
            writer.save(measurement.counts())
            raise
        writer.save(measurement.counts())
        writer.close()


def attack_sample(
    settings: Settings, subject: Subject, found: Survey, run: dict[str, Any], progress: Progress, watcher: Watcher
) -> None:
    """Run the attacks on the sample that have no result yet. Each result is saved in the run's description."""
    attacks = SampleAttacks(settings, subject, found, budget_of(settings, subject), max_length_of(settings, subject))
    for name in settings.attacks:
        if name not in SAMPLE_ATTACKS or name in run["attacks"] or name in run["left_out"]:
            continue
        watcher.begin(f"attack: {name}", len(found.sample), "records")
        try:
            run["attacks"][name] = numbers(attacks.run(name, lambda: watcher.advance(1)))
        except RecordError:
            raise
        except ValueError as error:  # texts that turn out to be equal
            run["left_out"][name] = str(error)
        progress.update_run(run)
