"""One training run on `SgtTrainer`. It records a history, stops cleanly at Ctrl-C, and resumes where it stopped."""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import PartialState
from safetensors import SafetensorError

from sgfast.huggingface.collator import NoiseMaskCollator
from sgfast.huggingface.trainer import SgtTrainer
from sgfast.huggingface.trainer_checkpoint import checkpoints
from sgfast.loss.factory import LossFunctions
from sgfast.training.building import Models
from sgfast.training.configuration import Configuration
from sgfast.training.data import TokenizedRecords
from sgfast.training.run_record import CHECKPOINTS
from sgfast.utils.devices import find_device

History = list[dict[str, float]]


def train(
    configuration: Configuration,
    models: Models,
    loss: LossFunctions,
    examples: TokenizedRecords,
    *,
    resume: bool,
    keep_checkpoints: bool = True,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, values: None,
) -> tuple[History, bool]:
    """Train until all steps are taken or until the end of the step that the first Ctrl-C interrupts.

    Args:
        configuration: settings of the run.
        models: the models to train, changed in place.
        loss: the loss over the models.
        examples: the data.
        resume: go on from the newest whole checkpoint in the run's folder, if there is one.
        keep_checkpoints: save every ``save_steps`` and at the end, also at an interrupted one; False saves nothing.
        on_step: called after every step of this run with the step's number and values.

    Returns:
        The history, a dictionary of values for every step since the run began, and True if all steps were taken.

    Raises:
        ValueError: the loss is no longer finite, or a checkpoint does not fit the model.
        OSError: a checkpoint cannot be written.
        KeyboardInterrupt: interrupted a second time.
    """
    folder = configuration.out / CHECKPOINTS
    watch = _Watch(models, on_step, keep_checkpoints)
    trainer = _Trainer(
        models.student or models.noisy_model,
        _training_arguments(configuration, keep_checkpoints),
        loss=loss,
        teacher=models.noisy_model if models.student is not None else None,
        train_dataset=examples,
        data_collator=NoiseMaskCollator(examples.tokenizer_wrapper.tokenizer),
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    newest = next(reversed(checkpoints(folder)), None) if resume else None
    with _stopping(watch):
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    finished = trainer.state.global_step >= configuration.steps
    return history_of(trainer.state.log_history), finished


def history_of(log: list[dict[str, Any]]) -> History:
    """The trainer's log of every step. The trainer's entries about the whole run are left out."""
    return [{"step": entry["step"], **entry} for entry in log if "loss" in entry]


def _training_arguments(configuration: Configuration, keep_checkpoints: bool) -> transformers.TrainingArguments:
    on_cpu = runs_on_cpu(configuration)
    arguments = transformers.TrainingArguments(
        output_dir=str(configuration.out / CHECKPOINTS),
        max_steps=configuration.steps,
        per_device_train_batch_size=configuration.batch_size,
        gradient_accumulation_steps=configuration.accumulation,
        learning_rate=configuration.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(configuration.warmup_steps, configuration.steps - 1),
        weight_decay=configuration.weight_decay,
        max_grad_norm=configuration.max_gradient_norm,
        bf16=configuration.precision == "bfloat16",
        use_cpu=on_cpu,
        seed=configuration.seed,
        # Losses of mutual information compare the halves of a batch, and the last batch may be odd.
        dataloader_drop_last=True,
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if keep_checkpoints else "no",
        save_steps=configuration.save_steps,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
    )
    if not on_cpu and arguments.device.type == "cuda" and PartialState().num_processes == 1:
        _take_one_gpu(arguments, find_device(configuration.device, "device"))
    return arguments


def runs_on_cpu(configuration: Configuration) -> bool:
    """Return whether a run's models compute on the CPU.

    Raises:
        ValueError: this machine does not have the device.
    """
    # Where the setting is auto, the trainer takes any accelerator, also one that is no GPU of CUDA.
    if configuration.device == "auto":
        return not torch.accelerator.is_available()
    return find_device(configuration.device, "device").type == "cpu"


def _take_one_gpu(arguments: transformers.TrainingArguments, device: torch.device) -> None:
    """Let one process use one GPU. The trainer would spread each batch over all GPUs, and it takes no number."""
    torch.cuda.set_device(device)
    arguments._n_gpu = 1
    arguments.__dict__["_setup_devices"] = device  # the value that the cached property of this name has computed


class _Trainer(SgtTrainer):
    """Turns every failure to write a checkpoint into one OSError: torch and tokenizers raise others on a full disk."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            # tokenizers raises Exception itself.
            if not (isinstance(error, OSError | RuntimeError | SafetensorError) or type(error) is Exception):
                raise
            step, folder = self.state.global_step, self.args.output_dir
            asked = "" if isinstance(error, OSError) else "; is the disk full?"
            raise OSError(f"the checkpoint of step {step} cannot be written to {folder}: {error}{asked}") from error


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports every step, adds sigma to its values, and stops the training when asked to."""

    def __init__(
        self, models: Models, on_step: Callable[[int, dict[str, float]], None], keep_checkpoints: bool
    ) -> None:
        self.noise_layer = models.noisy_model.noise_layer
        self.on_step = on_step
        self.keep_checkpoints = keep_checkpoints
        self.interrupted = False

    def on_step_end(self, _arguments: Any, _state: Any, control: Any, **_: Any) -> None:
        if self.interrupted:
            control.should_training_stop = True
            control.should_save = self.keep_checkpoints

    def on_log(self, _arguments: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise ValueError(f"the loss is {logs['loss']} at step {state.global_step}: try a lower learning_rate")
        # The value goes into the trainer's log. A checkpoint holds this log, so a resumed run has its whole history.
        state.log_history[-1]["mean_sigma"] = self._mean_sigma()
        self.on_step(state.global_step, state.log_history[-1])

    def _mean_sigma(self) -> float:
        """The mean sigma over the transformed tokens of the last micro-batch."""
        layer = self.noise_layer
        assert layer.std is not None
        assert layer.noise_mask is not None
        return float(layer.std[layer.noise_mask].float().mean())  # NaN where nothing is transformed


@contextmanager
def _stopping(watch: _Watch) -> Iterator[None]:
    """Let the first Ctrl-C stop the training after the step it interrupts."""
    # Several processes may receive Ctrl-C in different steps: one would save a checkpoint that the others never join.
    if PartialState().num_processes > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(_signal: int, _frame: Any) -> None:
        watch.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
