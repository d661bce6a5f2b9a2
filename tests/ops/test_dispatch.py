import importlib.util
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sgfast
from sgfast.ops import dispatch, hidden_distances

X = torch.ones(2, 3)
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("SGFAST_IMPL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("argument", "context", "environment"), list(itertools.product([None, "torch", "compile"], repeat=3))
)
def test_precedence(monkeypatch, argument, context, environment):
    if environment:
        monkeypatch.setenv("SGFAST_IMPL", environment)
    with sgfast.use_impl(context):
        choice = dispatch.select(argument, "no kernel")
    assert choice.implementation == (argument or context or environment or "torch")
    source = (
        f"impl={argument!r}"
        if argument
        else f"use_impl({context!r})"
        if context
        else f"SGFAST_IMPL={environment}"
        if environment
        else "no kernel"
    )
    assert choice.reason == source


def test_an_inner_context_wins_and_ends():
    with sgfast.use_impl("torch"):
        with sgfast.use_impl("compile"):
            assert dispatch.select(None, None).implementation == "compile"
        assert dispatch.select(None, None).implementation == "torch"


def test_a_context_ends_with_an_exception():
    with pytest.raises(KeyError), sgfast.use_impl("compile"):
        raise KeyError
    assert dispatch.select(None, "no kernel").reason == "no kernel"


def test_auto_takes_the_kernel_where_it_can_run(monkeypatch):
    assert dispatch.select(None, None).implementation == "triton"
    assert dispatch.select("auto", None).implementation == "triton"
    assert dispatch.select(None, "float64") == ("torch", "float64")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select(None, None) == ("torch", "auto does not choose the Triton interpreter")
    assert dispatch.select("triton", None).implementation == "triton"


def test_auto_overrides_an_outer_choice():
    with sgfast.use_impl("compile"):
        assert dispatch.select("auto", "no kernel").implementation == "torch"


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_a_choice_that_cannot_run_raises_and_says_why(monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("SGFAST_IMPL", "triton")
    sources = {"argument": r"impl='triton'", "context": r"use_impl\('triton'\)", "environment": "SGFAST_IMPL=triton"}
    reason = r"cpu tensors \(Triton needs a GPU, or TRITON_INTERPRET=1" if HAS_TRITON else "triton is not installed"
    with (
        sgfast.use_impl("triton" if how == "context" else None),
        pytest.raises(RuntimeError, match=f"{sources[how]} cannot run: {reason}"),
    ):
        hidden_distances(X, X, impl="triton" if how == "argument" else None)


def test_explain_gives_the_reason():
    choice = sgfast.explain(hidden_distances, X, X)
    assert choice.implementation == "torch"
    assert ("cpu tensors" if HAS_TRITON else "triton is not installed") in choice.reason
    assert sgfast.explain(hidden_distances, X, X, impl="compile") == ("compile", "impl='compile'")
    assert (
        sgfast.explain(hidden_distances, noisy=X, clean=X, mask=None, eps=1e-3, impl="torch").implementation == "torch"
    )
    with pytest.raises(RuntimeError, match="impl='triton' cannot run"):
        sgfast.explain(hidden_distances, X, X, impl="triton")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_explain_on_gpu_tensors():
    with FakeTensorMode():
        x = torch.empty(4, 6, 8, device="cuda")
        wide = torch.empty(4, 6, 8, device="cuda", dtype=torch.float64)
        assert sgfast.explain(hidden_distances, x, x) == ("triton", "GPU tensors that the kernel supports")
        without_last = torch.empty_strided((4, 5, 8), (48, 8, 1), device="cuda")
        assert sgfast.explain(hidden_distances, without_last, without_last).implementation == "triton"
        refusal = "noisy is float64 (the kernels compute in float32)"
        assert sgfast.explain(hidden_distances, wide, x) == ("torch", refusal)
        by_columns = torch.empty_strided((4, 6, 8), (48, 1, 6), device="cuda")
        choice = sgfast.explain(hidden_distances, x, by_columns)
        assert choice.implementation == "torch"
        assert choice.reason.startswith("clean has strides (48, 1, 6)")


def test_errors(monkeypatch):
    with pytest.raises(
        TypeError, match=r"operation of sgfast.ops \(.*hidden_distances.*\); got <built-in function len>"
    ):
        sgfast.explain(len, X)
    with pytest.raises(TypeError, match="clean"):
        sgfast.explain(hidden_distances, X)
    with pytest.raises(ValueError, match="impl must be one of auto, torch, compile, triton; got 'gpu'"):
        sgfast.explain(hidden_distances, X, X, impl="gpu")
    with pytest.raises(ValueError, match="got 'gpu'"), sgfast.use_impl("gpu"):
        pass
    monkeypatch.setenv("SGFAST_IMPL", "gpu")
    with pytest.raises(ValueError, match=r"environment variable SGFAST_IMPL must be one of .*; got 'gpu'"):
        hidden_distances(X, X)


def test_compile_without_a_compiler_says_so(monkeypatch):
    def body(x):
        raise AssertionError

    monkeypatch.setattr(dispatch.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"impl='compile' cannot run \(no C\+\+ compiler was found\)"):
        dispatch.implementation_of(body, "compile")(X)
