"""What PyTorch asks of the presets' operators: compiled, exported, differentiated twice, on fake GPUs."""

import pytest
import torch
from torch import Tensor

from sgfast.loss.presets import KD_LOSS_MAP, MATCH_LOSS_MAP, TEMPERATURE_SCHEDULER
from tests import registration


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attention(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(draw(rows, 2, 4, 4, dtype=dtype, seed=seed) for seed in (0, 1))


def masked_attention(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student, teacher = attention(rows, dtype)
    mask = torch.arange(rows * 4).view(rows, 4) % 3 != 0
    student.permute(0, 2, 1, 3)[~mask] = float("nan")
    student.permute(0, 3, 1, 2)[~mask] = float("nan")
    return student, teacher, mask


def logits(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student, teacher = (draw(rows, 6, dtype=dtype, seed=seed) for seed in (0, 1))
    mask = torch.arange(rows) % 3 != 0
    student[~mask] = float("nan")
    return student, teacher, mask


def layers(length: int, widths: tuple[int, int, int, int]):
    def arguments(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        found = [draw(rows, length, width, dtype=dtype, seed=seed) for seed, width in enumerate(widths)]
        mask = torch.arange(rows * length).view(rows, length) % 3 != 0
        found[1][~mask] = float("nan")
        return *found, mask

    return arguments


def match(name: str):
    return lambda student, teacher, mask=None: MATCH_LOSS_MAP[name](student, teacher, mask)


def pair_match(name: str):
    return lambda s, s_to, t, t_to, mask: MATCH_LOSS_MAP[name]([s, s_to], [t, t_to], mask)


def scheduled(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    temperature = TEMPERATURE_SCHEDULER["flsw", 0.1, 1](student, teacher, 2.0, mask=mask)
    return KD_LOSS_MAP["mse"](student, teacher, temperature.detach(), mask=mask)


def hidden(rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student, teacher = (draw(rows, 4, 6, dtype=dtype, seed=seed) for seed in (0, 1))
    mask = torch.arange(rows * 4).view(rows, 4) % 3 != 0
    teacher[~mask] = float("nan")
    return student, teacher, mask


CASES = [
    registration.Case("attention_ce", match("attention_ce"), attention),
    registration.Case("attention_mse masked", match("attention_mse"), masked_attention),
    registration.Case("attention_ce masked", match("attention_ce"), masked_attention),
    registration.Case("kd mse", lambda s, t, mask: KD_LOSS_MAP["mse"](s, t, 2.0, mask=mask), logits),
    registration.Case("cos", match("cos"), hidden),
    registration.Case("fsp direct", pair_match("fsp"), layers(6, (3, 4, 3, 4))),
    registration.Case("fsp dual", pair_match("fsp"), layers(2, (11, 12, 11, 12))),
    registration.Case("nst direct", pair_match("nst"), layers(4, (6, 6, 6, 6))),
    registration.Case("nst dual", pair_match("nst"), layers(12, (2, 2, 1, 1))),
]


@pytest.mark.parametrize("check", registration.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_registration(check, case):
    check(case)


def test_schedulers_compile_and_have_no_gradient():
    student, teacher, mask = (one.requires_grad_(one.is_floating_point()) for one in logits(5, torch.float64))
    compiled = torch.compile(scheduled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher, mask), scheduled(student, teacher, mask))
    assert not TEMPERATURE_SCHEDULER["cwsm", 1](student, teacher, 2.0).requires_grad
