"""What a mask is, wherever one is taken: bool, or numbers equal to 0 or 1; everything else is refused by name."""

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from sgfast import loss as losses
from sgfast import metrics
from sgfast.loss import presets
from sgfast.loss.presets.logits import pair_heads
from sgfast.metrics import privacy
from sgfast.metrics.per_sequence import sequence_utility
from sgfast.metrics.utility import mean_over_sequences
from sgfast.model.inputs import prepare_inputs
from sgfast.model.noise_loss import negative_log_mean
from sgfast.noise_layer import CloakNoiseLayer
from sgfast.ops import (
    apply_noise,
    divergences,
    hidden_distances,
    pairwise_gaussian_kl,
    validation,
)

ROWS = (3, 4)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, OTHER, TABLE = drawn(*ROWS, 5), drawn(*ROWS, 5, seed=1), drawn(9, 5, seed=2)
LOGITS, OTHER_LOGITS = drawn(*ROWS, 9), drawn(*ROWS, 9, seed=1)
STD = OTHER.abs() + 0.1
IDS = torch.arange(12).view(ROWS) % 9


def noise_layer(mask: Tensor) -> Tensor:
    layer = CloakNoiseLayer((-1, 4, 5), rhos_init=0.0, seed=1).eval()
    return layer(HIDDEN, noise_mask=mask)


def preset_loss(mask: Tensor) -> Tensor:
    sides = ({"logits": LOGITS, "logits_mask": mask}, {"logits": OTHER_LOGITS, "logits_mask": mask})
    head = pair_heads(*sides, probability_shift=False)[0]
    assert head.mask is not None
    return presets.KD_LOSS_MAP["mse"](head.student, head.teacher, 1.0, mask=head.mask)


def utility(mask: Tensor) -> list[float]:
    accumulator = metrics.UtilityMetrics()
    accumulator.update(LOGITS, OTHER_LOGITS, mask)
    return list(accumulator.compute().values())


def attacks(mask: Tensor) -> list[float]:
    accumulator = metrics.PrivacyMetrics(TABLE)
    accumulator.update(HIDDEN, IDS, mask)
    return list(accumulator.compute().values())


def prepared(name: str, mask: Tensor) -> Tensor:
    masks = {"attention_mask": None, "noise_mask": None} | {name: mask}
    return prepare_inputs(IDS, *masks.values(), {}, frozenset()).selected


FUNCTIONS = {
    "divergences": ("mask", lambda mask: divergences(LOGITS, OTHER_LOGITS, "jeffreys", mask=mask)["jeffreys"]),
    "DivergenceLoss": ("mask", lambda mask: losses.DivergenceLoss("jeffreys")(LOGITS, OTHER_LOGITS, mask=mask)),
    "kl_divergence": ("mask", lambda mask: losses.divergences.kl_divergence(LOGITS, OTHER_LOGITS, mask=mask)),
    "kl_divergence over a support": (
        "mask",
        lambda mask: losses.divergences.kl_divergence(LOGITS, OTHER_LOGITS, LOGITS > 0, mask=mask),
    ),
    "hidden_distances": ("mask", lambda mask: hidden_distances(HIDDEN, OTHER, mask).l2),
    "apply_noise, noise_mask": ("noise_mask", lambda mask: apply_noise(HIDDEN, OTHER, STD, seed=1, noise_mask=mask)),
    "apply_noise, keep_mask": (
        "keep_mask",
        lambda mask: apply_noise(HIDDEN, OTHER, STD, seed=1, keep_mask=mask[..., None]),
    ),
    "pairwise_gaussian_kl, mask_a": ("mask_a", lambda mask: pairwise_gaussian_kl(HIDDEN, STD, OTHER, STD, mask)[0]),
    "pairwise_gaussian_kl, mask_b": (
        "mask_b",
        lambda mask: pairwise_gaussian_kl(HIDDEN, STD, OTHER, STD, None, mask)[0],
    ),
    "information_bounds": ("mask", lambda mask: metrics.information_bounds(HIDDEN, STD, mask).kl_upper),
    "noise layer": ("noise_mask", noise_layer),
    "negative_log_mean": ("noise_mask", lambda mask: negative_log_mean(STD, None, mask, STD.shape)),
    "model, attention_mask": ("attention_mask", lambda mask: prepared("attention_mask", mask)),
    "model, noise_mask": ("noise_mask", lambda mask: prepared("noise_mask", mask)),
    "presets, logits": ("logits_mask", preset_loss),
    "presets, kd": ("mask", lambda mask: presets.KD_LOSS_MAP["ce"](LOGITS, OTHER_LOGITS, 2.0, mask=mask)),
    "presets, hidden": ("mask", lambda mask: presets.MATCH_LOSS_MAP["hidden_mse"](HIDDEN, OTHER, mask)),
    "presets, temperature": (
        "mask",
        lambda mask: presets.TEMPERATURE_SCHEDULER["cwsm"](0.5)(LOGITS, OTHER_LOGITS, 4.0, mask=mask),
    ),
    "UtilityMetrics": ("attention_mask", utility),
    "sequence_utility": (
        "attention_mask",
        lambda mask: sequence_utility(LOGITS, OTHER_LOGITS, mask)["next_token_utility/jefferys"],
    ),
    "mean_over_sequences": ("attention_mask", lambda mask: mean_over_sequences(LOGITS[..., 0].abs(), mask)),
    "PrivacyMetrics": ("noise_mask", attacks),
    "nearest_neighbor_failure_rate": (
        "noise_mask",
        lambda mask: privacy.nearest_neighbor_failure_rate(HIDDEN, TABLE, IDS, mask),
    ),
    "repeated_query_attack": (
        "noise_mask",
        lambda mask: privacy.repeated_query_attack(torch.stack([HIDDEN, OTHER]), TABLE, IDS, mask),
    ),
    "percentage_changed_ids": ("noise_mask", lambda mask: metrics.percentage_changed_ids(IDS, IDS.flip(0), mask)),
}


