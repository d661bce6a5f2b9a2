"""Time and memory of the presets beside TextBrewer's own losses: forward and backward to both sides.

    python -m benchmarks.bench_presets [--device cuda] [--dtype bfloat16] [--scale 1]

``kept`` is what autograd holds between forward and backward besides the inputs; ``peak`` (on a GPU) what is allocated
at most besides inputs and gradients. Times are medians. TextBrewer computes in the inputs' dtype, sgfast in float32.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP
from tests.loss.presets import real

REPEATS = 5


class Row(NamedTuple):
    """One loss, ours or TextBrewer's."""

    milliseconds: float
    kept: int
    peak: int | None


def kept_bytes(loss: Callable[..., Tensor], *sides: Any) -> int:
    """Bytes that autograd keeps for backward, the inputs apart."""
    flat = [one for side in sides for one in (side if isinstance(side, list) else [side])]
    inputs = {one.untyped_storage().data_ptr() for one in flat}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(*sides)  # noqa: F841  # while it lives, so does what it keeps
    return sum(kept.values())


def measure(loss: Callable[..., Tensor], *sides: Any) -> Row:
    """Run forward and backward a few times."""
    flat = [one for side in sides for one in (side if isinstance(side, list) else [side])]
    on_gpu = flat[0].is_cuda
    times, peak = [], None
    for _ in range(REPEATS + 1):
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        gradients = torch.autograd.grad(loss(*sides), flat, allow_unused=True)
        if on_gpu:
            torch.cuda.synchronize()
            own = sum(one.nbytes for one in gradients if one is not None)
            peak = torch.cuda.max_memory_allocated() - before - own
        times.append(time.perf_counter() - started)
        del gradients
    return Row(1e3 * median(times[1:]), kept_bytes(loss, *sides), peak)


def cases(
    device: str, dtype: torch.dtype, scale: int
) -> list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], Any, Any]]:
    """Name, our loss, TextBrewer's, student and teacher."""
    batch, heads, length, width, classes = 2 * scale, 8, 512, 768, 32000
    mask = torch.ones(batch, length, device=device)
    mask[0, length * 3 // 4 :] = 0

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype).requires_grad_()

    found = []
    for name in ("ce", "mse"):
        sides = (draw(batch, length // 2, classes), draw(batch, length // 2, classes))
        found.append((f"kd {name}", KD_LOSS_MAP[name], real.KD_LOSS_MAP[name], *sides))
    for name in MATCH_LOSS_MAP:
        if name in ("gram", "mmd"):
            continue
        for masked in (False, True) if name != "pkd" else (False,):
            shape = (batch, heads, length, length) if name.startswith("attention") else (batch, length, width)
            pair = name in ("fsp", "nst")
            sides = [[draw(*shape), draw(*shape)] if pair else draw(*shape) for _ in range(2)]
            given = mask if masked else None

            def with_mask(loss: Callable[..., Tensor], given: Tensor | None = given) -> Callable[..., Tensor]:
                return lambda student, teacher: loss(student, teacher, given)

            label = f"{name}{', mask' if masked else ''}"
            found.append((label, with_mask(MATCH_LOSS_MAP[name]), with_mask(real.match_loss(name)), *sides))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time and memory of the presets beside TextBrewer's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--scale", type=int, default=1, help="multiplies the batch of 2")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    on_gpu = arguments.device != "cpu"
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, {arguments.dtype}, batch {2 * arguments.scale}\n")
    heading = ["loss", "sgfast ms", "TextBrewer ms", "sgfast kept KiB", "TextBrewer kept KiB"]
    heading += ["sgfast peak MiB", "TextBrewer peak MiB"] if on_gpu else []
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for name, ours, theirs, student, teacher in cases(
        arguments.device, getattr(torch, arguments.dtype), arguments.scale
    ):
        rows = [measure(loss, student, teacher) for loss in (ours, theirs)]
        cells = [name, *(f"{row.milliseconds:.1f}" for row in rows), *(f"{row.kept / 2**10:.0f}" for row in rows)]
        cells += [f"{row.peak / 2**20:.0f}" for row in rows if row.peak is not None]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
