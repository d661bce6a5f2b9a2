"""Checkpoints of what a transform's training changes: the noise layer and, of a student, its adapters.

A checkpoint is written to a folder of another name and renamed when all of it is on the disk, so that one that can be
found is whole.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgfast.model.adapters import adapter_layers
from sgfast.utils.files import replacing

NOISE_LAYER_FILE = "noise_layer.safetensors"
STAGING_FOLDER = ".incomplete"
_ADAPTER_FILE = "adapter_model.safetensors"
_STATE_FILE = "trainer_state.json"


def save_trained(model: Any, folder: Path) -> None:
    """Write a noisy model's noise layer and the adapters that it runs, nothing of the base model.

    Args:
        model: a noisy language model.
        folder: made if it is not there.
    """
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.noise_layer.state_dict().items()}
    with replacing(folder / NOISE_LAYER_FILE) as temporary:
        safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
    if runs_adapters(model):
        # Embedding tables belong to the base; PEFT would ask the hub whether they were resized.
        model.base_model.save_pretrained(
            folder, selected_adapters=[model.base_model.active_adapter], save_embedding_layers=False
        )


def load_trained(model: Any, folder: str | os.PathLike[str]) -> None:
    """Read what `save_trained` has written into a model of the same architecture.

    Raises:
        ValueError: the folder does not hold it, or it is of another architecture.
    """
    _load(model.noise_layer, read_tensors(Path(folder) / NOISE_LAYER_FILE), folder)
    if runs_adapters(model):
        import peft

        name = model.base_model.active_adapter
        path = Path(folder) / ("" if name == "default" else name) / _ADAPTER_FILE
        state = read_tensors(path)
        expected = peft.get_peft_model_state_dict(model.base_model, adapter_name=name, save_embedding_layers=False)
        if state.keys() != expected.keys():
            raise ValueError(f"{path} holds adapters of other layers than the model's")
        peft.set_peft_model_state_dict(model.base_model, state, adapter_name=name)


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


def _load(noise_layer: nn.Module, state: dict[str, Tensor], folder: str | os.PathLike[str]) -> None:
    try:
        noise_layer.load_state_dict(state)
    except RuntimeError as error:  # torch's message lists the differences
        raise ValueError(f"the noise layer in {folder} is of another architecture: {error}") from error


def publish(staged: Path, final: Path) -> None:
    """Put a written folder under its name, when everything in it has reached the disk."""
    for path in [*staged.rglob("*"), staged]:
        _flush(path)
    if final.exists():  # a step that was saved before, by a run that went on from an earlier one
        discard(final)
    staged.rename(final)
    staged.parent.rmdir()
    _flush(final.parent)


def sweep(folder: Path) -> None:
    """Delete what a killed run has left half-written or half-deleted."""
    for leftover in folder.glob(f"{STAGING_FOLDER}*"):
        shutil.rmtree(leftover)


def discard(folder: Path) -> None:
    """Delete a checkpoint so that no half of it can be taken for one."""
    doomed = folder.parent / f"{STAGING_FOLDER}-{folder.name}"
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
