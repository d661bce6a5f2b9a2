"""Tensors that are not plain ones are refused at every door, by the argument's name: never PyTorch's own message."""

import functools
import inspect
import re

import pytest
import torch
import torch.distributed as dist
import torch.masked
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import sgfast
from sgfast import metrics, ops
from sgfast.loss import DivergenceLoss, components, distillation_loss_factory, divergences
from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, TEMPERATURE_SCHEDULER, DistillationConfig, DistillationLoss
from sgfast.metrics import per_sequence, privacy, utility
from sgfast.metrics.voronoi import voronoi_l2_distances
from sgfast.noise_layer import CloakNoiseLayer, CloakNoiseLayer2, recommend_scale
from sgfast.ops import validation
from tests.tiny_models import tiny_noisy_model, uneven_tokens

ROWS, LENGTH, WIDTH = 2, 3, 5


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


X, Y = drawn(ROWS, LENGTH, WIDTH), drawn(ROWS, LENGTH, WIDTH) + 1
MASK = torch.ones(ROWS, LENGTH, dtype=torch.bool)
IDS = torch.tensor([[0, 1, 2], [2, 3, 4]])
TABLE = torch.eye(WIDTH)
ROW = torch.ones(ROWS, LENGTH)
STD, SEED = X.abs() + 1, torch.tensor(1)
SUPPORT = torch.ones(ROWS, LENGTH, WIDTH, dtype=torch.bool)
PAIR = {"noisy_logits": X, "clean_logits": Y}
ATTACK = {"transformed": X, "table": TABLE, "input_ids": IDS, "noise_mask": MASK}
KD = {"logits_S": X, "logits_T": Y, "temperature": ROW, "mask": MASK}
MATCHES = {
    **{
        name: {"attention_S": drawn(2, 4, 3, 3), "attention_T": drawn(2, 4, 3, 3), "mask": MASK}
        for name in MATCH_LOSS_MAP
        if "attention" in name
    },
    **{name: {"state_S": X, "state_T": Y, "mask": MASK} for name in ("hidden_mse", "cos", "pkd")},
}
TERM = {"selected": MASK, "count": torch.tensor(3.0)}

OPERATIONS = {
    "divergences": {**PAIR, "kinds": ("forward_kl",), "mask": MASK, "labels": IDS, "temperature": ROW},
    "top_k_support": {**PAIR, "k": 2},
    "hidden_distances": {"noisy": X, "clean": Y, "mask": MASK},
    "apply_noise": {"input": X, "mean": Y, "std": STD, "seed": SEED, "noise_mask": MASK, "keep_mask": SUPPORT},
    "standard_normal": {"shape": (3,), "seed": SEED},
    "pairwise_gaussian_kl": {"mean_a": X, "std_a": STD, "mean_b": Y, "std_b": STD, "mask_a": MASK, "mask_b": MASK},
    "nearest_embeddings": {"queries": X, "table": TABLE},
    "embedding_ranks": {"queries": X, "table": TABLE, "targets": IDS},
}


def model_loss(loss_mask, count):
    noisy_model = tiny_noisy_model()
    loss, _, _ = distillation_loss_factory(noisy_model, 1, 0.5, 0.1, 0.1, 1.0)
    noisy_model.train()(**uneven_tokens())
    return loss(loss_mask, normalizers={"loss_tokens": count})


def presets_loss(logits_S, logits_T, logits_mask, hidden, inputs_mask, losses):
    match = {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "cos", "weight": 1}
    config = DistillationConfig(intermediate_matches=[match], hard_label_weight=1)
    student = {"logits": [logits_S], "logits_mask": logits_mask, "hidden": [hidden], "inputs_mask": inputs_mask}
    return DistillationLoss(config)(student | {"losses": losses}, {"logits": [logits_T], "hidden": [Y]})


def learned(transformed, input_ids, noise_mask, groups):
    return metrics.LearnedInversionAttack(TABLE, epochs=1).fit(transformed, input_ids, noise_mask, groups)


def predicted(transformed):
    attack = metrics.LearnedInversionAttack(TABLE, epochs=0)
    attack.fit(X, IDS)
    return attack.predict(transformed)


def layer_forward(input, noise_mask, seed):
    return CloakNoiseLayer((1, LENGTH, WIDTH))(input, noise_mask, seed=seed)


