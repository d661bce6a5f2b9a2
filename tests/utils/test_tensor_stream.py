"""Tensors written one by one: the library that owns the format reads them back."""

import tracemalloc
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sgfast.utils import tensor_stream
from sgfast.utils.tensor_stream import streamed_tensors

TENSORS = {
    'odd "name"\n\u00fc': torch.arange(3).bfloat16(),  # what follows is not aligned to its elements
    "int64": torch.tensor([[-1, 2**40]]),
    "empty": torch.ones(2, 0),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "bool": torch.tensor([True, False]),
    "half": torch.tensor([1.5], dtype=torch.float16),
    "strided": torch.arange(12.0).view(3, 4).T,
}


def test_round_trip(tmp_path):
    path = tmp_path / "tensors.safetensors"
    with streamed_tensors(path, {"format": "pt", "note": "ü"}) as stream:
        for name, tensor in TENSORS.items():
            stream.write(name, tensor)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ü"}
    save_file({"one": TENSORS["int64"]}, tmp_path / "theirs", metadata={"format": "pt"})
    with streamed_tensors(tmp_path / "ours", {"format": "pt"}) as stream:
        stream.write("one", TENSORS["int64"])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def write_two(path, name, tensor):
    with streamed_tensors(path, {}) as stream:
        stream.write("one", torch.ones(1))
        stream.write(name, tensor)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "tensors.safetensors"
    path.write_text("old")
    monkeypatch.setattr(tensor_stream, "_LARGEST_HEADER", 300)
    for name, tensor, message in (
        ("one", torch.ones(1), "the tensor 'one' is written already"),
        ("two", torch.ones(1, dtype=torch.complex64), r"a tensor of torch.complex64 cannot be written"),
        ("x" * 300, torch.ones(1), "too many tensors for one safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            write_two(path, name, tensor)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_memory_holds_one_tensor(tmp_path):
    written = []
    tracemalloc.start()
    with streamed_tensors(tmp_path / "tensors.safetensors", {}) as stream:
        for number in range(40):
            tensor = torch.full((1, 250_000), float(number))
            written.append(weakref.ref(tensor))
            stream.write(str(number), tensor)
        assert sum(tensor() is not None for tensor in written) == 1  # the last, still named here
    assert tracemalloc.get_traced_memory()[1] < 4_000_000  # of 40 MB; one copying buffer
    tracemalloc.stop()
