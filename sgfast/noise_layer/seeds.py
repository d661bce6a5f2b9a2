"""Seeds of noise: every process, device and forward has its own seed, and a recomputation repeats its forward's seed.

Both operators are opaque to torch.compile. A graph therefore reads the rank, the fork and the backward when it runs,
not when it was traced.
"""

import multiprocessing
import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgfast.ops.noise.philox import as_int64
from sgfast.ops.operator import define

# The number of draws that are remembered until their backward: more than any step makes, and about 2 MB.
REMEMBERED_DRAWS = 2**14


def mix_seed(*words: int) -> int:
    """Fold integers into one 64-bit seed (SplitMix64 steps, Steele et al. 2014): close inputs give unrelated seeds."""
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state


def fold_in(seed: int, count: Tensor) -> Tensor:
    """Fold an int64 tensor into a seed as `mix_seed` folds a word, on the tensor's device."""

    def shifted(words: Tensor, bits: int) -> Tensor:  # a logical shift: zeros come in from the left
        return words.bitwise_right_shift(bits).bitwise_and(2 ** (64 - bits) - 1)

    # Products of int64 wrap as products of 64-bit words do.
    words = count + as_int64((seed + 0x9E3779B97F4A7C15) % 2**64)
    words = (words ^ shifted(words, 30)) * as_int64(0xBF58476D1CE4E5B9)
    words = (words ^ shifted(words, 27)) * as_int64(0x94D049BB133111EB)
    mixed: Tensor = words ^ shifted(words, 31)
    return mixed


def drawn_seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's generator of a device, on the device: (1,) int64.

    The seed repeats with the generator's state (``torch.manual_seed``, a restored state). Different ranks, forks and
    devices never draw the same seed, whatever state their generators have.

    Raises:
        RuntimeError: the draw belongs to a recomputation in backward, and the generator's state is not the forward's.
    """
    # Two equal calls in one graph are two draws: torch.compile merges equal calls, but never an empty tensor.
    seed: Tensor = _draw_seed(_SeedDraw(torch.empty(1, dtype=torch.int64, device=device)))
    return seed


def counted_seed(seed: int, forward_count: Tensor, device: torch.device) -> Tensor:
    """Count one forward, and return the seed that belongs to it and to this process: () int64 on the device.

    Raises:
        RuntimeError: the forward is a recomputation in backward, and the count has moved on.
    """
    like = torch.empty(0, dtype=torch.int64, device=device)
    counted: Tensor = _count_forward(_ForwardCount(forward_count, as_int64(seed), like))
    return counted


def process_word(device: torch.device) -> int:
    """A number that differs between places that must not share noise: ranks, child processes and devices.

    The number is 0 in a process that is alone. The device's index is part of the number because ``torch.manual_seed``
    gives all devices one state.
    """
    rank, child, index = process_rank() or 0, _children.word(), device.index or 0
    return mix_seed(rank, child, index) if child or index else rank


def process_rank() -> int | None:
    """The rank in the process group or, before a group exists, the rank that a launcher put into the environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else None


class _Children:
    """Numbers the processes that a program starts. The numbers repeat when the program is run again."""

    def __init__(self) -> None:
        self._fork = 0
        self._forks = 0
        in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._inherited_rank = None if in_group else process_rank()  # only the rank of the environment is inherited
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before_fork, after_in_child=self._after_fork)

    def word(self) -> int:
        """0 in a first process, and in a process that was given a rank of its own since its start."""
        numbers = self._fork, *multiprocessing.current_process()._identity
        return mix_seed(*numbers) if any(numbers) and process_rank() == self._inherited_rank else 0

    def _before_fork(self) -> None:
        self._forks += 1

    def _after_fork(self) -> None:
        self._fork = mix_seed(self._fork, self._forks)
        self._inherited_rank = process_rank()
        _draws.unlock()


class _Draws:
    """The last draws of forwards, each known by the generator's state before it."""

    def __init__(self) -> None:
        self._states: dict[Any, None] = {}
        self.unlock()

    def unlock(self) -> None:
        """Give a forked process a lock that no thread of its parent holds."""
        self.lock = threading.Lock()

    def remember(self, state: Any) -> None:
        """Keep a forward's state. A state that comes again shows that the generator was set back.

        The state's first entry and all later entries are then dropped.
        """
        if state in self._states:
            states = list(self._states)
            for later in states[states.index(state) :]:
                del self._states[later]
        self._states[state] = None
        if len(self._states) > REMEMBERED_DRAWS:
            del self._states[next(iter(self._states))]

    def __contains__(self, state: Any) -> bool:
        return state in self._states


_draws = _Draws()
_children = _Children()


class _SeedDraw(NamedTuple):
    """The argument of ``sgfast::draw_seed``: an empty seed, on the device to draw on."""

    like: Tensor


@define("draw_seed", _SeedDraw, tags=(torch.Tag.nondeterministic_seeded,))
def _draw_seed(arguments: _SeedDraw) -> Tensor:
    """Draw a seed, (1,)."""
    like = arguments.like
    with _draws.lock:
        state: Any = _generator_state(like.device)
        # The seed is drawn on the device, so that nothing waits for the device.
        drawn = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)
        if not _is_capturing(like.device):
            # The state of a CPU's generator has 5 kB. The drawn number identifies the state as well.
            state = drawn.item() if state is None else state
            if not _in_backward():
                _draws.remember(state)
            elif state not in _draws:
                raise RuntimeError(
                    "a noise layer without a seed is recomputed in backward, and would draw other noise than in its "
                    "forward: the random state was not restored. Under torch.utils.checkpoint leave "
                    "preserve_rng_state=True; under an activation_memory_budget of torch.compile, or elsewhere, draw "
                    "a seed outside what is recomputed and pass it to the layer's forward, seed="
                )
    word = process_word(like.device)
    return drawn.bitwise_xor_(as_int64(mix_seed(word))) if word else drawn


@_draw_seed.register_fake
def _(arguments: _SeedDraw) -> Tensor:
    return torch.empty_like(arguments.like)


class _ForwardCount(NamedTuple):
    """The arguments of ``sgfast::count_forward``, which counts in place; ``like`` lies where the seed is wanted."""

    forward_count: Tensor
    seed: int
    like: Tensor


@define("count_forward", _ForwardCount, mutates_args=("forward_count",))
def _count_forward(arguments: _ForwardCount) -> Tensor:
    """Count a forward and return its seed, ()."""
    forward_count, seed, like = arguments
    if _in_backward():
        raise RuntimeError(
            "a noise layer with a fixed seed cannot be recomputed under activation checkpointing: it would draw "
            "other noise. Pass seed= to its forward, or build it with seed=None"
        )
    with _draws.lock:  # without the lock two threads may count one forward
        count = forward_count.add_(1).to(like.device, copy=True)
    return fold_in(mix_seed(seed % 2**64, process_word(like.device)), count)


@_count_forward.register_fake
def _(arguments: _ForwardCount) -> Tensor:
    return torch.empty_like(arguments.forward_count, device=arguments.like.device)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_capturing(device: torch.device) -> bool:
    # The warm-up of a graph has run the same draw outside of the graph. Inside a graph the generator does not tell its
    # state.
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _generator_state(device: torch.device) -> tuple[str, int, int, int] | None:
    """Seed and position of an accelerator's generator, read without waiting for the device; None if it has none."""
    if device.type not in ("cuda", "xpu") or _is_capturing(device):
        return None
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    generator = torch.get_device_module(device).default_generators[index]
    return device.type, index, generator.initial_seed(), generator.get_offset()
