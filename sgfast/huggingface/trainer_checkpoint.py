"""Checkpoints of the parameters that a transform's training changes: the noise layer and a student's adapters.

A checkpoint is written to a folder with a temporary name. The folder is renamed when everything is on the disk, so a
folder with the name of a checkpoint is always whole.
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
    """Trained parameters, under the names of the noise layer's state_dict and of PEFT's state_dict."""

    noise_layer: dict[str, Tensor]
    adapters: dict[str, Tensor]


def trained_state(model: Any) -> Trained:
    """Return the parameters that `save_trained` writes.

    The parameters of a sharded model are gathered, so every process must call this function.

    Args:
        model: a noisy language model.
    """
    noise_layer, adapters = (
        {name: _whole(tensor) for name, tensor in state.items()}
        for state in (_state_of(model.noise_layer), _adapters_of(model))
    )
    return Trained(noise_layer, adapters)


def save_trained(model: Any, trained: Trained, folder: Path) -> None:
    """Write the noise layer of a noisy model and the adapters that the model runs, but not the base model.

    Args:
        model: a noisy language model.
        trained: the model's `trained_state`.
        folder: the folder to write to; it is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(trained.noise_layer, folder / NOISE_LAYER_FILE)
    if runs_adapters(model):
        save_adapters(model, trained, folder)


def save_adapters(model: Any, trained: Trained, folder: Path) -> None:
    """Write a student's adapters and their configuration in PEFT's format. Each file is written whole or not at all.

    Args:
        model: a noisy language model that runs adapters.
        trained: the model's `trained_state`.
        folder: the folder to write to; it is made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(trained.adapters, folder / _ADAPTER_FILE)
    config = copy.copy(model.base_model.active_peft_config)
    config.inference_mode = True  # PEFT writes this value
    for name, value in vars(config).items():
        if isinstance(value, set):  # the order of a set differs between processes
            setattr(config, name, sorted(value))
    with tempfile.TemporaryDirectory() as elsewhere, replacing(folder / _ADAPTER_CONFIG_FILE) as temporary:
        config.save_pretrained(elsewhere)
        shutil.copyfile(Path(elsewhere) / _ADAPTER_CONFIG_FILE, temporary)


def load_trained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Read the files of `save_trained` into a model of the same architecture.

    Raises:
        ValueError: a file is missing, damaged, or from a model of another architecture.
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
    """Return the active adapter's parameters under PEFT's names. A model that runs no adapters gives none."""
    if not runs_adapters(model):
        return {}
    import peft

    # Embedding tables belong to the base model. By default, PEFT asks the hub whether the tables were resized.
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model.base_model, adapter_name=model.base_model.active_adapter, save_embedding_layers=False
    )
    return state


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.contiguous()


def _placed(values: dict[str, Tensor], present: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Check that a file's tensors have the names and shapes of the present ones, and shard them in the same way."""
    expected, found = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (present, values))
    if found != expected:
        different = sorted({name for name, _ in found.items() ^ expected.items()})
        raise ValueError(f"{path} has another architecture than the model: they differ in {', '.join(different[:5])}")
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
    """Return whether a noisy model is a student: its base model is a PEFT model that runs with adapters."""
    return bool(model._runs_adapters) and bool(adapter_layers(model.base_model))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file to the CPU."""
    import safetensors.torch

    if not path.is_file():
        raise ValueError(f"{path.parent} is no checkpoint of this trainer: it has no {path.name}")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return tensors


def publish(staged: Path, final: Path) -> None:
    """Rename a staged folder to its final name after everything in the folder has reached the disk."""
    for path in [*staged.rglob("*"), staged]:
        synchronize(path)
    if final.exists():  # an earlier run saved this step too; this run resumed from a step before it
        discard(final)
    staged.rename(final)
    staged.parent.rmdir()
    synchronize(final.parent)


def sweep(folder: Path) -> None:
    """Delete the half-written and half-deleted folders of a killed run."""
    for leftover in folder.glob(f"{STAGING_FOLDER}*"):
        shutil.rmtree(leftover)


def discard(folder: Path) -> None:
    """Delete a checkpoint. The folder is renamed first: a half-deleted folder must not look like a checkpoint."""
    doomed = folder.parent / f"{STAGING_FOLDER}-{folder.name}"
    folder.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """List the whole checkpoints in a run's folder, the oldest step first."""
    if not os.path.isdir(folder):
        return []
    numbered = [
        (int(match.group(1)), path)
        for path in Path(folder).iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and is_whole(path)
    ]
    return [path for _, path in sorted(numbered)]


def is_whole(folder: Path) -> bool:
    """Return whether a folder has the files from which a training resumes."""
    return all((folder / name).is_file() for name in (NOISE_LAYER_FILE, _STATE_FILE))


def discard_oldest(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond ``limit``, except the newest and the best one. None keeps all."""
    if not limit or limit < 1:
        return
    found = checkpoints(folder)
    kept = {found[-1]} if found else set()
    kept |= {path for path in found if best is not None and path.resolve() == Path(best).resolve()}
    surplus = [path for path in found if path not in kept]
    for path in surplus[: max(0, len(found) - max(limit, len(kept)))]:
        discard(path)
