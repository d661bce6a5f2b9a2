"""Seeds of noise: the forward's in every recomputation, and another in every process, fork, thread and device."""

import functools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from sgfast.noise_layer import CloakNoiseLayer, seeds
from sgfast.ops import standard_normal
from tests.processes import in_processes

WIDTH = 16
CPU = torch.device("cpu")
REFUSED = "(without a seed|with a fixed seed).* recomputed"


def make_layer(seed=None):
    return CloakNoiseLayer((1, WIDTH), scale=(1e-3, 2.0), rhos_init=0.0, seed=seed)


@pytest.fixture
def inputs():
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()


def assert_gradient_is_of_the_forwards_noise(layer, run, inputs):
    """∂/∂sigma of Σ output² is 2·output·eps, with the eps that made this output."""
    output = run(inputs)
    seed = layer.forward_seed.clone()
    output.square().sum().backward()
    (of_rhos,) = torch.autograd.grad(layer.parameterization(layer.rhos).sum(), layer.rhos)
    expected = (2 * output.detach() * standard_normal(output.shape, seed)).sum(0) * of_rhos
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(layer.rhos.grad, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_forwards_noise(use_reentrant, inputs):
    layer = make_layer()
    assert_gradient_is_of_the_forwards_noise(layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), inputs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, 7])
def test_checkpointing_that_cannot_repeat_it_is_refused(seed, use_reentrant, inputs):
    layer = make_layer(seed)
    output = checkpoint(layer, inputs, use_reentrant=use_reentrant, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=REFUSED):
        output.sum().backward()


def test_a_seed_for_the_forward_is_repeated_whatever_the_state(inputs):
    for layer in (make_layer(), make_layer(7)):
        run = functools.partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False, seed=torch.tensor(5))
        assert_gradient_is_of_the_forwards_noise(layer, run, inputs)


def test_numbers_of_a_stream_that_was_set_back_do_not_count(inputs):
    layer = make_layer()
    torch.manual_seed(3)
    layer(inputs), layer(inputs)
    torch.manual_seed(3)
    output = checkpoint(layer, inputs, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match=REFUSED):  # it would draw the second number from before
        output.sum().backward()


def test_many_forwards_may_wait_for_their_backward(inputs):
    layer = make_layer()
    outputs = [checkpoint(layer, inputs, use_reentrant=False) for _ in range(50)]
    noise = sum(standard_normal(inputs.shape, layer_seed) for layer_seed in drawn_again(50))
    sum(output.sum() for output in outputs).backward()
    (of_rhos,) = torch.autograd.grad(layer.parameterization(layer.rhos).sum(), layer.rhos)
    torch.testing.assert_close(layer.rhos.grad, noise.sum(0) * of_rhos, rtol=1e-4, atol=1e-4)


def drawn_again(count):
    torch.manual_seed(0)  # as before every test
    return [torch.randint(-(2**63), 2**63 - 1, (1,)) for _ in range(count)]


@pytest.mark.parametrize("seed", [None, 7])
def test_a_compiled_layer_has_the_forwards_noise_in_backward_or_is_refused(seed, inputs):
    """The partitioner computes again what a budget of activations does not let it keep."""
    for budget in (1, 0.5):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            torch._dynamo.reset()
            layer = make_layer(seed)
            compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
            assert_gradient_is_of_the_forwards_noise(layer, compiled, inputs)
    with torch._functorch.config.patch(activation_memory_budget=0):
        torch._dynamo.reset()
        compiled = torch.compile(make_layer(seed), backend="aot_eager_decomp_partition", fullgraph=True)
        output = compiled(inputs)
        with pytest.raises(RuntimeError, match=REFUSED if seed is None else "modified by an inplace operation"):
            output.sum().backward()
        layer = make_layer(seed)
        compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
        given = torch.tensor([5])
        assert_gradient_is_of_the_forwards_noise(layer, lambda x: compiled(x, seed=given), inputs)


@pytest.mark.parametrize("seed", [None, 7])
def test_checkpointing_inside_a_compiled_function(seed, inputs):
    torch._dynamo.reset()
    layer = make_layer(seed)

    @torch.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    def run(x):
        return checkpoint(layer, x, use_reentrant=False)

    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        if seed is None:
            assert_gradient_is_of_the_forwards_noise(layer, run, inputs)
        else:
            with pytest.raises(RuntimeError):
                run(inputs).sum().backward()


@pytest.mark.parametrize("seed", [None, 7])
def test_two_forwards_in_one_graph_are_two_draws(seed, inputs):
    torch._dynamo.reset()
    layer, eager = make_layer(seed), make_layer(seed)
    compiled = torch.compile(lambda x: (layer(x), layer(x)), backend="aot_eager_decomp_partition", fullgraph=True)
    torch.manual_seed(5)
    first, second = compiled(inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    torch.testing.assert_close((first, second), (eager(inputs), eager(inputs)))


def test_the_operators_are_registered_as_pytorch_asks():
    draw = seeds._SeedDraw(torch.empty(1, dtype=torch.int64))
    count = seeds._ForwardCount(torch.zeros((), dtype=torch.int64), 7, torch.empty(0, dtype=torch.int64))
    for operator, arguments in ((seeds._draw_seed, draw), (seeds._count_forward, count)):
        torch.library.opcheck(operator.overload, operator.flat(arguments))


def draws(seed, count=2):
    """Seeds of a layer's next forwards, after a state that every process has."""
    torch.manual_seed(0)
    layer = make_layer(seed)
    made = []
    for _ in range(count):
        layer(torch.zeros(1, WIDTH))
        made.append(layer.forward_seed.item())
    return made


def _on_a_rank(rank, folder):
    first = {seed: draws(seed) for seed in (None, 7)}
    assert first == {seed: draws(seed) for seed in (None, 7)}
    state = torch.get_rng_state()
    layer = make_layer()
    one = layer(torch.zeros(1, WIDTH))
    torch.set_rng_state(state)
    assert torch.equal(layer(torch.zeros(1, WIDTH)), one)
    with open(f"{folder}/{rank}", "wb") as file:
        pickle.dump(first, file)


def test_ranks_of_one_torch_seed_draw_different_noise(tmp_path):
    in_processes(2, _on_a_rank, str(tmp_path))
    zero, one = (pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2))
    for seed in (None, 7):
        assert zero[seed] == draws(seed)  # a process that is alone is rank 0
        assert not set(zero[seed]) & set(one[seed])


