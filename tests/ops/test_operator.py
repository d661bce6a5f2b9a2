"""Operators whose arguments are declared once; what torch.compile keeps of them on the disk."""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import sgfast
from sgfast.ops.hidden.operator import Problem, forward
from sgfast.ops.operator import FORMULA, define, keep, kept

PACKAGE = Path(sgfast.__file__).parent


class Line(NamedTuple):
    """A tuple in the tuple below."""

    slope: float
    shift: Tensor | None = None


class Points(NamedTuple):
    """The arguments of an operator of these tests."""

    x: Tensor
    line: Line
    flags: Sequence[bool] = (True, False)
    label: str | None = None


class Upstream(NamedTuple):
    """The arguments of its backward."""

    points: Points
    upstream: Tensor


@define("line_of_tests", Points)
def line(points: Points) -> Tensor:
    assert isinstance(points.line, Line)
    found = points.line.slope * points.x
    if points.line.shift is not None:
        found = found + points.line.shift
    return found if points.flags[0] else -found


@line.register_fake
def _(points: Points) -> Tensor:
    return torch.empty_like(points.x)


def _setup(ctx: Any, points: Points, output: Tensor) -> None:
    keep(ctx, points, output, "constant")


def _gradients(ctx: Any, upstream: Tensor) -> dict[str, Tensor]:
    points, output, constant = kept(ctx)
    assert (type(points), type(points.line), constant) == (Points, Line, "constant")
    assert output.shape == points.x.shape
    x_wanted, shift_wanted = line.wanted(ctx, "x", "shift")
    assert x_wanted or shift_wanted
    sign = 1 if points.flags[0] else -1
    # The gradient of an argument that wants none is dropped: x may be without one.
    return {"shift": sign * upstream, "x": sign * points.line.slope * upstream}


line.register_gradients(_setup, _gradients)


def test_every_operator_carries_the_digest():
    for module in pkgutil.walk_packages(sgfast.__path__, "sgfast."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sgfast::")]
    assert len(names) >= 18
    for name in names:
        schema = getattr(torch.ops.sgfast, name.removeprefix("sgfast::").split(".")[0]).default._schema
        assert (schema.arguments[-1].name, str(schema.arguments[-1].type)) == ("formula", "str"), name


def test_the_schema_is_the_tuples_in_a_row():
    assert str(line.overload._schema) == (
        "sgfast::line_of_tests(Tensor x, float slope, Tensor? shift, bool[] flags, str? label, str formula) -> Tensor"
    )
    x, shift = torch.ones(2), torch.zeros(2)
    assert line.flat(Points(x, Line(2.0, shift), [False], "a")) == (x, 2.0, shift, [False], "a", FORMULA)
    assert line.flat(Points(x, Line(2.0))) == (x, 2.0, None, (True, False), None, FORMULA)


def test_values_and_gradients_by_name():
    x, shift = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([10.0, 20.0], requires_grad=True)
    assert line(Points(x, Line(3.0))).tolist() == [3.0, -6.0]
    values = line(Points(x, Line(3.0, shift), [False, True]))
    assert values.tolist() == [-13.0, -14.0]
    to_x, to_shift = torch.autograd.grad(values, [x, shift], torch.tensor([1.0, 2.0]))
    assert (to_x.tolist(), to_shift.tolist()) == ([-3.0, -6.0], [-1.0, -2.0])
    (alone,) = torch.autograd.grad(line(Points(x.detach(), Line(3.0, shift))).sum(), shift)
    assert alone.tolist() == [1.0, 1.0]
    named = line.overload(x=x, slope=3.0, shift=None, flags=[True], label=None, formula=FORMULA)
    assert named.tolist() == [3.0, -6.0]


def test_gradients_of_unknown_names_are_refused():
    @define("misspelt_of_tests", Line)
    def misspelt(arguments: Line) -> Tensor:
        assert arguments.shift is not None
        return arguments.slope * arguments.shift

    misspelt.register_gradients(lambda ctx, arguments, output: None, lambda ctx, upstream: {"shfit": upstream})
    values = misspelt(Line(2.0, torch.ones(2, requires_grad=True)))
    with pytest.raises(RuntimeError, match=r"sgfast::misspelt_of_tests has no arguments \['shfit'\]"):
        values.sum().backward()


@pytest.mark.parametrize("shift", [None, torch.ones(2, 3)])
def test_pytorch_is_content_with_the_registration(shift):
    x = torch.randn(2, 3, requires_grad=True)
    torch.library.opcheck(line.overload, line.flat(Points(x, Line(0.5, shift), [False, True], "a")))


def test_a_call_of_another_version_is_refused():
    x = torch.ones(2, 3)
    *arguments, formula = forward.flat(Problem(x, x, mask=None, eps=1e-8, impl=None))
    assert formula == FORMULA
    assert forward.overload(*arguments, formula)[0].tolist() == [[0.0] * 2] * 3 + [[1.0] * 2]
    with pytest.raises(RuntimeError, match=r"sgfast::hidden_distances as another version .*formula 0123abcd, here"):
        forward.overload(*arguments, "0123abcd")


PROGRAM = """
import json, torch, sgfast
from torch._dynamo.utils import counters
from sgfast.ops import hidden_distances

sides = [torch.tensor([[value, 0.0]], requires_grad=True) for value in (3.0, 1.0)]
values = torch.compile(lambda noisy, clean: hidden_distances(noisy, clean).l2, fullgraph=True)(*sides)
gradients = torch.autograd.grad(values.sum(), sides)
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps([sgfast.__file__, hits, values.tolist(), *(one.tolist() for one in gradients)]))
"""

# What may change between two versions while a call of the forward operator looks as it did: the gradients' formula, and
# the order of the arguments that the backward operator is called with.
CHANGES = {
    '    return {"noisy": to_noisy, "clean": to_clean}\n': '    return {"noisy": 2 * to_noisy, "clean": to_clean}\n',
    "    upstream: Tensor\n    row_scalars: Tensor\n": "    row_scalars: Tensor\n    upstream: Tensor\n",
    "problem, upstream, row_scalars, wanted = arguments": "problem, row_scalars, upstream, wanted = arguments",
    "BackwardProblem(problem, upstream, row_scalars,": "BackwardProblem(problem, row_scalars, upstream,",
}


def changed_package(folder: Path) -> Path:
    """The folder, with a copy of sgfast in it whose hidden distances are changed."""
    shutil.copytree(PACKAGE, folder / "sgfast", ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "sgfast" / "ops" / "hidden" / "operator.py"
    text = source.read_text()
    for old, new in CHANGES.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    source.write_text(text)
    return folder


def compiled_in_a_process(packages: Path, cache: Path) -> tuple[int, list[Any]]:
    """How many graphs came from the cache, and the value and gradients of `PROGRAM`, with the sgfast in a folder."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]),
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=packages, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    file, hits, *found = json.loads(run.stdout.splitlines()[-1])
    assert Path(file).parent.parent == packages
    return hits, found


def test_no_graph_of_another_version_is_taken_from_the_disk(tmp_path):
    cache, right = tmp_path / "cache", [[2.0], [[1.0, 0.0]], [[-1.0, 0.0]]]
    changed = [[2.0], [[2.0, 0.0]], [[-1.0, 0.0]]]
    assert compiled_in_a_process(PACKAGE.parent, cache) == (0, right)
    assert compiled_in_a_process(changed_package(tmp_path / "changed"), cache) == (0, changed)
    assert compiled_in_a_process(PACKAGE.parent, cache) == (1, right)
