"""Look for input that ends in anything but success, or one line: ``python -m tests.fuzz``."""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fuzz.worker import KINDS, MEMORY, SECONDS, work

# How long the parent waits before it says that a case has no end.
_PATIENCE = 15.0


class Findings:
    """What became of the cases so far."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.findings: list[tuple[str, int, str]] = []
        self.slowest: dict[str, float] = defaultdict(float)

    def add(self, kind: str, number: int, answer: tuple[str, bool, float, int] | str) -> None:
        if isinstance(answer, str):
            self._found(kind, number, answer)
            return
        outcome, finding, seconds, memory = answer
        self.slowest[kind] = max(self.slowest[kind], seconds)
        if finding:
            self._found(kind, number, outcome)
        elif seconds > SECONDS:
            self._found(kind, number, f"{seconds:.1f} s of processor time; {outcome}")
        elif memory > MEMORY:
            self._found(kind, number, f"{memory / 2**20:.0f} MiB more memory; {outcome}")
        else:
            self.outcomes[kind][outcome] += 1

    def _found(self, kind: str, number: int, what: str) -> None:
        self.outcomes[kind]["FINDING"] += 1
        self.findings.append((kind, number, what))


def fuzz(cases: Iterator[tuple[str, int]], folder: Path, seed: int, seconds: float) -> Findings:
    """Run cases in a process of their own, a new one after each that ends it or does not end."""
    context = multiprocessing.get_context("spawn")
    found, process, ends = Findings(), None, time.monotonic() + seconds
    for kind, number in cases:
        if time.monotonic() > ends:
            break
        if process is None:
            connection, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, folder, seed), daemon=True)
            process.start()
            theirs.close()
            connection.recv()
        connection.send((kind, number))
        try:
            answer: Any = connection.recv() if connection.poll(_PATIENCE) else f"no end within {_PATIENCE:.0f} s"
        except EOFError:
            process.join()
            answer = f"the process ended with {process.exitcode}"
        found.add(kind, number, answer)
        if isinstance(answer, str) or answer[3] > MEMORY:
            process.kill()
            process.join()
            process = None
    if process is not None:
        process.kill()
        process.join()
    return found


def _cases(count: int, kinds: list[str], first: int) -> Iterator[tuple[str, int]]:
    """Of each kind, so that the first ones have some of all: client files most, since they are quickest."""
    shares = {"mutated": 50, "forged": 10, "yaml": 5, "jsonl": 5, "command": 10}
    turns = [kind for kind, share in shares.items() if kind in kinds for _ in range(share)]
    numbers = Counter(dict.fromkeys(kinds, first))
    for turn in range(count):
        # Shares taken by steps through the list, which has no factor in common with its length.
        kind = turns[turn * 37 % len(turns)]
        yield kind, numbers[kind]
        numbers[kind] += 1


def main() -> None:
    """Print what became of the cases and each finding; exit code 1 if there is one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop after so long")
    parser.add_argument("--count", type=int, default=10**9, help="stop after so many cases")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind, to repeat one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to try")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cases = _cases(arguments.count, arguments.kinds, arguments.first)
        found = fuzz(cases, Path(folder), arguments.seed, arguments.seconds)
    for kind, outcomes in found.outcomes.items():
        listed = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
        print(f"{kind}: {sum(outcomes.values())} cases ({listed}); slowest {found.slowest[kind]:.2f} s")
    for kind, number, what in found.findings:
        print(f"\n{kind} {number} (--seed {arguments.seed} --kinds {kind} --first {number} --count 1):\n{what}")
    print(f"\n{len(found.findings)} findings in {time.monotonic() - begun:.0f} s, seed {arguments.seed}")
    sys.exit(1 if found.findings else 0)


if __name__ == "__main__":
    main()
