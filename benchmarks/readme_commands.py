"""The output and the times of the README's commands.

    python -m benchmarks.readme_commands [--output benchmarks/results/readme-cpu.md]

The run takes about ten minutes. Use a machine that runs nothing else.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sgfast.benchmarking.environment import environment, statement
from sgfast.utils.files import check_output_file, replacing

PYTHON = sys.executable
SGFAST = str(Path(PYTHON).with_name("sgfast"))
DEMO = "sgfast demo"
COMMANDS = {
    DEMO: [SGFAST, "demo", "--out", "demo"],
    "sgfast bench divergences": [SGFAST, "bench", "divergences", "--out", "bench"],
    "sgfast voronoi": [SGFAST, "voronoi"],
    "python -m sgfast.examples.distillation": [PYTHON, "-m", "sgfast.examples.distillation"],
    "python -m sgfast.examples.presets": [PYTHON, "-m", "sgfast.examples.presets"],
    "python -m sgfast.examples.vision": [PYTHON, "-m", "sgfast.examples.vision", "--out", "vision"],
}
HEADING = """# What the README's commands show and how long they take

`python -m benchmarks.readme_commands`, with everything installed: `make demo` is `sgfast demo` after the installation.
{statement}
"""


def seconds_of(command: list[str], folder: Path) -> float:
    """Return the seconds of a command in a folder. Raise if the command fails."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Run every command in an empty folder, print both tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    output = parser.parse_args().output
    if output:
        check_output_file(output)
    lines = [HEADING.format(statement=statement(environment("cpu"))), "| command | seconds |", "|---|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, command in COMMANDS.items():
            lines.append(f"| `{name}` | {seconds_of(command, Path(folder)):.0f} |")
        metrics = json.loads((Path(folder) / "demo" / "metrics.json").read_text())
    lines += ["", f"`{DEMO}`, its metrics.json:", "", "| metric | untrained | trained |", "|---|---:|---:|"]
    lines += [f"| {name} | {metrics['before'][name]:.4g} | {after:.4g} |" for name, after in metrics["after"].items()]
    text = "\n".join([*lines, ""])
    print(text)
    if output:
        with replacing(output) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
