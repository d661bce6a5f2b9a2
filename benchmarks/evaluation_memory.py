"""Memory of ``sgfast evaluate`` beyond the loaded model and one pass through its body, and its speed, on a CPU.

    python -m benchmarks.evaluation_memory                       # writes benchmarks/results/evaluation-cpu.md
    python -m benchmarks.evaluation_memory --budget 256MiB       # one measurement, as a line of JSON

Each measurement is a process of its own. The process loads the packaged SmolLM2-135M and an untrained transform, runs
the body once on one sequence, and then evaluates texts of 2048 tokens under a budget. Peaks are those of the process
(VmHWM). The text is Python's documentation. Linux only.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.metrics_memory import MIB, resident_mib
from sgfast.demo.text import read_text
from sgfast.evaluation.processes import Processes
from sgfast.evaluation.report import identity_of
from sgfast.evaluation.run import evaluate
from sgfast.evaluation.settings import ATTACKS, Settings, parse_attacks, parse_bytes
from sgfast.evaluation.subject import load_model, load_subject
from sgfast.huggingface.assets import load_causal_lm
from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.training.building import models_over
from sgfast.utils.files import replacing

RESULTS = Path(__file__).parent / "results" / "evaluation-cpu.md"
LENGTH, RECORDS, WORDS = 2048, 2, 1600
WITHOUT_LEARNED = ",".join(name for name in ATTACKS if name != "learned")
BUDGETS = ("64MiB", "256MiB", "1GiB")


class Silent:
    """A progress display that shows nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int) -> None: ...


def peak_anew() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def write_inputs(folder: Path, records: int) -> None:
    """Write an untrained transform, and texts that are cut at `LENGTH` tokens."""
    model, tokenizer = load_causal_lm(None)
    wrapper = TokenizerWrapper(tokenizer, type(model))
    torch.manual_seed(0)
    models_over(model, wrapper, {}).client.save_pretrained(folder / "transform.safetensors")
    words = read_text(None).split()
    texts = [" ".join(words[WORDS * number : WORDS * (number + 1)]) for number in range(records)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")


def measure(folder: Path, budget: str, attacks: str) -> dict[str, object]:
    settings = Settings(
        model=None,
        transform=folder / "transform.safetensors",
        data=folder / "data.jsonl",
        out=folder / "out",
        attacks=parse_attacks(attacks),
        memory_budget=parse_bytes(budget),
        text_as="plain",
        max_length=LENGTH,
        attack_tokens=1024,
    )
    model = load_model(settings, torch.device("cpu"))
    subject = load_subject(model, settings)
    gc.collect()
    loaded = resident_mib("VmRSS")
    peak_anew()
    subject.final_hidden(subject.embed(torch.arange(LENGTH)))
    body = resident_mib("VmHWM")
    peak_anew()
    start = time.perf_counter()
    identity = identity_of(settings)
    evaluate(settings, subject, identity, Processes(), Silent(), resume=False, attacks_are_chosen=True)
    seconds = time.perf_counter() - start
    tokens = json.loads((settings.out / "metrics.json").read_text())["data"]["tokens"]
    peak = resident_mib("VmHWM")
    return {
        "budget_mib": parse_bytes(budget) / MIB,
        "beyond_body_mib": round(peak - body, 1),
        "beyond_model_mib": round(peak - loaded, 1),
        "body_mib": round(body - loaded, 1),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "attacks": attacks,
    }


def report(lines: list[dict[str, object]]) -> str:
    rows = [
        f"| {line['budget_mib']:.0f} | {line['beyond_body_mib']} | {line['body_mib']} | {line['beyond_model_mib']} | "
        f"{line['tokens_per_second']} |"
        for line in lines
    ]
    return f"""# Memory of `sgfast evaluate`

`python -m benchmarks.evaluation_memory`: SmolLM2-135M (49152 x 576) in float32 and an untrained transform,
{lines[0]["tokens"]} tokens in sequences of {LENGTH}, all attacks but the learned one. The budget asked for; the
process's peak beyond the loaded model and one pass through its body; what that pass took; the peak beyond the loaded
model alone. The logits of one sequence, both sides, would take {2 * LENGTH * 49152 * 4 // MIB} MiB. Rates
compare within this table alone.

CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}

| budget MiB | peak beyond both MiB | body pass MiB | peak beyond model MiB | tokens a second |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget")
    parser.add_argument("--attacks", default=WITHOUT_LEARNED)
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--inputs", type=Path, help="a folder with transform.safetensors and data.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.inputs or Path(name)
        if arguments.inputs is None:
            write_inputs(folder, arguments.records)
        if arguments.budget is not None and arguments.inputs is not None:
            print(json.dumps(measure(folder, arguments.budget, arguments.attacks)), flush=True)
            return
        budgets = BUDGETS if arguments.budget is None else (arguments.budget,)
        lines = []
        for budget in budgets:
            # Each measurement has its own process. Memory that one measurement leaves would count for the next
            # measurement.
            command = [sys.executable, "-m", "benchmarks.evaluation_memory", "--inputs", name, "--budget", budget]
            command += ["--attacks", arguments.attacks]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(finished.stdout.strip(), flush=True)
            lines.append(json.loads(finished.stdout))
            for path in (folder / "out").glob("*"):
                path.unlink()
        if arguments.budget is None:
            with replacing(RESULTS) as temporary:
                temporary.write_text(report(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
