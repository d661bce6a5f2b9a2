"""DivergenceLoss: against the papers' definitions in float64, and as part of a training loop."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgfast.loss import DivergenceLoss
from sgfast.ops import divergences
from sgfast.ops.divergence.kinds import KINDS
from tests.processes import in_processes

IGNORED = -100


def logits(*shape: int, noise: float = 1.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Student and teacher."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(*shape, generator=generator, dtype=torch.float64) * 2
    student = teacher + noise * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def some_labels(*shape: int, size: int) -> Tensor:
    """About two thirds of the positions have one."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(size, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, IGNORED)


def hinton(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton et al. 2015: T² times the cross-entropy of soft targets, less the teacher's entropy (a constant)."""
    q = (teacher / temperature).softmax(-1)
    return temperature**2 * (q * (q.log() - (student / temperature).log_softmax(-1))).sum(-1)


def gkd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Agarwal et al. 2024, eq. 1, with P the teacher: β KL(P‖βP + (1−β)Q) + (1−β) KL(Q‖βP + (1−β)Q)."""
    p_teacher, p_student = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if beta == 0:
        return (p_teacher * (p_teacher / p_student).log()).sum(-1)
    if beta == 1:
        return (p_student * (p_student / p_teacher).log()).sum(-1)
    mixture = beta * p_teacher + (1 - beta) * p_student
    to_teacher = (p_teacher * (p_teacher / mixture).log()).sum(-1)
    to_student = (p_student * (p_student / mixture).log()).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


def trl_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """TRL's arrangement of the same: log-probabilities, the mixture as logsumexp of weighted ones, F.kl_div."""
    student, teacher = (side.div(temperature).log_softmax(-1) for side in (student, teacher))
    if beta == 0:
        return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    if beta == 1:
        return F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    weights = torch.tensor([1 - beta, beta], dtype=student.dtype).log()
    mixture = torch.logsumexp(torch.stack([student + weights[0], teacher + weights[1]]), dim=0)
    kl_teacher = F.kl_div(mixture, teacher, log_target=True, reduction="none")
    kl_student = F.kl_div(mixture, student, log_target=True, reduction="none")
    return (beta * kl_teacher + (1 - beta) * kl_student).sum(-1)


def distillm(student: Tensor, teacher: Tensor, skew: float, reverse: bool) -> Tensor:
    """Ko et al. 2024: SKL = KL(p‖λp + (1−λ)q), SRKL = KL(q‖(1−λ)p + λq), p the teacher, q the student."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    if reverse:
        return (q * (q / ((1 - skew) * p + skew * q)).log()).sum(-1)
    return (p * (p / (skew * p + (1 - skew) * q)).log()).sum(-1)


def minillm(student: Tensor, teacher: Tensor) -> Tensor:
    """Gu et al. 2024, the single-step part: the student's expectation of log q_student/p_teacher."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def torchtune_forward(student: Tensor, teacher: Tensor) -> Tensor:
    """torchtune's ForwardKL: −Σ teacher · log student, without the teacher's entropy."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)


PAPERS = {
    "Hinton": (
        DivergenceLoss("forward_kl", temperature=3.0, scale_by_temperature_squared=True, reduction="none"),
        lambda student, teacher: hinton(student, teacher, 3.0),
    ),
    **{
        f"GKD {beta}": (
            DivergenceLoss("jensen_shannon", beta=beta, temperature=1.5, reduction="none"),
            lambda student, teacher, beta=beta: gkd(student, teacher, beta, 1.5),
        )
        for beta in (0, 0.1, 0.5, 1)
    },
    **{
        f"TRL {beta}": (
            DivergenceLoss("jensen_shannon", beta=beta, temperature=0.9, reduction="none"),
            lambda student, teacher, beta=beta: trl_jsd(student, teacher, beta, 0.9),
        )
        for beta in (0.0, 0.7, 1.0)
    },
    "DistiLLM forward": (
        DivergenceLoss("skew_forward_kl", skew=0.1, reduction="none"),
        lambda student, teacher: distillm(student, teacher, 0.1, reverse=False),
    ),
    "DistiLLM reverse": (
        DivergenceLoss("skew_reverse_kl", skew=0.2, reduction="none"),
        lambda student, teacher: distillm(student, teacher, 0.2, reverse=True),
    ),
    "MiniLLM": (DivergenceLoss("reverse_kl", reduction="none"), minillm),
    "torchtune": (DivergenceLoss("cross_entropy", reduction="none"), torchtune_forward),
}


@pytest.mark.parametrize(("loss", "definition"), PAPERS.values(), ids=PAPERS)
def test_the_losses_of_the_papers(loss, definition):
    student, teacher = logits(3, 5, 40)
    actual, expected = loss(student, teacher), definition(student, teacher)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(-1, 2, 15, dtype=torch.float64).view(3, 5)
    torch.testing.assert_close(
        torch.autograd.grad((actual * weights).sum(), (student, teacher)),
        torch.autograd.grad((expected * weights).sum(), (student, teacher)),
        rtol=1e-8,
        atol=1e-12,
    )


def test_torchtune_forward_kl_over_labels():
    """torchtune divides the sum over positions whose label is not ignored by their number."""
    student, teacher = logits(3, 5, 40)
    labels = some_labels(3, 5, size=40)
    counted = labels != IGNORED
    expected = torchtune_forward(student, teacher)[counted].sum() / counted.sum()
    torch.testing.assert_close(DivergenceLoss("cross_entropy")(student, teacher, labels=labels), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [None, 4])
def test_options_reach_the_operation(kind, top_k):
    student, teacher = logits(2, 6, 30)
    mask = torch.arange(12).view(2, 6) % 3 != 0
    options = {"support": "renormalize", "temperature": 1.3, "max_chunk_bytes": 5000}
    options |= {"beta": 0.3} if kind == "jensen_shannon" else {"skew": 0.4} if "skew" in kind else {}
    loss = DivergenceLoss(kind, top_k=top_k, reduction="sum", **options)
    expected = divergences(student, teacher, kind, top_k=top_k, mask=mask, **options)[kind].sum()
    torch.testing.assert_close(loss(student, teacher, mask=mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_hard_labels(weight):
    """(1 − w)·T²·D + w·CE, with the cross-entropy at temperature 1."""
    student, teacher = logits(3, 5, 40)
    labels = some_labels(3, 5, size=40)
    counted = labels != IGNORED
    loss = DivergenceLoss(
        "forward_kl", temperature=2.0, scale_by_temperature_squared=True, hard_label_weight=weight, reduction="mean"
    )
    hard = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    expected = (1 - weight) * hinton(student, teacher, 2.0)[counted].mean() + weight * hard
    actual = loss(student, teacher, labels=labels)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad(actual, student)
    torch.testing.assert_close(got, torch.autograd.grad(expected, student), rtol=1e-8, atol=1e-12)


def test_a_weight_of_one_does_not_see_an_infinite_divergence():
    student, teacher = logits(2, 5)
    with torch.no_grad():
        student[:, 0] = -torch.inf
    loss = DivergenceLoss("forward_kl", hard_label_weight=1.0)(student, teacher, labels=torch.tensor([1, 2]))
    torch.testing.assert_close(loss, F.cross_entropy(student, torch.tensor([1, 2])))


@pytest.mark.parametrize("ignored", [IGNORED, -1, 3])
def test_which_positions_count(ignored):
    """A mask decides alone; without one the labels do; hard labels count where both agree."""
    student, teacher = logits(2, 6, 10)
    labels = torch.tensor([[1, 2, ignored, 4, ignored, 0], [ignored, 5, 6, ignored, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]])
    soft = gkd(student, teacher, 0, 1.0)
    hard = -student.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    labelled = (labels != ignored).double()
    options = {"ignore_index": ignored, "hard_label_weight": 0.5, "reduction": "none"}
    loss = DivergenceLoss("forward_kl", **options)
    torch.testing.assert_close(loss(student, teacher, labels=labels), labelled * (soft + hard) / 2)
    torch.testing.assert_close(loss(student, teacher, labels=labels, mask=mask), mask * (soft + labelled * hard) / 2)
    mean = DivergenceLoss("forward_kl", **(options | {"reduction": "mean"}))
    expected = (mask * (soft + labelled * hard) / 2).sum() / 6
    torch.testing.assert_close(mean(student, teacher, labels=labels, mask=mask), expected)
    soft_only = DivergenceLoss("forward_kl", ignore_index=ignored)
    torch.testing.assert_close(soft_only(student, teacher, labels=labels), (labelled * soft).sum() / labelled.sum())
    torch.testing.assert_close(soft_only(student, teacher), soft.mean())


def test_what_does_not_count_is_never_read():
    student, teacher = logits(2, 4, 10)
    labels = torch.tensor([[1, IGNORED, 2, 3], [IGNORED, 4, 5, IGNORED]])
    expected = DivergenceLoss("jeffreys", hard_label_weight=0.3)(student, teacher, labels=labels)
    poisoned = [side.detach().clone() for side in (student, teacher)]
    poisoned[0][labels == IGNORED] = torch.nan
    poisoned[1][labels == IGNORED] = torch.inf
    poisoned = [side.requires_grad_() for side in poisoned]
    actual = DivergenceLoss("jeffreys", hard_label_weight=0.3)(*poisoned, labels=labels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(actual, poisoned), torch.autograd.grad(expected, (student, teacher)), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(2, 4, 10), (0, 10), (0, 4, 10)])
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_nothing_counted_is_exactly_zero_with_a_graph(shape, num_items):
    student, teacher = logits(*shape)
    with torch.no_grad():
        student.fill_(torch.nan)
    labels = torch.full(shape[:-1], IGNORED)
    loss = DivergenceLoss("jensen_shannon", hard_label_weight=0.5)(student, teacher, labels=labels, num_items=num_items)
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()
    assert (teacher.grad == 0).all()


def test_reductions_and_denominators():
    student, teacher = logits(2, 6, 10)
    labels = some_labels(2, 6, size=10)
    count = (labels != IGNORED).sum().item()
    arguments = {"student": student, "teacher": teacher, "labels": labels}
    none, total, mean = (
        DivergenceLoss("reverse_kl", hard_label_weight=0.2, reduction=name)(**arguments)
        for name in ("none", "sum", "mean")
    )
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(mean, total / count)
    loss = DivergenceLoss("reverse_kl", hard_label_weight=0.2)
    for num_items in (30, 30.0, torch.tensor(30), torch.tensor([30.0])):
        value = loss(**arguments, num_items=num_items)
        assert value.shape == ()
        torch.testing.assert_close(value, total / 30)


def test_the_count_does_not_choose_the_losss_dtype():
    student, teacher = logits(2, 6, 10, dtype=torch.bfloat16)
    value = DivergenceLoss("jeffreys")(student, teacher, num_items=torch.tensor(12.0, dtype=torch.float64))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, DivergenceLoss("jeffreys")(student, teacher))


def test_micro_batches_with_the_global_count_give_the_whole_batch():
    student, teacher = logits(8, 6, 10)
    labels = some_labels(8, 6, size=10)
    labels[2:4] = IGNORED  # one micro-batch has nothing to learn from
    loss = DivergenceLoss("forward_kl", hard_label_weight=0.5, temperature=2.0)
    whole = torch.autograd.grad(loss(student, teacher, labels=labels), student)
    count = (labels != IGNORED).sum()
    for start in range(0, 8, 2):
        part = slice(start, start + 2)
        loss(student[part], teacher[part], labels=labels[part], num_items=count).backward()
    torch.testing.assert_close((student.grad,), whole, rtol=1e-12, atol=1e-14)


def test_shared_vocabulary_reads_views():
    student, teacher = logits(2, 3, 12)
    wide_teacher = torch.cat([teacher.detach(), torch.full((2, 3, 4), 50.0, dtype=torch.float64)], -1)
    labels = some_labels(2, 3, size=10)
    loss = DivergenceLoss("forward_kl", shared_vocab=10, hard_label_weight=0.5)
    actual = loss(student, wide_teacher, labels=labels)
    narrow = student.detach()[..., :10].clone().requires_grad_()
    expected = DivergenceLoss("forward_kl", hard_label_weight=0.5)(
        narrow, teacher.detach()[..., :10].clone(), labels=labels
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(actual, student)
    assert (gradient[..., 10:] == 0).all()
    torch.testing.assert_close(gradient[..., :10], torch.autograd.grad(expected, narrow)[0], rtol=0, atol=0)


def test_nothing_is_copied_or_kept_beyond_the_logits():
    """Shifted and narrowed views are saved as they lie: no storage of the logits' size but the inputs' own."""
    student, teacher = logits(4, 33, 1000, dtype=torch.float32)
    labels = some_labels(4, 33, size=900)
    loss = DivergenceLoss("jensen_shannon", shared_vocab=900, hard_label_weight=0.5)
    inputs, kept = {side.untyped_storage().data_ptr() for side in (student, teacher)}, 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in inputs:
            kept += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(student[:, :-1], teacher[:, :-1], labels=labels[:, 1:])
    assert kept <= 64 * 4 * 33  # bytes per position, not per logit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_and_autocast_do_not_touch_the_value(dtype):
    """Student close to teacher, where arithmetic in bfloat16 gives negative divergences."""
    student, teacher = logits(4, 9, 500, noise=0.05, dtype=dtype)
    labels = some_labels(4, 9, size=500)
    loss = DivergenceLoss("jensen_shannon", hard_label_weight=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        actual = loss(student, teacher, labels=labels)
    wide = [side.detach().double().requires_grad_() for side in (student, teacher)]
    counted = labels != IGNORED
    soft = gkd(*wide, 0.5, 1.0)[counted].mean()
    expected = 0.9 * soft + 0.1 * F.cross_entropy(wide[0].flatten(0, 1), labels.flatten())
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(actual, student)
    (reference,) = torch.autograd.grad(expected, wide[0])
    rounding = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert gradient.dtype == dtype
    assert (gradient.double() - reference).norm() <= rounding * reference.norm()


def test_compiled_with_dynamic_shapes():
    loss = DivergenceLoss("skew_forward_kl", top_k=5, hard_label_weight=0.3, temperature=2.0, shared_vocab=20)

    def step(student: Tensor, teacher: Tensor, labels: Tensor, num_items: Tensor) -> Tensor:
        return loss(student[:, :-1], teacher[:, :-1], labels=labels[:, 1:], num_items=num_items)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 7), (4, 9)):
            student, teacher = logits(batch, length, 21, dtype=torch.float32)
            arguments = (student, teacher, some_labels(batch, length, size=20), torch.tensor(11))
            results = []
            for function in (step, compiled):
                value = function(*arguments)
                results.append((value, *torch.autograd.grad(value, (student, teacher))))
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_checkpointing_gives_the_same_gradient():
    student, teacher = logits(2, 5, 30)
    labels = some_labels(2, 5, size=30)
    loss = DivergenceLoss("jeffreys", hard_label_weight=0.5)
    expected = torch.autograd.grad(loss(student, teacher, labels=labels), student)
    again = checkpoint(loss, student, teacher, labels=labels, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, student), expected, rtol=0, atol=0)


def test_copies_pickles_and_repr():
    student, teacher = logits(2, 5, 30)
    loss = DivergenceLoss("jensen_shannon", beta=0.2, top_k=7, temperature=2.0)
    assert not loss.state_dict()
    assert not list(loss.parameters())
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(other(student, teacher), loss(student, teacher), rtol=0, atol=0)
    assert repr(loss) == "DivergenceLoss('jensen_shannon', top_k=7, temperature=2.0, beta=0.2)"


def test_both_sides_get_gradients_unless_detached():
    student, teacher = logits(2, 5, 30)
    loss = DivergenceLoss("jensen_shannon", hard_label_weight=0.5)
    labels = some_labels(2, 5, size=30)
    loss(student, teacher.detach(), labels=labels).backward()
    assert teacher.grad is None
    alone = student.grad.clone()
    student.grad = None
    loss(student, teacher, labels=labels).backward()
    torch.testing.assert_close(student.grad, alone, rtol=0, atol=0)
    assert teacher.grad.norm() > 0
    assert teacher.grad.sum(-1).abs().max() < 1e-15  # a constant added to a row's logits changes nothing


def _data_parallel(rank: int, directory: str) -> None:
    """One of two processes, with uneven numbers of counted tokens."""
    model, hidden, teacher, labels = _linear_problem()
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    loss = DivergenceLoss("forward_kl", hard_label_weight=0.5)
    count = (labels[part] != IGNORED).sum()
    torch.distributed.all_reduce(count)
    value = loss(parallel(hidden[part]), teacher[part], labels=labels[part], num_items=count) * 2
    value.backward()
    if rank == 0:
        torch.save(model.weight.grad, f"{directory}/gradient.pt")


def _linear_problem() -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 20, dtype=torch.float64)
    hidden, teacher = torch.randn(5, 7, 8, dtype=torch.float64), torch.randn(5, 7, 20, dtype=torch.float64)
    labels = some_labels(5, 7, size=20)
    labels[:2, 2:] = IGNORED
    return model, hidden, teacher, labels


def test_two_processes_give_the_gradient_of_one(tmp_path):
    model, hidden, teacher, labels = _linear_problem()
    DivergenceLoss("forward_kl", hard_label_weight=0.5)(model(hidden), teacher, labels=labels).backward()
    in_processes(2, _data_parallel, str(tmp_path))
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), model.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "kind must be among .*got 'kl'. Did you mean 'forward_kl' or 'reverse_kl'"),
        ({"kind": {"foward_kl": 1.0}}, ValueError, r"kind must be among .*Did you mean 'forward_kl'"),
        ({"kind": ["jeffreys"]}, TypeError, "kind must be a string or a mapping from kinds to weights; got list"),
        ({"kind": {}}, ValueError, "kind must have a weight above 0; got {}"),
        ({"kind": {"jeffreys": 0.0}}, ValueError, "kind must have a weight above 0; got {'jeffreys': 0.0}"),
        (
            {"kind": {"jeffreys": -1.0}},
            ValueError,
            r"kind\['jeffreys'\] must be a finite weight of at least 0; got -1.0",
        ),
        ({"kind": {"jeffreys": math.inf}}, ValueError, r"kind\['jeffreys'\] must be a finite weight"),
        ({"kind": {"jeffreys": math.nan}}, ValueError, r"kind\['jeffreys'\] must be a finite weight"),
        ({"kind": {"jeffreys": "1"}}, TypeError, r"kind\['jeffreys'\] must be a number; got str"),
        ({"top_k": 0}, ValueError, "top_k must be None or at least 1; got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int or None; got float"),
        ({"top_k": 9, "shared_vocab": 5}, ValueError, "top_k must be between 1 and the vocabulary's size, 5; got 9"),
        ({"shared_vocab": True}, TypeError, "shared_vocab must be an int or None; got bool"),
        ({"support": "full"}, ValueError, "support must be one of"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite; got 0.0"),
        ({"temperature": torch.ones(3)}, TypeError, "temperature must be a number; got Tensor"),
        ({"temperature": "2"}, TypeError, "temperature must be a number; got str"),
        ({"beta": 0.5}, ValueError, "beta=0.5 has no use: only jensen_shannon take beta; asked for are jeffreys"),
        ({"kind": "jensen_shannon", "beta": 1.1}, ValueError, "beta must be between 0 and 1; got 1.1"),
        ({"kind": "jensen_shannon", "beta": math.nan}, ValueError, "beta must be between 0 and 1; got nan"),
        ({"kind": "jensen_shannon", "skew": 0.1}, ValueError, "skew=0.1 has no use"),
        ({"kind": {"jeffreys": 1, "forward_kl": 2}, "beta": 0.1}, ValueError, "beta=0.1 has no use"),
        ({"top_k_of": "noisy"}, ValueError, "top_k_of must be one of both, student, teacher; got 'noisy'"),
        ({"label_smoothing": 0.1}, ValueError, "hard_label_weight must be above 0"),
        ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be between 0 and 1; got -0.1"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes must be positive; got 0"),
        ({"beta": "a"}, TypeError, "beta must be a number; got str"),
        ({"kind": "skew_reverse_kl", "skew": -0.1}, ValueError, "skew must be at least 0"),
        ({"hard_label_weight": 1.5}, ValueError, "hard_label_weight must be between 0 and 1; got 1.5"),
        ({"hard_label_weight": "a"}, TypeError, "hard_label_weight must be a number; got str"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int; got NoneType"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none; got 'batchmean'"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
    ],
)
def test_settings_are_checked_when_the_loss_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        DivergenceLoss(**({"kind": "jeffreys"} | arguments))


@pytest.mark.parametrize(
    ("settings", "arguments", "error", "message"),
    [
        ({}, {"teacher": torch.zeros(2, 7)}, ValueError, "have 5 and 7 columns; shared_vocab=n"),
        (
            {},
            {"teacher": torch.zeros(3, 5)},
            ValueError,
            "student and teacher must have one shape",
        ),
        ({}, {"teacher": torch.zeros(2, 5).long()}, TypeError, "teacher must be float32"),
        ({"shared_vocab": 6}, {}, ValueError, r"student needs shared_vocab=6 .*got shape \(2, 5\)"),
        ({"shared_vocab": 1}, {"teacher": torch.tensor(1.0)}, ValueError, r"teacher needs .*shape \(\)"),
        ({"top_k": 6}, {}, ValueError, "top_k must be between 1 and the vocabulary's size, 5; got 6"),
        ({"hard_label_weight": 0.5}, {}, ValueError, "hard_label_weight=0.5 needs labels; got None"),
        ({}, {"labels": torch.zeros(2)}, TypeError, "labels must be integers; got torch.float32"),
        ({}, {"labels": torch.zeros(3).long()}, ValueError, r"labels must have the row shape \(2,\); got \(3,\)"),
        ({"hard_label_weight": 0.5}, {"labels": torch.tensor([1, 5])}, ValueError, "labels must be less than"),
        ({}, {"mask": torch.ones(2, 5)}, ValueError, "mask must have the shape of student without its last"),
        ({"reduction": "sum"}, {"num_items": 3}, ValueError, "num_items belongs to reduction='mean'"),
        ({}, {"num_items": torch.ones(2, 1)}, ValueError, r"num_items must have one element; got shape \(2, 1\)"),
        ({}, {"mask": torch.tensor([1.0, 0.5])}, ValueError, "mask must be .*got 0.5.*DivergenceLoss's weights"),
        ({}, {"mask": torch.tensor([1, -100])}, ValueError, "mask must be bool, or numbers equal to 0 or 1; got -100"),
        ({}, {"labels": torch.tensor([True, False])}, TypeError, "labels must be integers; got torch.bool"),
        ({}, {"weights": torch.tensor([True, False])}, TypeError, "weights must be real .*torch.bool .*is a mask"),
        ({}, {"weights": torch.ones(3)}, ValueError, r"weights must have the row shape \(2,\); got \(3,\)"),
        ({}, {"weights": [1.0, 2.0]}, TypeError, "weights must be a torch.Tensor or None; got list"),
        ({}, {"weights": torch.tensor([1.0, -2.0])}, ValueError, "weights must be finite and at least 0; got -2"),
        ({}, {"weights": torch.tensor([1.0, math.nan])}, ValueError, "weights must be finite and at least 0; got nan"),
        ({}, {"weights": torch.tensor([1.0, math.inf])}, ValueError, "weights must be finite and at least 0; got inf"),
        ({}, {"weights": torch.ones(2, device="meta")}, ValueError, "weights and student must be on one device"),
        ({}, {"num_items": "3"}, TypeError, "num_items must be a number"),
        ({}, {"num_items": -3}, ValueError, "num_items must not be negative; got -3"),
    ],
)
def test_calls_are_checked_at_the_door(settings, arguments, error, message):
    defaults = {"student": torch.zeros(2, 5), "teacher": torch.zeros(2, 5)}
    with pytest.raises(error, match=message):
        DivergenceLoss("jeffreys", **settings)(**(defaults | arguments))


def test_closed_form():
    student = torch.tensor([[0.0, 0.0]])
    teacher = torch.tensor([[0.0, math.log(4.0)]])
    expected = 0.2 * math.log(0.4) + 0.8 * math.log(1.6)
    assert DivergenceLoss("forward_kl")(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    value = DivergenceLoss("forward_kl", hard_label_weight=0.25)(student, teacher, labels=torch.tensor([1])).item()
    assert value == pytest.approx(0.75 * expected + 0.25 * math.log(2), rel=1e-6)


def test_a_negative_label_that_is_not_ignore_index_is_refused():
    loss = DivergenceLoss("forward_kl", hard_label_weight=0.5, ignore_index=0)
    with pytest.raises(ValueError, match="class indices or ignore_index=0; got -100"):
        loss(torch.zeros(2, 5), torch.zeros(2, 5), labels=torch.tensor([-100, 2]))
