"""Hugging Face Trainer for transforms: any loss factory, exact accumulation, checkpoints without the base model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
import transformers
from torch import Tensor, nn

from sgfast.huggingface import trainer_checkpoint as checkpoint
from sgfast.huggingface.collator import NoiseMaskCollator
from sgfast.huggingface.loss_over_nothing import LossOverNothing
from sgfast.huggingface.step_seeds import seed_for, seed_generators, without_secrets, without_seeds
from sgfast.huggingface.token_counts import Batch, Window, attended_tokens, token_counts
from sgfast.loss.factory import LossFunctions
from sgfast.metrics.utility import token_divergences
from sgfast.model.noisy_transformer_masking_model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer.weight_decay import exempt_parameters
from sgfast.utils.files import replacing
from sgfast.utils.one_writer import one_writer


class SgtTrainer(transformers.Trainer):  # type: ignore[misc]
    """A ``transformers.Trainer`` that trains a transform with the loss of any factory.

    * **Exact.** Means over tokens are means over the whole accumulation window and all processes. With the same noise,
      4 batches of 2 give the same step as one batch of 8, even if their token counts differ. The mutual information is
      an exception: it compares the sequences of one micro-batch, and is averaged over micro-batches with the numbers of
      transformed tokens as weights. A micro-batch then needs at least two sequences, and an even number for the losses
      with cross entropy. ``dataloader_drop_last=True`` leaves out the odd end of an epoch.
    * **Logs** each component of the loss, with the same averages, and once the factory's hyperparameters.
    * **Evaluates** the loss, its components and the utility metrics (``eval_next_token_utility/…``, as defined by
      `sgfast.metrics.get_utility_metrics_factory`). All are averages over sequences; each sequence counts with the
      loss and the components of its batch. Every evaluation draws the same noise. Evaluations do not change the noise
      of training.
    * **Warns** once, when the training loss is first logged, if no position has counted in the loss, if no token has
      been transformed, or if the loss's weights leave no utility term.
    * **Saves** the noise layer and a student's adapters, never the base model. A checkpoint gets its name when it is
      whole. A resumed training gives the same result as an uninterrupted one if ``args.seed`` and ``args.data_seed``
      are the same.
    * **Stores no seed.** Draws depend only on ``args.seed``, the step and the process, so checkpoints need no
      generator's state. ``trainer.args`` is a copy with ``seed`` = −1 and no ``data_seed``; logged, saved and
      published arguments hold neither seed. A seed that others can guess, such as the default 42, protects nothing.
    * **Writes alone.** While a training saves checkpoints, no other training can write to ``args.output_dir``.

    Examples are dictionaries of ``input_ids`` and, optionally, ``attention_mask``, ``noise_mask`` and ``loss_mask``.
    By default, every token is attended, and every attended token is transformed and counts in the loss. Without a
    ``data_collator``, the tokenizer in ``processing_class`` pads the examples (`NoiseMaskCollator`). Without both, all
    examples must have one length.

    Args:
        model: the noisy model for which the factory made the loss. For the jigsaw loss, ``model`` is the student; only
            the student's adapters and the noise layer, which the teacher shares, are trained.
        args: ``transformers.TrainingArguments``.
        loss: the result of a factory of `sgfast.loss` for ``model``.
        teacher: the teacher of the jigsaw loss. The teacher runs on every batch after the student. Evaluations measure
            utility against the teacher's clean logits.
        trainer_kwargs: other arguments of ``transformers.Trainer`` (``train_dataset``, ``eval_dataset``, …), except
            ``model_init`` and ``compute_loss_func``.

    Raises:
        TypeError: an argument has the wrong type, or ``trainer_kwargs`` has ``model_init`` or ``compute_loss_func``.
        ValueError: one process has several GPUs (launch one process for each GPU), ``teacher`` does not share the
            model's noise layer, ``args`` has a ``label_smoothing_factor`` or ``neftune_noise_alpha``, or a seed in
            ``args`` is negative (as in arguments that were read from a checkpoint).

    Example:
        >>> from transformers import TrainingArguments
        >>> from sgfast.loss import distillation_loss_factory
        >>> def train(noisy_model, dataset, folder):
        ...     loss = distillation_loss_factory(noisy_model, 12, 0.54, 0.01, 0.75, 12.0)
        ...     trainer = SgtTrainer(noisy_model, TrainingArguments(folder), loss=loss, train_dataset=dataset)
        ...     return trainer.train()
    """

    # Trainer then divides the loss by the number of micro-batches, in versions 4.57 and 5.
    loss_is_scaled_for_ga = False

    args: Any
    _signature_columns: list[str] | None

    def __init__(
        self,
        model: NoiseMaskedNoisyTransformerModel,
        args: Any = None,
        *,
        loss: LossFunctions,
        teacher: NoiseMaskedNoisyTransformerModel | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        _check_arguments(model, args, loss, teacher, trainer_kwargs)
        self._loss, self._get_losses, self._get_hyperparameters = loss
        self.teacher = teacher
        self._component_sums: dict[str, Tensor] = {}
        self._windows = 0  # optimizer steps since the components were last logged
        self._hyperparameters: dict[str, Any] | None = None
        self._hyperparameters_logged = False
        self._first_counts = LossOverNothing()
        self._evaluated: list[Tensor] = []
        self._evaluated_names: list[str] = []
        self._staging: Path | None = None
        self._batches_of_epoch: Iterator[Batch] | None = None
        tokenizer = trainer_kwargs.get("processing_class")
        if trainer_kwargs.get("data_collator") is None and isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            trainer_kwargs["data_collator"] = NoiseMaskCollator(tokenizer)
        super().__init__(model, args, **trainer_kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(f"SgtTrainer needs one process for each GPU (torchrun, accelerate); got {self.args.n_gpu}")
        if teacher is not None and self.place_model_on_device and not hasattr(teacher.causal_lm, "hf_device_map"):
            teacher.to(self.args.device)  # Trainer moves the student only; the teacher may have another base model
        self._seed = self.args.seed
        # By default, accelerate takes torch's last seed, which a resumed program may not repeat.
        self.accelerator.dataloader_config.data_seed = (
            self._seed if self.args.data_seed is None else self.args.data_seed
        )
        self.args = without_seeds(self.args)
        self._seed_generators("start")
        # Trainer infers this value from the model's **kwargs. A value of True would change the scale of the loss.
        self.model_accepts_loss_kwargs = False
        self.label_names = self.args.label_names or ["labels"]

    # Data

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the base model and the loss read, beside those in the noisy model's signature."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own: list[str] = self._signature_columns or []
            self._signature_columns = [*own, *sorted({"loss_mask", *self.model._base_arguments} - set(own))]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], "Window | None"]:
        """Return the micro-batches of an optimizer step, and their `Window` in place of Trainer's count of labels."""
        if epoch_iterator is not self._batches_of_epoch:
            # The first request for a batch draws the order of the epoch, also if this run begins inside the epoch.
            self._batches_of_epoch = epoch_iterator
            self._seed_generators("epoch", int(self.state.epoch or 0))
        else:
            self._seed_generators("batches", self.state.global_step)
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._seed_generators("step", self.state.global_step)
        if not batches:
            return batches, None
        self._windows += 1
        counts = torch.stack([token_counts(batch, device) for batch in batches]).sum(0)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        if self.is_world_process_zero():
            self._first_counts.add(counts)
        return batches, Window(counts, len(batches) * self.accelerator.num_processes)

    def _seed_generators(self, *place: str | int) -> None:
        """Seed the generators from the seed, the place and the process, so that different texts share no noise."""
        seed_generators(seed_for(self._seed, *place, self.args.process_index))

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: "Window | None" = None,
    ) -> Any:
        """Compute the factory's loss of one micro-batch. Outside of training, means are over the batch's own tokens."""
        window = num_items_in_batch
        inputs = dict(inputs)
        loss_mask = inputs.pop("loss_mask", None)
        if loss_mask is None:
            loss_mask = attended_tokens(inputs)

        def with_loss(_module: nn.Module, _arguments: Any, keywords: dict[str, Any], outputs: Any) -> Any:
            teacher_outputs = None
            if self.teacher is not None:
                with self.accelerator.autocast():
                    teacher_outputs = self.teacher(**keywords)
            loss = self._loss(loss_mask, normalizers=None if window is None else window.normalizers)
            if window is not None:
                loss = loss * window.micro_batches  # Trainer and DistributedDataParallel divide by this number
            return (loss, outputs, teacher_outputs) if return_outputs else loss

        self._prepare_teacher()
        # The loss is computed inside the forward that DistributedDataParallel and FSDP wrap. Both look for the
        # parameters of this step in the forward's outputs, and the model's own outputs may lack the hidden states that
        # losses read. The hook must run before the hooks of FSDP.
        handle = self.model.register_forward_hook(with_loss, prepend=True, with_kwargs=True)
        try:
            result = model(**inputs)
        finally:
            handle.remove()
        if window is not None:
            for name, value in cast(dict[str, Tensor], self._get_losses()).items():
                self._component_sums[name] = self._component_sums.get(name, 0) + value
        return result if not return_outputs else (result[0], result[1:])

    def _prepare_teacher(self) -> None:
        """Put the teacher into the student's mode."""
        if self.teacher is None:
            return
        self.teacher.is_gradient_checkpointing = self.model.is_gradient_checkpointing
        if self.teacher.training != self.model.training:
            self.teacher.train(self.model.training)
            self.model.train(self.model.training)  # again, because the student's adapters may lie in the teacher's base

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, add the components to the training loss, and warn once in a run if the loss is over nothing."""
        if self._component_sums and not logs.keys().isdisjoint({"loss", "train_loss"}):
            self._first_counts.warn_once(self._component_sums, self._read_hyperparameters)
        if "loss" in logs and self._component_sums:
            self._log_hyperparameters()
            logs = logs | self._take_components()
        super().log(logs, start_time)

    def _take_components(self) -> dict[str, float]:
        sums, self._component_sums = self._component_sums, {}
        windows, self._windows = self._windows, 0
        values = torch.stack([value.float() for value in sums.values()]) / windows
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "sum")
        names = ("loss" if name == "total" else name for name in sums)  # Trainer 4.57 rounds its own loss
        return dict(zip(names, values.tolist(), strict=True))

    def _read_hyperparameters(self) -> Mapping[str, Any]:
        """Return the factory's hyperparameters, kept because the factory reports them once for each forward."""
        if self._hyperparameters is None:
            self._hyperparameters = dict(self._get_hyperparameters())
        return self._hyperparameters

    def _log_hyperparameters(self) -> None:
        """Log the hyperparameters once in a run, also if the run was resumed."""
        if self._hyperparameters_logged:
            return
        self._hyperparameters_logged = True
        values = {f"hyperparameters/{name}": value for name, value in self._read_hyperparameters().items()}
        if not any(values.items() <= record.items() for record in self.state.log_history):
            super().log(values)

    # Evaluation

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Run Trainer's loop with the noise of evaluations, and add the averages of the measurements."""
        self._evaluated.clear()
        with self._evaluation_noise():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluated:
            rows = torch.cat(self._evaluated)
            counts = rows[:, :1] != 0
            means = (torch.where(counts, rows, 0).sum(0) / counts.sum()).tolist()
            names = (f"{metric_key_prefix}_{name}" for name in self._evaluated_names)
            output.metrics.update(zip(names, means[1:], strict=True))
            self._evaluated.clear()
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Return the loss and, unless ``prediction_loss_only``, the logits of the noisy sequences and the labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, (outputs, teacher_outputs) = self.compute_loss(model, inputs, return_outputs=True)
            noisy = outputs.base_model_output
            clean = noisy if teacher_outputs is None else teacher_outputs.base_model_output
            self._measure(noisy.noisy_logits, clean.clean_logits, attended_tokens(inputs))
        if prediction_loss_only:
            return loss, None, None
        labels = tuple(inputs[name] for name in self.label_names if name in inputs)
        return loss, noisy.noisy_logits, labels[0] if len(labels) == 1 else labels or None

    def _measure(self, noisy_logits: Tensor, clean_logits: Tensor, attended: Tensor) -> None:
        """Keep a row for each sequence of all processes: number of tokens, utility metrics, components of the loss."""
        tokens = attended.sum(-1)
        divergences = token_divergences(noisy_logits, clean_logits, attended, None)
        measured = {name: values.sum(-1) / tokens for name, values in divergences.items()}
        components = cast(dict[str, Tensor], self._get_losses())
        measured |= {name: value.expand(len(tokens)) for name, value in components.items() if name != "total"}
        self._evaluated_names = list(measured)
        rows = torch.stack([tokens.float(), *(values.float() for values in measured.values())], dim=1)
        self._evaluated.append(self.accelerator.gather_for_metrics(rows))

    @contextlib.contextmanager
    def _evaluation_noise(self) -> Iterator[None]:
        """Draw the same noise at every evaluation, without an effect on the noise of training."""
        device, layer = self.args.device, self.model.noise_layer
        devices = [] if device.type == "cpu" else [device]
        forwards = layer.forward_count.clone()
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(seed_for(self._seed, "evaluation", self.args.process_index))
            layer.forward_count.zero_()
            try:
                yield
            finally:
                layer.forward_count.copy_(forwards)

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that Trainer decays, except those of a noise layer that weight decay would erase."""
        exempt = exempt_parameters(model)
        return [name for name in super().get_decay_parameter_names(model) if name not in exempt]

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see ``transformers.Trainer.train``.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole checkpoint in
                ``args.output_dir``.
            args: further arguments of ``transformers.Trainer.train``.
            kwargs: further arguments of ``transformers.Trainer.train``.

        Raises:
            ValueError: there is no whole checkpoint, or the checkpoint belongs to another model.
            BlockingIOError: another training saves its checkpoints in ``args.output_dir``.
        """
        saves = self.args.save_strategy != "no"
        with one_writer(self.args.output_dir) if saves else contextlib.nullcontext():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            found = checkpoint.checkpoints(self.args.output_dir)
            if not found:
                raise ValueError(f"resume_from_checkpoint: no whole checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found[-1])
        elif resume_from_checkpoint and not checkpoint.is_whole(Path(resume_from_checkpoint)):
            raise ValueError(f"resume_from_checkpoint: {resume_from_checkpoint} is no whole checkpoint")
        # An earlier call may have ended before it logged its last steps.
        self._component_sums, self._windows, self._batches_of_epoch = {}, 0, None
        if resume_from_checkpoint and self.args.max_steps > 0:
            path = Path(resume_from_checkpoint)
            state = transformers.TrainerState.load_from_json(str(path / transformers.trainer.TRAINER_STATE_NAME))
            if state.global_step >= self.args.max_steps:  # Trainer would train one more step
                self.state = state
                self._load_from_checkpoint(str(path))
                return transformers.trainer_utils.TrainOutput(state.global_step, 0.0, {})
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else cast(str, super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let Trainer write a checkpoint to a staging folder, and rename the folder when all processes are done."""
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = run / checkpoint.STAGING_FOLDER / name, run / name
        if self.args.should_save:
            checkpoint.sweep(run)
        self.accelerator.wait_for_everyone()
        self._staging = staged.parent
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save:  # a half-written checkpoint must not fill a full disk
                checkpoint.sweep(run)
            raise
        finally:
            self._staging = None
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            checkpoint.publish(staged, final)
            checkpoint.discard_oldest(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the noise layer, a student's adapters, the tokenizer and the training's arguments."""
        trained = checkpoint.trained_state(self.model)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            checkpoint.save_trained(self.model, trained, folder)
            tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            with replacing(folder / "training_args.bin") as temporary:
                torch.save(without_secrets(self.args), temporary)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would also write the whole model.
        plugin = self.accelerator.state.fsdp_plugin
        accelerate.utils.save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_rng_state(self, output_dir: str) -> None:
        """Store nothing, because every step seeds the generators."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing, because no state is stored."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint.load_trained(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        checkpoint.load_trained(self.model, self.state.best_model_checkpoint)


def _check_arguments(model: Any, args: Any, loss: Any, teacher: Any, trainer_kwargs: Mapping[str, Any]) -> None:
    for name, value in (("model", model), ("teacher", teacher)):
        if not isinstance(value, NoiseMaskedNoisyTransformerModel) and (name, value) != ("teacher", None):
            raise TypeError(f"{name} must be a NoiseMaskedNoisyTransformerModel; got {type(value).__name__}")
    if not (isinstance(loss, Sequence) and len(loss) == 3 and all(callable(function) for function in loss)):
        raise TypeError(f"loss must be the three functions that a loss factory returned; got {type(loss).__name__}")
    for name in ("model_init", "compute_loss_func"):
        if trainer_kwargs.get(name) is not None:
            raise TypeError(f"SgtTrainer takes no {name}: the factory made the loss for one given model")
    for name in ("label_smoothing_factor", "neftune_noise_alpha"):
        if getattr(args, name, None):
            raise ValueError(
                f"SgtTrainer takes no {name}: losses compare the model with itself under the noise of its noise layer"
            )
    for name in ("seed", "data_seed"):
        if (getattr(args, name, None) or 0) < 0:
            raise ValueError(
                f"args.{name} must not be negative; got {getattr(args, name)}. Stored arguments hold no seed: "
                "set the seed of the training again"
            )
    if teacher is not None and teacher.noise_layer is not model.noise_layer:
        raise ValueError(
            "teacher must share the model's noise layer: build the student with noise_layer=teacher.noise_layer"
        )
