"""Devices by name, on machines with and without GPUs."""

import pytest
import torch

from sgfast.utils.devices import check_device_name, find_device


@pytest.fixture
def machine(monkeypatch):
    """Pretend a number of CUDA GPUs, and the processes of torchrun."""

    def pretend(gpus: int, rank: int | None = None, processes: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(processes))

    return pretend


def test_without_a_gpu(machine):
    machine(0)
    assert find_device() == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:1"):
        with pytest.raises(ValueError, match=rf"^--device {name}: PyTorch finds no CUDA GPU here$"):
            find_device(name)
    with pytest.raises(ValueError, match=r"^device mps: PyTorch finds no Apple GPU here$"):
        find_device("mps", "device")


def test_with_gpus(machine):
    machine(2)
    assert find_device() == find_device("cuda") == find_device("cuda:0") == torch.device("cuda:0")
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"^--device cuda:2: PyTorch finds cuda:0 to cuda:1 here$"):
        find_device("cuda:2")
    machine(1)
    with pytest.raises(ValueError, match=r"^--device cuda:1: PyTorch finds only cuda:0 here$"):
        find_device("cuda:1")


def test_among_processes(machine):
    machine(2, rank=3, processes=4)
    assert find_device() == find_device("cuda") == torch.device("cuda:1")
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="each of several processes takes its own GPU; give cuda"):
        find_device("cuda:0")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:1.5", "cuda:" + "9" * 400, "CUDA", "cuda:²"])
def test_names_of_no_device(name):
    with pytest.raises(ValueError, match=r"^it must be auto, cpu, cuda, cuda:N or mps; got ") as raised:
        check_device_name(name, "it")
    assert len(str(raised.value)) < 250
    assert ("Did you mean 'cuda'?" in str(raised.value)) == (name in ("CUDA", "cuda:", "cuda:-1", "cuda:1.5", "cuda:²"))
