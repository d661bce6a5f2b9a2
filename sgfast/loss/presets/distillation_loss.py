"""The loss of a `DistillationConfig` as a module that reads adaptor dictionaries, for any training loop."""

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sgfast.loss.presets import registry
from sgfast.loss.presets.config import DistillationConfig, IntermediateMatch
from sgfast.loss.presets.logits import HeadLoss, as_list, pair_heads
from sgfast.ops import validation

Outputs = Mapping[str, Any]


class DistillationLoss(nn.Module):
    """total, components = loss(student_outputs, teacher_outputs).

    total = kd_loss_weight · Σ_heads kd(student logits, teacher logits) + hard_label_weight · Σ mean(losses)
    + Σ_i weight_i · match_i(projection_i(student feature), teacher feature, student's inputs_mask)

    The projections of ``intermediate_matches`` are this module's parameters: give them to the optimizer
    (`parameter_groups`), move and save the module with the student. Under DistributedDataParallel make it a part of the
    wrapped model, or wrap it too; in a ``transformers.Trainer`` make it a part of the model
    (`sgfast.examples.presets` does).

    Args:
        config: kinds and weights of the losses.

    Raises:
        TypeError: ``config`` is not a `DistillationConfig`.
        ValueError: a loss is in none of the dictionaries, or no weight leaves anything to minimise.

    Shape:
        Both arguments are dictionaries as TextBrewer's adaptors give them, every key optional:

        * ``logits``: (B, L, V) or (B, V), or a list of them, one for each head;
        * ``logits_mask``: (B, L), 1 = selected, or a list. The mask has no effect on (B, V). Give both sides the same
          tensor if they have the same mask: the rows are then read in place. Two different masks select the rows of
          their own sides (as many on both sides), which copies the rows and stops a GPU's queue. If only one side has
          a mask, this mask counts for both;
        * ``labels``: from the student, (B, L) or (B,), for ``probability_shift``; below 0 = no label;
        * ``losses``: from the student, tensors whose means are added;
        * ``hidden``, ``attention``: lists of features, indexed by ``layer_S`` and ``layer_T``;
        * ``inputs_mask``: from the student, (B, L), passed to every match.

        The teacher's tensors get gradients if they require them: run the teacher under ``torch.no_grad()``.

    Returns:
        The total, a scalar, and the unweighted components, detached, under TextBrewer's names: ``unweighted_kd_loss``,
        ``unweighted_hard_label_loss``, ``unweighted_{feature}_{loss}_{layer_S}_{layer_T}`` (a repeated one ends in
        ``_2``, ``_3``). A component of weight 0 is reported, and adds nothing.

    Example:
        >>> import torch
        >>> from sgfast.loss.presets import DistillationConfig, DistillationLoss
        >>> loss = DistillationLoss(DistillationConfig(temperature=1, kd_loss_type="mse", kd_loss_weight=0.5))
        >>> total, components = loss({"logits": torch.zeros(2, 3)}, {"logits": torch.full((2, 3), 2.0)})
        >>> total, components
        (tensor(2.), {'unweighted_kd_loss': tensor(4.)})
    """

    def __init__(self, config: DistillationConfig) -> None:
        super().__init__()
        if not isinstance(config, DistillationConfig):
            raise TypeError(f"config must be a DistillationConfig; got {type(config).__name__}")
        self.config = config
        self._head_loss = HeadLoss(config)
        self._match_losses = [
            _look_up(f"intermediate_matches[{index}]: loss", match.loss, registry.MATCH_LOSS_MAP)
            for index, match in enumerate(config.intermediate_matches)
        ]
        self.projections = nn.ModuleDict(
            {
                str(index): registry.PROJ_MAP[match.proj[0]](*match.proj[1:3])
                for index, match in enumerate(config.intermediate_matches)
                if match.proj
            }
        )
        self._schedulers = {
            name: registry.WEIGHT_SCHEDULER[scheduler]
            for name, scheduler in (
                ("kd_loss_weight", config.kd_loss_weight_scheduler),
                ("hard_label_weight", config.hard_label_weight_scheduler),
            )
            if scheduler is not None and scheduler != "none"
        }
        if not (config.kd_loss_weight or config.hard_label_weight or self._schedulers) and not any(
            match.weight for match in config.intermediate_matches
        ):
            raise ValueError("the weights leave nothing to minimise: every one is 0")
        # Buffers, so that a compiled graph need not be compiled anew at every step, and a checkpoint resumes.
        for name in self._schedulers:
            self.register_buffer(name, torch.tensor(float(getattr(config, name)), dtype=torch.float64))
        if not config.overwrite_scheduled_weights:
            self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Move the scheduled weights on; call it after every optimizer step.

        Args:
            progress: optimizer steps done / steps in all.
        """
        for name, scheduler in self._schedulers.items():
            scale = 1.0 if self.config.overwrite_scheduled_weights else getattr(self.config, name)
            getattr(self, name).fill_(scale * float(scheduler(progress)))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The projections as optimizer groups, each with the options that its ``proj`` gives."""
        return [
            {"params": list(self.projections[str(index)].parameters()), **(match.proj[3] if match.proj[3:] else {})}
            for index, match in enumerate(self.config.intermediate_matches)
            if match.proj
        ]

    def forward(self, student_outputs: Outputs, teacher_outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """See the class."""
        for name, outputs in (("student_outputs", student_outputs), ("teacher_outputs", teacher_outputs)):
            if not isinstance(outputs, Mapping):
                raise TypeError(
                    f"{name} must be a dictionary with keys among {', '.join(registry.ADAPTOR_KEYS)}; "
                    f"got {type(outputs).__name__}"
                )
            for key, values in outputs.items():
                for value in as_list(values):
                    validation.check_tensors(**{f"{name}[{key!r}]": value})
        weighted: list[tuple[float | Tensor, Tensor]] = []
        components: dict[str, Tensor] = {}
        repeats: dict[str, int] = {}

        def add(name: str, weight: float | Tensor, value: Tensor) -> None:
            repeats[name] = repeats.get(name, 0) + 1
            components[name if repeats[name] == 1 else f"{name}_{repeats[name]}"] = value.detach()
            weighted.append((weight, value))

        one_sided = ("logits" in student_outputs) != ("logits" in teacher_outputs)
        if one_sided and ("kd_loss_weight" in self._schedulers or self.config.kd_loss_weight):
            missing = "teacher_outputs" if "logits" in student_outputs else "student_outputs"
            # TextBrewer ignores an unknown key, so that a misspelt key has no effect and no error.
            warnings.warn(f"kd_loss_weight has no effect: {missing} has no logits", stacklevel=2)
        if "logits" in student_outputs and "logits" in teacher_outputs:
            heads = pair_heads(student_outputs, teacher_outputs, self.config.probability_shift)
            losses = [self._head_loss(*head) for head in heads]
            add("unweighted_kd_loss", self._weight("kd_loss_weight"), torch.stack(losses).sum())
        for index, match in enumerate(self.config.intermediate_matches):
            add(*self._match(index, match, student_outputs, teacher_outputs))
        if "losses" in student_outputs:
            losses = [loss.mean() for loss in as_list(student_outputs["losses"])]
            add("unweighted_hard_label_loss", self._weight("hard_label_weight"), torch.stack(losses).sum())
        if not weighted:
            raise ValueError("nothing to compute: the outputs have no logits on both sides, no losses, and no matches")
        return _weighted_sum(weighted), components

    def _weight(self, name: str) -> float | Tensor:
        return cast(float | Tensor, getattr(self if name in self._schedulers else self.config, name))

    def _match(
        self, index: int, match: IntermediateMatch, student_outputs: Outputs, teacher_outputs: Outputs
    ) -> tuple[str, float, Tensor]:
        """Return the name, the weight and the value of one match."""
        student = _layers(f"intermediate_matches[{index}]: the student", student_outputs, match.feature, match.layer_S)
        teacher = _layers(f"intermediate_matches[{index}]: the teacher", teacher_outputs, match.feature, match.layer_T)
        if match.proj:
            student = [self._project(index, match.proj[1], feature) for feature in student]
        names = ["-".join(map(str, as_list(layers))) for layers in (match.layer_S, match.layer_T)]
        pair = (student[0], teacher[0]) if isinstance(match.layer_S, int) else (student, teacher)
        value = self._match_losses[index](*pair, mask=student_outputs.get("inputs_mask"))
        return f"unweighted_{match.feature}_{match.loss}_{'_'.join(names)}", match.weight, value

    def _project(self, index: int, width: int, feature: Tensor) -> Tensor:
        if feature.shape[-1] != width:
            raise ValueError(
                f"intermediate_matches[{index}]: proj expects a student width of {width}; got {tuple(feature.shape)}"
            )
        projection = self.projections[str(index)]
        dtype = next(projection.parameters()).dtype
        return cast(Tensor, projection(feature.to(dtype)))


def _look_up(what: str, name: str, known: Mapping[str, Any]) -> Any:
    validation.check_choice(what, name, known)
    return known[name]


def _layers(side: str, outputs: Outputs, feature: str, layers: int | list[int]) -> list[Tensor]:
    features = outputs.get(feature)
    if features is None:
        raise ValueError(f"{side}'s outputs have no {feature!r}; they have {', '.join(outputs) or 'nothing'}")
    for layer in as_list(layers):
        if not -len(features) <= layer < len(features):
            raise ValueError(f"{side}'s {feature!r} has {len(features)} layers; got layer {layer}")
    return [features[layer] for layer in as_list(layers)]


def _weighted_sum(terms: list[tuple[float | Tensor, Tensor]]) -> Tensor:
    """Σ weight · value. A term of weight 0 is left out, so that an infinite one cannot make the sum NaN."""
    total = terms[0][1].new_zeros(())
    for weight, value in terms:
        if isinstance(weight, Tensor):
            weight = weight.to(value.dtype)
            total = total + torch.where(weight == 0, 0, weight * value)
        elif weight:
            total = total + weight * value
    return total