CALLS = {
    **{f"ops.{name}": (getattr(ops, name), arguments) for name, arguments in OPERATIONS.items()},
    **{
        f"explain {name}": (functools.partial(sgfast.explain, getattr(ops, name)), arguments)
        for name, arguments in OPERATIONS.items()
    },
    **{
        f"divergences.{name}": (function, {**PAIR, "support_mask": SUPPORT, "mask": MASK, "temperature": ROW})
        for name, function in inspect.getmembers(divergences, inspect.isfunction)
        if function.__module__ == divergences.__name__ and not name.startswith("_")
    },
    "DivergenceLoss": (
        lambda student, teacher, **others: DivergenceLoss("forward_kl", hard_label_weight=0.5)(
            student, teacher, **others
        ),
        {
            "student": X,
            "teacher": Y,
            "labels": IDS,
            "mask": MASK,
            "weights": torch.ones(MASK.shape),
            "num_items": torch.tensor(4.0),
        },
    ),
    "a factory's loss": (model_loss, {"loss_mask": uneven_tokens()["attention_mask"], "count": torch.tensor(9.0)}),
    **{f"kd {name}": (function, KD) for name, function in KD_LOSS_MAP.items()},
    **{
        f"scheduler {name}": (
            TEMPERATURE_SCHEDULER[name],
            {"logits_S": X, "logits_T": Y, "base_temperature": 2.0, "mask": MASK},
        )
        for name in (("flsw", 1, 1), ("cwsm", 1))
    },
    **{f"match {name}": (MATCH_LOSS_MAP[name], arguments) for name, arguments in MATCHES.items()},
    **{
        f"match {name}": (
            lambda first_S, second_S, first_T, second_T, mask, loss=MATCH_LOSS_MAP[name]: loss(
                [first_S, second_S], [first_T, second_T], mask=mask
            ),
            {"first_S": X, "second_S": Y, "first_T": Y, "second_T": X, "mask": MASK},
        )
        for name in ("fsp", "gram", "nst", "mmd")
    },
    "presets' DistillationLoss": (
        presets_loss,
        {"logits_S": X, "logits_T": Y, "logits_mask": MASK, "hidden": X, "inputs_mask": MASK, "losses": torch.ones(2)},
    ),
    "masked_mean": (components.masked_mean, {"values": ROW, "mask": MASK, "count": torch.tensor(3.0)}),
    "std_log_ratio": (components.std_log_ratio, {"std": STD, "max_scale": 9.0, "suppressed": ~SUPPORT, **TERM}),
    "median_norm_penalty": (components.median_norm_penalty, {"shifted": X, "median_norm": 1.0, **TERM}),
    "mutual_information": (
        components.mutual_information,
        {"mean": X, "std": STD, "selected": MASK, "attended": MASK, "suppressed": ~SUPPORT},
    ),
    "known_transform_log_odds": (
        components.known_transform_log_odds,
        {"observed": X[:, 0], "location": X, "std": STD},
    ),
    "inverse_l2_power_law_catalyst": (
        components.inverse_l2_power_law_catalyst,
        {"l2": ROW, "characteristic_length": 1.0, "exponent": 1.0, **TERM},
    ),
    **{
        name: (getattr(components, name), {"cosine_similarity": ROW, **TERM})
        for name in ("input_embedding_similarity", "absolute_cosine_similarity")
    },
    **{
        name: (getattr(components, name), {values: ROW, "counted": MASK, "count": torch.tensor(3.0)})
        for name, values in (
            ("distillation_layer_cosine_distance", "cosine_distance"),
            ("distillation_layer_l2_distance", "normalized_l2"),
            ("distillation_cross_entropy", "cross_entropy"),
            ("distillation_protection_l2", "normalized_l2"),
            ("clean_embedding_performance", "normalized_l2"),
        )
    },
    "information_bounds": (metrics.information_bounds, {"mean": X, "std": STD, "mask": MASK}),
    "fano_error_bound": (metrics.fano_error_bound, {"mutual_information": ROW, "num_classes": 4}),
    "pac_privacy_success_bound": (metrics.pac_privacy_success_bound, {"mutual_information": ROW, "prior": 0.1}),
    "get_top_k_support_mask": (metrics.get_top_k_support_mask, {**PAIR, "num_logits": 2}),
    "percentage_changed_ids": (
        metrics.percentage_changed_ids,
        {"input_ids": IDS, "reconstructed_ids": IDS, "noise_mask": MASK},
    ),
    **{
        name: (functools.partial(getattr(privacy, name), **options), ATTACK)
        for name, options in (
            ("token_ranks", {}),
            ("nearest_neighbor_failure_rate", {}),
            ("max_rank_failure_rate", {"r": 1}),
            ("mean_reconstruction_rank", {}),
            ("token_transformation_rate", {"k": 1}),
        )
    },
    "repeated_query_attack": (metrics.repeated_query_attack, {**ATTACK, "transformed": torch.stack([X, Y])}),
    "a repeated query": (
        lambda transformed: metrics.repeated_query_attack([X, transformed], TABLE, IDS),
        {"transformed": Y},
    ),
    "compute_percentile_voronoi_l2_distance": (
        lambda weight: metrics.compute_percentile_voronoi_l2_distance(weight, 50),
        {"weight": TABLE},
    ),
    "voronoi_l2_distances": (voronoi_l2_distances, {"weight": TABLE}),
    "mean_over_sequences": (utility.mean_over_sequences, {"values": ROW, "attention_mask": MASK}),
    "sequence_utility": (per_sequence.sequence_utility, {**PAIR, "attention_mask": MASK, "input_ids": IDS}),
    "sequence_utility_from_hidden": (
        functools.partial(per_sequence.sequence_utility_from_hidden, head=nn.Identity()),
        {"noisy_hidden": X, "clean_hidden": Y, "attention_mask": MASK, "input_ids": IDS},
    ),
    "known_transform_attack": (
        lambda **arguments: metrics.known_transform_attack(
            noise_layer=CloakNoiseLayer((1, LENGTH, WIDTH)), **arguments
        ),
        {
            "transformed": X,
            "table": TABLE,
            "noise_mask": MASK,
            "attention_mask": MASK,
            "input_ids": IDS,
            "canaries": MASK,
        },
    ),
    "DivergenceMetrics": (
        lambda **arguments: metrics.DivergenceMetrics(("forward_kl",)).update(**arguments),
        {"candidate": X, "reference": Y, "mask": MASK},
    ),
    "UtilityMetrics": (
        lambda **arguments: metrics.UtilityMetrics().update(**arguments),
        {**PAIR, "attention_mask": MASK, "input_ids": IDS},
    ),
    "PrivacyMetrics": (
        lambda table, **arguments: metrics.PrivacyMetrics(table).update(**arguments),
        {**ATTACK},
    ),
    "PrivacyMetrics.add": (lambda ranks: metrics.PrivacyMetrics(TABLE).add(ranks), {"ranks": IDS}),
    "PrivacyMetrics.per_sequence": (lambda ranks: metrics.PrivacyMetrics(TABLE).per_sequence(ranks), {"ranks": IDS}),
    "LearnedInversionAttack": (lambda table: metrics.LearnedInversionAttack(table, epochs=1), {"table": TABLE}),
    "LearnedInversionAttack.fit": (
        learned,
        {"transformed": X, "input_ids": IDS, "noise_mask": MASK, "groups": torch.tensor([0, 1])},
    ),
    "LearnedInversionAttack.predict": (predicted, {"transformed": X}),
    "a noise layer": (layer_forward, {"input": X, "noise_mask": MASK, "seed": SEED}),
    "CloakNoiseLayer2": (lambda stds: CloakNoiseLayer2(percent_to_mask=0.5, stds=stds), {"stds": ROW}),
    "recommend_scale": (recommend_scale, {"embedding_weight": TABLE}),
    "a noisy model": (
        lambda **arguments: tiny_noisy_model()(**arguments),
        {name: uneven_tokens()[name] for name in ("input_ids", "attention_mask", "noise_mask")},
    ),
}