def test_a_launchers_rank_counts_before_there_is_a_group(monkeypatch):
    alone = {seed: draws(seed) for seed in (None, 7)}
    made = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        made.append({seed: draws(seed) for seed in (None, 7)})
    assert made[0] == alone
    assert len({number for one in made for numbers in one.values() for number in numbers}) == 12


def test_devices_of_one_generator_state_draw_different_noise():
    words = [seeds.process_word(torch.device("cuda", index)) for index in (None, 0, 1, 2)]
    assert words[:2] == [0, 0]
    assert len(set(words)) == 3


FORKED = """
import json
from tests.noise_layer.test_seeds import draws, in_forks

print(json.dumps([[draws(seed), *in_forks(seed)] for seed in (None, 7)]))
"""


def in_forks(seed, count=6):
    """What each of some forked processes draws, the last by a fork of its own."""

    def child(queue, generations):
        if generations > 1:
            process = context.Process(target=child, args=(queue, generations - 1))
            process.start()
            process.join()
        else:
            queue.put(draws(seed))

    context = multiprocessing.get_context("fork")
    made = []
    for index in range(count):
        queue = context.Queue()
        process = context.Process(target=child, args=(queue, 2 if index == count - 1 else 1))
        process.start()
        made.append(queue.get(timeout=60))
        process.join()
    return made


def test_forked_processes_draw_different_noise_and_repeat_it():
    """Also the fork of a fork; a program that is run again forks the same processes."""
    programs = [subprocess.Popen([sys.executable, "-c", FORKED], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (program.communicate()[0] for program in programs)
    assert first == second
    for seed, made in zip((None, 7), json.loads(first), strict=True):
        assert made[0] == draws(seed)
        assert len({number for numbers in made for number in numbers}) == 14


def test_a_graph_compiled_before_a_fork_draws_what_belongs_to_the_process(inputs):
    torch._dynamo.reset()
    layers = [make_layer(), make_layer(7)]
    compiled = [torch.compile(layer, backend="aot_eager", fullgraph=True) for layer in layers]
    x = inputs.detach()

    def draw():
        torch.manual_seed(0)
        for run in compiled:
            run(x)
        return [layer.forward_seed.item() for layer in layers]

    made = [draw()]
    for _ in range(2):
        for layer in layers:
            layer.forward_count.zero_()
        readable, writable = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(writable, pickle.dumps(draw()))
            os._exit(0)
        os.waitpid(process, 0)
        made.append(pickle.loads(os.read(readable, 1000)))
    assert len({number for numbers in made for number in numbers}) == 6


def test_a_rank_given_after_the_start_is_all_that_counts(monkeypatch):
    """A launcher that forks its processes repeats a run's noise when it launches again."""
    monkeypatch.setattr(seeds._children, "_fork", 12345)
    for inherited, given in ((None, "0"), (None, "1"), (0, "1")):
        monkeypatch.setattr(seeds._children, "_inherited_rank", inherited)
        monkeypatch.delenv("RANK", raising=False)
        if inherited is not None:
            monkeypatch.setenv("RANK", str(inherited))
        assert seeds.process_word(CPU) not in (0, 1)
        monkeypatch.setenv("RANK", given)
        assert seeds.process_word(CPU) == int(given)


def _spawned(path):
    with open(path, "wb") as file:
        pickle.dump({seed: draws(seed) for seed in (None, 7)}, file)


def test_spawned_processes_without_a_rank_draw_different_noise(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spawned, args=(str(tmp_path / str(index)),)) for index in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    made = [pickle.loads((tmp_path / str(index)).read_bytes()) for index in range(2)]
    for seed in (None, 7):
        assert len({*draws(seed), *made[0][seed], *made[1][seed]}) == 6


class Noised(Dataset):
    def __init__(self):
        self.layer = make_layer()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        self.layer(torch.zeros(1, WIDTH))
        return self.layer.forward_seed


def test_data_loader_workers_that_seed_themselves_alike_draw_different_noise():
    loader = DataLoader(Noised(), num_workers=2, worker_init_fn=lambda worker: torch.manual_seed(0))
    assert len(torch.cat(list(loader)).unique()) == 4


@pytest.mark.parametrize("seed", [None, 7])
def test_threads_draw_different_noise(seed):
    layer = make_layer(seed)
    made = []

    def draw():
        made.extend([layer._next_seed(CPU).item() for _ in range(300)])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=draw) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(set(made)) == len(made) == 1200


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(seeds, "REMEMBERED_DRAWS", 3)
    remembered = seeds._Draws()
    for state in range(5):
        remembered.remember(state)
    assert [state for state in range(5) if state in remembered] == [2, 3, 4]
    remembered.remember(3)
    assert [state for state in range(5) if state in remembered] == [2, 3]
