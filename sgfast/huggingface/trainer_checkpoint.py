"""Checkpoints of what a transform's training changes: the noise layer and, of a student, its adapters.

A checkpoint is written to a folder of another name and renamed when all of it is on the disk, so that one that can be
found is whole.
"""

import copy
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sgfast.model.adapters import adapter_layers
from sgfast.utils.files import replacing, synchronize
from sgfast.utils.tensor_stream import write_tensors

NOISE_LAYER_FILE = "noise_layer.safetensors"
STAGING_FOLDER = ".incomplete"
_ADAPTER_FILE, _ADAPTER_CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
_STATE_FILE = "trainer_state.json"


class Trained(NamedTuple):
    """What training changes, by the names of the noise layer's state_dict and of PEFT's."""

    noise_layer: dict[str, Tensor]
    adapters: dict[str, Tensor]


def trained_state(model: Any) -> Trained:
    """What `save_trained` writes. Of a sharded model it is gathered: every process must call this.

    Args:
        model: a noisy language model.
    """
    noise_layer, adapters = (
        {name: _whole(tensor) for name, tensor in state.items()}
        for state in (_state_of(model.noise_layer), _adapters_of(model))
    )
    return Trained(noise_layer, adapters)


def save_trained(model: Any, trained: Trained, folder: Path) -> None:
    """Write a noisy model's noise layer and the adapters that it runs, nothing of the base model.

    Args:
        model: a noisy language model.
        trained: its `trained_state`.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(trained.noise_layer, folder / NOISE_LAYER_FILE)
    if runs_adapters(model):
        save_adapters(model, trained, folder)


def save_adapters(model: Any, trained: Trained, folder: Path) -> None:
    """Write a student's adapters and their configuration, as PEFT reads them; each file is whole or not there.

    Args:
        model: a noisy language model that runs adapters.
        trained: its `trained_state`.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(trained.adapters, folder / _ADAPTER_FILE)
    config = copy.copy(model.base_model.active_peft_config)
    config.inference_mode = True  # as PEFT writes it
    for name, value in vars(config).items():
        if isinstance(value, set):  # its order differs between processes
            setattr(config, name, sorted(value))
    with tempfile.TemporaryDirectory() as elsewhere, replacing(folder / _ADAPTER_CONFIG_FILE) as temporary:
        config.save_pretrained(elsewhere)
        shutil.copyfile(Path(elsewhere) / _ADAPTER_CONFIG_FILE, temporary)


def load_trained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Read what `save_trained` has written into a model of the same architecture.

    Raises:
        ValueError: the folder does not hold it, it is damaged, or it is of another architecture.
    """
    path = Path(folder) / NOISE_LAYER_FILE
    model.noise_layer.load_state_dict(_placed(read_tensors(path), _state_of(model.noise_layer), path))
    if runs_adapters(model):
        import peft

        path = Path(folder) / _ADAPTER_FILE
        state = _placed(read_tensors(path), _adapters_of(model), path)
        peft.set_peft_model_state_dict(model.base_model, state, adapter_name=model.base_model.active_adapter)


def _state_of(noise_layer: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = noise_layer.state_dict()
    return state


def _adapters_of(model: Any) -> dict[str, Tensor]:
    """The active adapter's parameters by PEFT's names for them; none of a model without."""
    if not runs_adapters(model):
        return {}
    import peft

    # Embedding tables belong to the base; PEFT would ask the hub whether they were resized.
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model.base_model, adapter_name=model.base_model.active_adapter, save_embedding_layers=False
    )
    return state


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.contiguous()


def _placed(values: dict[str, Tensor], present: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Check that a file's values are those of what is there now, and shard them likewise."""
    expected, found = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (present, values))
    if found != expected:
        different = sorted({name for name, _ in found.items() ^ expected.items()})
        raise ValueError(f"{path} is of another architecture than the model: it differs in {', '.join(different[:5])}")
    return {
        name: distribute_tensor(values[name].to(now.device), now.device_mesh, now.placements)
        if isinstance(now, DTensor)
        else values[name]
        for name, now in present.items()
    }


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt"})


def runs_adapters(model: Any) -> bool:
    """Whether a noisy model is a student: over a PEFT model, run with its adapters."""
    return bool(model._runs_adapters) and bool(adapter_layers(model.base_model))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    import safetensors.torch

    if not path.is_file():
        raise ValueError(f"{path.parent} is no checkpoint of this trainer: it has no {path.name}")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def publish(staged: Path, final: Path) -> None:
    """Put a written folder under its name, when everything in it has reached the disk."""
    for path in [*staged.rglob("*"), staged]:
        synchronize(path)
    if final.exists():  # a step that was saved before, by a run that went on from an earlier one
        discard(final)
    staged.rename(final)
    staged.parent.rmdir()
    synchronize(final.parent)


def sweep(folder: Path) -> None:
    """Delete what a killed run has left half-written or half-deleted."""
    for leftover in folder.glob(f"{STAGING_FOLDER}*"):
        shutil.rmtree(leftover)


def discard(folder: Path) -> None:
    """Delete a checkpoint so that no half of it can be taken for one."""
    doomed = folder.parent / f"{STAGING_FOLDER}-{folder.name}"
    folder.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints in a run's folder, the oldest step first."""
    if not os.path.isdir(folder):
        return []
    numbered = [
        (int(match.group(1)), path)
        for path in Path(folder).iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and is_whole(path)
    ]
    return [path for _, path in sorted(numbered)]


def is_whole(folder: Path) -> bool:
    """Whether a folder has what a training is resumed from."""
    return all((folder / name).is_file() for name in (NOISE_LAYER_FILE, _STATE_FILE))


def discard_oldest(folder: Path, limit: int | None, best: str | None) -> None:
    """Keep ``limit`` checkpoints, the newest and the best among them; all of them for None."""
    if not limit or limit < 1:
        return
    found = checkpoints(folder)
    kept = {found[-1]} if found else set()
    kept |= {path for path in found if best is not None and path.resolve() == Path(best).resolve()}
    surplus = [path for path in found if path not in kept]
    for path in surplus[: max(0, len(found) - max(limit, len(kept)))]:
        discard(path)
