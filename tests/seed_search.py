"""Whether a folder's files tell a seed."""

import pickle
import struct
from pathlib import Path

import torch

# A seed of more than 32 bits, and one of fewer, as Trainer takes; no other number of a test looks like them.
SEED, SMALL_SEED = 7305498213, 3954782161


def assert_tells_no_seed(folder: Path, *seeds: int) -> None:
    """No file under a folder has a seed as text or as a number of 4 or 8 bytes, nor the state of a generator."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for seed in seeds:
            forms = {str(seed).encode(), f"{seed:x}".encode()}
            for order in "<>":
                forms.add(struct.pack(order + "Q", seed))
                if seed < 2**32:
                    forms.add(struct.pack(order + "I", seed))
            for form in forms:
                assert form not in content, f"{path} tells the seed as {form!r}"
        assert "rng" not in path.name, path
        for value in _loaded(path):
            _assert_no_generator(value, path)


def _loaded(path: Path) -> list[object]:
    if path.suffix not in (".bin", ".pt", ".pth"):
        return []
    return [torch.load(path, weights_only=False)]


def _assert_no_generator(value: object, path: Path) -> None:
    """torch's CPU generator is 5056 bytes, NumPy's 624 words of 32 bits, Python's a tuple of 625 numbers."""
    if isinstance(value, dict):
        for one in value.values():
            _assert_no_generator(one, path)
    elif isinstance(value, list | tuple):
        assert len(value) != 625, path
        for one in value:
            _assert_no_generator(one, path)
    elif isinstance(value, torch.Tensor):
        assert value.dtype is not torch.uint8, path
    elif not isinstance(value, str | bytes | int | float | None):
        assert b"MT19937" not in pickle.dumps(value), path
