"""A process that runs cases one by one, and says of each what became of it and what it took."""

import os
import random
import resource
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 2**30
SECONDS = 2.0
KINDS = ("mutated", "forged", "yaml", "jsonl", "command")


def work(connection: Connection, folder: Path, seed: int) -> None:
    """Answer (kind, number) by (what became of it, processor seconds, bytes beyond the process's own, its input)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    silenced = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silenced, 1)
    os.dup2(silenced, 2)
    run = _prepared(folder, seed)
    # What goes far beyond the bound must end this process, not the machine.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY, size + 4 * MEMORY))
    connection.send("ready")
    while (case := connection.recv()) is not None:
        before, begun = _peak(), time.process_time()
        try:
            outcome, finding = run(*case), False
        except BaseException as error:
            outcome, finding = "".join(traceback.format_exception(error))[-1500:], True
        seconds, memory = time.process_time() - begun, _peak() - before
        connection.send((outcome, finding, seconds, memory))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _prepared(folder: Path, seed: int) -> Any:
    import transformers

    from tests.client.forged_client import write_good_file
    from tests.fuzz import client_cases, command_cases
    from tests.tiny_models import tiny_causal_lm
    from tests.tiny_tokenizer import tiny_tokenizer

    transformers.logging.set_verbosity_error()
    model, good = folder / "model", folder / "good.safetensors"
    if not good.exists():
        tokenizer = tiny_tokenizer()
        # The good file's own, with room for the documented settings.
        base_model, _, _ = tiny_causal_lm("llama", vocab_size=300, max_position_embeddings=256)
        base_model.save_pretrained(model)
        tokenizer.save_pretrained(model)
        write_good_file(good)
    files = command_cases.Files(folder, good, model)
    command_cases.leave_out_long_work()
    client_cases.load_and_call(good)
    command_cases.run_command(["voronoi", "--model", str(model)])

    def run(kind: str, number: int) -> str:
        generator = random.Random(f"{seed} {kind} {number}")
        path = folder / f"case-{kind}"
        if kind in ("mutated", "forged"):
            getattr(client_cases, kind)(good, path, generator)
            return client_cases.load_and_call(path)
        if kind == "yaml":
            return command_cases.run_command(files.settings_arguments(generator, path.with_suffix(".yaml")))
        if kind == "jsonl":
            return command_cases.run_command(files.records_arguments(generator, path.with_suffix(".jsonl")))
        return command_cases.run_command(files.arguments(generator))

    return run