# Called by other names in the message than in this table.
SPOKEN = {"count": r"(count|normalizers\['loss_tokens'\])", "first_S": r"state_S\[0\]", "second_S": r"state_S\[1\]"}
SPOKEN |= {"first_T": r"state_T\[0\]", "second_T": r"state_T\[1\]", "logits_mask": r"student_outputs\['logits_mask'\]"}
SPOKEN |= {"inputs_mask": r"student_outputs\['inputs_mask'\]", "losses": r"student_outputs\['losses'\]"}
SPOKEN |= {"hidden": r"student_outputs\['hidden'\]", "logits_S": r"(logits_S|student_outputs\['logits'\])"}
SPOKEN |= {"logits_T": r"(logits_T|teacher_outputs\['logits'\])"}


class Wrapper(torch.Tensor):
    """A class that computes in its own way."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError("a message of its own")


class Named(torch.Tensor):
    """A class that adds a name, as torchvision's do."""


@pytest.fixture(scope="module", autouse=True)
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def quantised(tensor, mesh):
    return torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.qint8)


KINDS = {
    "Replicate": lambda tensor, mesh: DTensor.from_local(tensor, mesh, [Replicate()]),
    "Shard": lambda tensor, mesh: DTensor.from_local(tensor, mesh, [Shard(tensor.dim() - 1)]) if tensor.dim() else None,
    "Partial": lambda tensor, mesh: DTensor.from_local(tensor, mesh, [Partial()]),
    "COO": lambda tensor, mesh: tensor.to_sparse(),
    "CSR": lambda tensor, mesh: tensor.to_sparse_csr() if tensor.dim() > 1 else None,
    "CSC": lambda tensor, mesh: tensor.to_sparse_csc() if tensor.dim() > 1 else None,
    "BSR": lambda tensor, mesh: tensor.to_sparse_bsr((1, 1)) if tensor.dim() > 1 else None,
    "BSC": lambda tensor, mesh: tensor.to_sparse_bsc((1, 1)) if tensor.dim() > 1 else None,
    "quantised": quantised,
    "complex": lambda tensor, mesh: tensor.to(torch.complex64),
    "half complex": lambda tensor, mesh: tensor.to(torch.complex32),
    "meta": lambda tensor, mesh: tensor.to("meta"),
    "nested": lambda tensor, mesh: torch.nested.nested_tensor([tensor, tensor]),
    "jagged": lambda tensor, mesh: (
        torch.nested.as_nested_tensor([tensor, tensor], layout=torch.jagged) if tensor.dim() else None
    ),
    "masked": lambda tensor, mesh: torch.masked.masked_tensor(tensor, torch.ones_like(tensor, dtype=torch.bool)),
    "wrapper": lambda tensor, mesh: tensor.as_subclass(Wrapper),
    "uninitialised": lambda tensor, mesh: nn.UninitializedBuffer(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_every_call(name, mesh):
    call, arguments = CALLS[name]
    call(**arguments)
    tensors = {argument: value for argument, value in arguments.items() if isinstance(value, torch.Tensor)}
    refused = 0
    for argument, value in tensors.items():
        for kind, made in KINDS.items():
            exotic = made(value, mesh)
            if exotic is None:
                continue
            spoken, refusal = SPOKEN.get(argument, argument), "must .*; got"
            error: type[Exception] | tuple[type[Exception], ...] = TypeError
            if isinstance(exotic, DTensor):
                error = ValueError
                refusal = rf"must .*; got a DTensor with the placements \(.*{kind}.*\): give {spoken}\.full_tensor\(\)"
            elif kind == "meta":  # or: it lies on another device than the others
                error, refusal = (TypeError, ValueError), r"(and \S.* )?must .*; got .*meta"
            with pytest.raises(error) as raised:
                call(**{**arguments, argument: exotic})
            message = str(raised.value)
            assert re.match(rf"(the |\w+ and )?{spoken}( tensor)? {refusal}", message), (argument, kind, message)
            refused += 1
    assert refused >= 10


# Calls of an object that already has tensors of its own, on the CPU.
BESIDE_OTHERS = ("a factory's loss", "LearnedInversionAttack.fit", "LearnedInversionAttack.predict")


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_alone(name):
    """Where all are meta tensors there is nothing to compute."""
    call, arguments = CALLS[name]
    moved = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    if name in BESIDE_OTHERS:
        with pytest.raises(ValueError, match="must be on one device; got meta and cpu"):
            call(**moved)
    else:
        with pytest.raises(TypeError, match="must hold values; got a meta tensor"):
            call(**moved)


def test_nothing_public_is_left_out():
    called = {name.removeprefix("ops.") for name in CALLS} | {"HiddenDistances"}
    assert set(ops.__all__) <= called
    matches = {name.removeprefix("match ") for name in called}
    assert set(MATCH_LOSS_MAP) <= matches
    assert set(KD_LOSS_MAP) <= {name.removeprefix("kd ") for name in called}
    terms = {
        name
        for name, function in inspect.getmembers(components, inspect.isfunction)
        if function.__module__.startswith(components.__name__)
    }
    assert terms - called == {"wide"}
    without_tensors = {
        "InformationBounds",
        "get_noise_metrics_factory",
        "get_utility_metrics_factory",
        "language_model_head",
        "privacy",
    }
    assert set(metrics.__all__) - called == without_tensors


def test_parameters_and_classes_that_change_no_operation_are_plain():
    expected = ops.hidden_distances(X, Y, MASK).l2
    for made in (nn.Parameter, nn.Buffer, lambda tensor: tensor.as_subclass(Named)):
        assert torch.equal(ops.hidden_distances(made(X), made(Y), MASK).l2.as_subclass(torch.Tensor), expected)
        compiled = torch.compile(ops.hidden_distances, fullgraph=True, backend="eager")
        assert torch.equal(compiled(made(X), made(Y), MASK).l2.as_subclass(torch.Tensor), expected)


def test_under_torch_compile_a_dtensor_is_refused_alike(mesh):
    compiled = torch.compile(ops.hidden_distances, backend="eager")
    with pytest.raises(ValueError, match=r"clean must be a plain tensor; got a DTensor.*clean\.full_tensor\(\)"):
        compiled(X, DTensor.from_local(Y, mesh, [Replicate()]))


def test_what_is_still_gathered_is_plain(mesh):
    """A collective's result is a tensor that waits when it is read."""
    gathered = torch.distributed._functional_collectives.AsyncCollectiveTensor(X)
    validation.check_floating("x", gathered)
    assert torch.equal(ops.hidden_distances(gathered, Y).l2, ops.hidden_distances(X, Y).l2)