@pytest.mark.parametrize(("name", "function"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_masks_are_zero_or_one(name, function):
    selected = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]]) == 1
    expected = function(selected)
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16, torch.float64):
        torch.testing.assert_close(function(selected.to(dtype)), expected, rtol=0, atol=0, equal_nan=True)
    for wrong, shown in ((0.5, "0.5"), (-1.0, "-1"), (2.0, "2"), (torch.nan, "nan"), (-torch.inf, "-inf")):
        mask = selected.float()
        mask[1, 2] = wrong
        with pytest.raises(
            ValueError, match=rf"^{name} must be bool, or numbers equal to 0 or 1; got {shown}\. .*weights"
        ):
            function(mask)
    labels = torch.where(selected, IDS, -100)
    with pytest.raises(ValueError, match=f"^{name} must be bool, or numbers equal to 0 or 1; got "):
        function(labels)


def test_values_are_looked_at_only_where_that_is_free():
    """Not on a device, in a graph, of a fake tensor or of vectorized rows: there all but 0 selects."""
    mask = torch.tensor([0.0, 0.5, 1.0])
    expected = [False, True, True]
    assert not validation.values_are_at_hand(mask.to("meta"))
    assert validation.as_bool("mask", mask.to("meta")).dtype == torch.bool
    compiled = torch.compile(lambda mask: validation.as_bool("mask", mask), fullgraph=True, backend="eager")
    assert compiled(mask).tolist() == expected
    with torch._subclasses.FakeTensorMode() as mode:
        assert validation.as_bool("mask", mode.from_tensor(mask)).dtype == torch.bool
        assert validation.as_bool("mask", torch.ones(3, device="cuda")).device.type == "cuda"
    traced = make_fx(lambda mask: divergences(LOGITS[0], OTHER_LOGITS[0], "jeffreys", mask=mask)["jeffreys"])(
        mask[[2, 0, 2, 0]]
    )
    assert (traced(mask[[0, 1, 2, 0]]) > 0).tolist() == [*expected, False]
    vectorized = torch.func.vmap(lambda row: validation.as_bool("mask", row))(mask[:, None])
    assert vectorized.flatten().tolist() == expected
    with pytest.raises(ValueError, match=r"got 0\.5"):
        validation.as_bool("mask", torch.nn.Parameter(mask))
    with pytest.raises(TypeError, match=r"mask must be bool or real numbers; got torch.complex64"):
        validation.as_bool("mask", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"mask must be a torch.Tensor; got list"):
        validation.as_bool("mask", [True])
