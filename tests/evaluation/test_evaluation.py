"""An evaluation's figures against a naive computation in float64, and what they must not depend on."""

import json
import math
import random

import pytest
import torch

from sgfast.client import StainedGlassTransformForText
from sgfast.evaluation.budget import Budget, readable_bytes
from sgfast.evaluation.processes import Processes
from sgfast.evaluation.progress import PartWriter, Progress, Reached
from sgfast.evaluation.report import identity_of, read_metrics
from sgfast.evaluation.run import InterruptedEvaluationError, evaluate
from sgfast.evaluation.settings import (
    ATTACKS,
    EvaluationError,
    Settings,
    parse_attacks,
    parse_bytes,
    result_folders,
)
from sgfast.evaluation.subject import load_subject, record_noise_seed
from sgfast.evaluation.survey import Example, Survey, read_examples
from sgfast.training.data import as_chat
from sgfast.utils.records import Record, read_records
from tests.tiny_evaluation import records, save_transform
from tests.tiny_models import tiny_causal_lm

CHEAP = ("nearest", "farthest", "transformation")


class Watcher:
    """Counts records and, if told to, stops the evaluation by Ctrl-C's way at one of them."""

    def __init__(self, stop_after=None):
        self.stages, self.stop_after, self.done = [], stop_after, 0

    def begin(self, stage, total, unit):
        self.stages.append(stage)

    def advance(self, amount):
        if self.stages[-1] == "measuring" and amount:
            self.done += 1
            if self.done == self.stop_after:
                raise InterruptedEvaluationError


@pytest.fixture
def settings(model_folder, transform_file, data_file, tmp_path):
    def make(**options):
        given = {"out": tmp_path / "out", "attacks": CHEAP, "attack_tokens": 64, "save_seconds": 0.0} | options
        return Settings(model=str(model_folder), **({"transform": transform_file, "data": data_file} | given))

    return make


def run(base_model, settings, *, resume=False, watcher=None, chosen=True):
    subject = load_subject(base_model, settings)
    watcher = watcher or Watcher()
    identity = identity_of(settings)
    evaluate(settings, subject, identity, Processes(), watcher, resume=resume, attacks_are_chosen=chosen)
    return read_metrics(settings.out)


def without_budget(metrics):
    return {name: value for name, value in metrics.items() if name != "memory_budget"}


@torch.no_grad()
def naive(base_model, settings, top_k):
    """Everything at once, record by record, in float64 from the logits on."""
    client = StainedGlassTransformForText.from_pretrained(settings.transform)
    table = base_model.get_input_embeddings().weight.detach()
    sums, sequences, ranks, losses = {}, 0, [], {"clean": [], "noisy": []}
    for index, record in enumerate(read_records(settings.data)):
        inputs = client.tokenizer_wrapper(as_chat(record))
        ids, mask = inputs["input_ids"], inputs["noise_mask"]
        noisy = client.noise_layer(
            table[ids], mask, attention_mask=inputs["attention_mask"], seed=record_noise_seed(settings.seed, index)
        )
        clean_logits = base_model(inputs_embeds=table[ids]).logits.double()
        noisy_logits = base_model(inputs_embeds=noisy).logits.double()
        q, p = clean_logits.softmax(-1), noisy_logits.softmax(-1)
        m = (p + q) / 2
        support = torch.ones_like(p)
        if top_k is not None:
            support = sum(torch.zeros_like(p).scatter(-1, side.topk(top_k).indices, 1) for side in (p, q)).clamp(max=1)
        terms = {
            "next_token_utility/jefferys": (q - p) * (q.log() - p.log()),
            "next_token_utility/jensen_shannon": (q * (q / m).log() + p * (p / m).log()) / 2,
            "next_token_utility/total_variation": (q - p).abs() / 2,
            "next_token_utility/squared_hellinger_distance": (q.sqrt() - p.sqrt()).square() / 2,
        }
        for name, values in terms.items():
            sums[name] = sums.get(name, 0.0) + (values * support).sum(-1).mean().item()
        agreement = (clean_logits.argmax(-1) == noisy_logits.argmax(-1)).double().mean().item()
        sums["next_token_agreement"] = sums.get("next_token_agreement", 0.0) + agreement
        for side, probabilities in (("clean", q), ("noisy", p)):
            losses[side].append(-probabilities[0, :-1].log().gather(-1, ids[0, 1:, None]).squeeze(-1))
        distances = torch.cdist(noisy[mask].double()[None], table.double()[None])[0]
        ranks.append((distances < distances.gather(-1, ids[mask][:, None])).sum(-1))
        sequences += 1
    result = {name: value / sequences for name, value in sums.items()}
    result |= {f"{side}_perplexity": torch.cat(parts).mean().exp().item() for side, parts in losses.items()}
    return result, torch.cat(ranks)


@pytest.mark.parametrize("top_k", [None, 5])
def test_figures_equal_a_naive_computation_in_float64(base_model, settings, top_k):
    asked = settings(num_logits=top_k, beta=2)
    metrics = run(base_model, asked)
    utility, ranks = naive(base_model, asked, top_k)
    for name, value in utility.items():
        # Of two float32 logits that differ little, the difference has few digits.
        assert metrics["utility"][name] == pytest.approx(value, rel=2e-4), name
    size = len(base_model.get_input_embeddings().weight)
    for name, event in {
        "nearest_neighbor_failure_rate": ranks >= 2,
        "max_rank_failure_rate": ranks != size - 1,
        "token_transformation_rate_10": ranks >= 10,
        "symmetric_token_transformation_rate_100": (ranks >= 100) & (ranks < size - 100),
        "mean_reconstruction_rank": ranks,
    }.items():
        assert metrics["privacy"][name] == pytest.approx(event.double().mean().item(), rel=1e-12), name
    histogram = metrics["rank_histogram"]
    ends = [*histogram["first_ranks"][1:], size]
    counts = [int(((ranks >= a) & (ranks < b)).sum()) for a, b in zip(histogram["first_ranks"], ends, strict=True)]
    assert histogram["tokens"] == counts


def test_sequences_are_written_in_order_and_their_means_are_the_figures(base_model, settings, data_file):
    asked = settings()
    metrics = run(base_model, asked)
    lines = [json.loads(line) for line in (asked.out / "sequences.jsonl").read_text().splitlines()]
    read = list(read_records(data_file))
    assert [(line["index"], line["key"], line["line"]) for line in lines] == [
        (index, record.key, record.line) for index, record in enumerate(read)
    ]
    name = "next_token_utility/jefferys"
    assert math.fsum(line[name] for line in lines) / len(lines) == pytest.approx(metrics["utility"][name], rel=1e-12)
    tokens = [line["transformed_tokens"] for line in lines]
    name = "nearest_neighbor_failure_rate"
    failures = sum(count * line[name] for count, line in zip(tokens, lines, strict=True))
    assert failures / sum(tokens) == pytest.approx(metrics["privacy"][name], rel=1e-12)
    assert metrics["data"]["transformed_tokens"] == sum(tokens)
    assert metrics["data"]["tokens"] == sum(line["tokens"] for line in lines)
    for picture in ("divergences.png", "ranks.png"):
        assert (asked.out / picture).read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_evaluation_goes_on_to_the_same_bytes(base_model, settings, tmp_path):
    """Twice interrupted, the second time with a line written that no saved state covers."""
    whole = run(base_model, settings(attacks=ATTACKS))
    asked = settings(attacks=ATTACKS, out=tmp_path / "again")
    for watcher in (Watcher(stop_after=3), Watcher(stop_after=4)):
        with pytest.raises(InterruptedEvaluationError):
            run(base_model, asked, resume=True, watcher=watcher)
    part = sorted((asked.out / "progress").glob("*.jsonl"))[-1]
    with part.open("a") as file:
        file.write('{"index": 7, "key": "not sa')
    last = Watcher()
    assert run(base_model, asked, resume=True, watcher=last) == whole
    assert last.done == 1 + 13 - (3 + 3)  # what was done before counts as one step
    for name in ("sequences.jsonl", "metrics.json"):
        assert (asked.out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert not (asked.out / "progress").exists()


def test_an_attack_that_is_done_is_not_run_again(base_model, settings, tmp_path, monkeypatch):
    from sgfast.evaluation import attacks

    asked = settings(attacks=("repeated", "information"))
    monkeypatch.setattr(attacks, "information_bounds", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(base_model, asked)
    monkeypatch.undo()
    watcher = Watcher()
    metrics = run(base_model, asked, resume=True, watcher=watcher)
    assert "attack: repeated" not in watcher.stages
    assert metrics == run(base_model, settings(attacks=asked.attacks, out=tmp_path / "whole"))


def test_other_budgets_give_the_same_figures(base_model, settings, tmp_path):
    budgets = {"large": 2**31, "small": 3 * 2**20}
    large, small = (
        run(base_model, settings(out=tmp_path / name, memory_budget=budget, attacks=("nearest", "repeated")))
        for name, budget in budgets.items()
    )
    for name, value in large["utility"].items():
        assert small["utility"][name] == pytest.approx(value, rel=1e-6)
    assert (small["privacy"], small["attacks"]) == (large["privacy"], large["attacks"])


def test_attacks_on_a_sample(base_model, settings, tmp_path):
    """Fresh noise averages away where there is no mean shift; weak noise hides nothing from anyone."""
    strong_file = save_transform(base_model, tmp_path / "strong.safetensors", scale=(0.02, 0.04))
    every = {"attacks": ATTACKS, "attack_tokens": 4096}
    strong = run(base_model, settings(transform=strong_file, **every, out=tmp_path / "strong"))
    weak_file = save_transform(base_model, tmp_path / "weak.safetensors", scale=(1e-5, 2e-5))
    weak = run(base_model, settings(transform=weak_file, **every, out=tmp_path / "weak"))
    rates = strong["attacks"]["repeated"]["failure_rates"]
    assert list(rates) == ["1", "2", "4", "8", "16"]
    # All transformed tokens are in the sample, and the first draw is the one that was measured.
    assert rates["1"] == pytest.approx(strong["privacy"]["nearest_neighbor_failure_rate"], rel=1e-12)
    assert rates["16"] < rates["4"] < rates["1"]
    assert set(weak["attacks"]["repeated"]["failure_rates"].values()) == {0.0}
    assert weak["attacks"]["learned"]["failure_rate"] == 0
    assert (
        strong["attacks"]["learned"]["training_tokens"] + strong["attacks"]["learned"]["held_out_tokens"]
        == (strong["data"]["transformed_tokens"])
    )
    information = strong["attacks"]["information"]
    assert 0 <= information["bhattacharyya_lower"] <= information["kl_upper"] <= math.log(information["candidates"])
    assert 0 < information["pac_success_bound"] <= 1
    # Where noise is weak, the embedding tells which candidate it is: ln N, but for equal ones.
    assert weak["attacks"]["information"]["bhattacharyya_lower"] > information["bhattacharyya_lower"]


def test_readings_are_about_tokens_however_often_they_occur(base_model, settings, tmp_path):
    """Where the nearest row is always right, no reading may say that every attack errs."""
    weak = save_transform(base_model, tmp_path / "weak.safetensors", scale=(1e-5, 2e-5))
    data = tmp_path / "repetitive.txt"
    data.write_text("the class\n" * 9)
    metrics = run(base_model, settings(transform=weak, data=data, attacks=("nearest", "information"), text_as="plain"))
    assert metrics["data"]["transformed_tokens"] == 9 * 2
    assert metrics["privacy"]["nearest_neighbor_failure_rate"] == 0
    information = metrics["attacks"]["information"]
    assert information["candidates"] == 2
    assert information["bhattacharyya_lower"] == pytest.approx(math.log(2))
    assert information["fano_error_bound"] == 0
    assert information["pac_success_bound"] == pytest.approx(1)


def test_suppressed_features_leave_the_bounds_without_readings(base_model, settings, tmp_path):
    file = save_transform(base_model, tmp_path / "masked.safetensors", percent_to_mask=0.25)
    information = run(base_model, settings(transform=file, attacks=("information",)))["attacks"]["information"]
    assert information["are_bounds"] is False
    assert information["fano_error_bound"] is None


def example(index, length, transformed):
    ids = torch.zeros(length, dtype=torch.int64)
    return Example(index, Record(str(index), index + 1, "", None), ids, torch.arange(length) < transformed, False)


def test_the_sample_depends_on_the_records_alone():
    generator = random.Random(0)
    examples = [example(index, 20, generator.randint(0, 20)) for index in range(200)]

    def surveyed(parts):
        whole = Survey()
        for part in parts:
            one = Survey()
            for added in part:
                one.add(added, 3, 100)
            whole.merge(one, 100)
        return whole

    together, striped = surveyed([examples]), surveyed([examples[rank::3] for rank in range(3)])
    backwards = surveyed([examples[::-1]])
    for other in (striped, backwards):
        assert sorted(other.sample) == sorted(together.sample)
        assert other.sampled_tokens == together.sampled_tokens == sum(one.tokens for one in together.sample)
    assert 100 <= together.sampled_tokens < 100 + 100 // 8
    assert max(one.tokens for one in together.sample) == 100 // 8
    assert together.transformed_tokens == sum(int(one.noise_mask.sum()) for one in examples)
    stored = json.loads(json.dumps(together.to_json()))
    again = Survey.from_json(stored)
    assert again.to_json() == together.to_json() == stored
    assert {(one.index, one.tokens) for one in again.sample} == {(one.index, one.tokens) for one in together.sample}
    assert all(one.keys() == {"index", "tokens"} for one in stored["sample"])  # the priority would tell the seed


def test_every_record_is_measured_once_whatever_the_processes_of_each_run():
    generator = random.Random(1)
    for _ in range(50):
        records, parts, measured = generator.randint(1, 60), [], []
        for last in (False, False, False, True):
            before, processes = list(parts), generator.randint(1, 5)
            for rank in range(processes):
                reached = Reached(rank, processes)
                left = records if last else generator.randint(0, 12)
                for index in range(rank, records, processes):
                    if left == 0:
                        break
                    if not any(part.covers(index) for part in before):
                        measured.append(index)
                        reached.last = index
                        left -= 1
                parts.append(reached)
        assert sorted(measured) == list(range(records))


def test_long_records_are_cut(base_model, settings, data_file):
    asked = settings(max_length=9)
    metrics = run(base_model, asked)
    assert metrics["data"]["longest"] == 9
    wrapper = load_subject(base_model, asked).tokenizer_wrapper
    lengths = [len(one.input_ids) for one in read_examples(asked, wrapper, None)]
    assert metrics["data"]["truncated"] == sum(length > 9 for length in lengths) > 0
    assert metrics["data"]["tokens"] == sum(min(length, 9) for length in lengths)


def test_what_cannot_be_run_is_refused_or_left_out(base_model, settings, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, records(2))))
    asked = settings(data=few, attacks=("nearest", "learned"))
    with pytest.raises(EvaluationError, match="learned cannot be run: it needs 3 different texts; the data has 2"):
        run(base_model, asked)
    assert not asked.out.exists()
    metrics = run(base_model, asked, chosen=False)
    assert list(metrics["left_out"]) == ["learned"]
    assert "learned" not in metrics["attacks"]
    tight = settings(attacks=("learned",), memory_budget=4 * 2**20, out=tmp_path / "tight")
    with pytest.raises(
        EvaluationError, match=r"learned cannot be run: it needs .* MiB of memory, --memory-budget is 4"
    ):
        run(base_model, tight)
    with pytest.raises(EvaluationError, match=r"--memory-budget 1 KiB is too small: a sequence of .* needs"):
        run(base_model, settings(memory_budget=1024, out=tmp_path / "tiny"))
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"messages": [{"role": "assistant", "content": "the class"}]}))
    with pytest.raises(EvaluationError, match="the masks select no token to transform"):
        run(base_model, settings(data=answers, out=tmp_path / "answers"))


def test_a_transform_for_another_model(base_model, settings, tmp_path):
    wide = tiny_causal_lm("llama", vocab_size=base_model.config.vocab_size, hidden_size=32)[0]
    with pytest.raises(EvaluationError, match=r"for another model: its embedding table is .*, the model's"):
        load_subject(wide, settings())
    other = tiny_causal_lm("llama", vocab_size=base_model.config.vocab_size)[0]
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    with pytest.raises(EvaluationError, match="for another model: the embeddings in it are not the model's"):
        load_subject(other, settings())
    load_subject(tiny_causal_lm("llama", vocab_size=base_model.config.vocab_size)[0].bfloat16(), settings())


def test_the_budget_is_a_sum_of_its_parts():
    budget = Budget(2**28, 49152, 576)
    chunk = budget.chunk_bytes(2048)
    assert 128 * 49152 <= chunk <= 2**28 - budget.kept(2048)
    assert budget.kept(2048) >= 4 * 2048 * 576 * 4
    least = next(size for size in range(2**20, 2**26, 2**18) if _suffices(Budget(size, 49152, 576)))
    with pytest.raises(EvaluationError, match="needs") as refused:
        Budget(least - 2**19, 49152, 576).chunk_bytes(2048)
    asked = parse_bytes(str(refused.value).split("needs ")[1].replace(" ", ""))
    assert _suffices(Budget(asked, 49152, 576))


def _suffices(budget):
    try:
        return budget.chunk_bytes(2048) > 0
    except EvaluationError:
        return False


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "1XB", "8388608TiB", "9" * 400])
def test_sizes_that_are_none(text):
    with pytest.raises(EvaluationError, match="--memory-budget must be"):
        parse_bytes(text)


def test_names():
    assert parse_attacks("all") == ATTACKS
    with pytest.raises(EvaluationError, match=r"--attacks must be all, none, or of .*; got 'x'"):
        parse_attacks("nearest,x")
    assert readable_bytes(2**20 + 1) == "1.01 MiB"


def test_folders_of_several_transforms(tmp_path):
    one, two = tmp_path / "a" / "transform.safetensors", tmp_path / "b" / "transform.safetensors"
    assert result_folders([one], tmp_path) == [tmp_path]
    assert result_folders([one, two], tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert result_folders([one, tmp_path / "b" / "x.safetensors"], tmp_path) == [tmp_path / "transform", tmp_path / "x"]
    with pytest.raises(EvaluationError, match="different file names"):
        result_folders([one, one], tmp_path)


def test_damaged_state_is_one_line(tmp_path):
    progress = Progress(tmp_path)
    progress.begin({"identity": {}})
    writer = PartWriter(progress.folder, 1, 0, 1)
    writer.add(0, 3, {"key": "a"})
    writer.save({"utility": torch.zeros(3, dtype=torch.int64)})
    writer.close()
    assert [part.reached.tokens for part in progress.parts()] == [3]
    (progress.folder / ".1-0.safetensors.killed").touch()  # what a process killed while it saves leaves
    assert progress.next_run() == 2
    assert len(progress.parts()) == 1
    (progress.folder / "1-0.safetensors").write_bytes(b"nothing")
    with pytest.raises(EvaluationError, match="is damaged: remove"):
        progress.parts()
    for content in ("{", "[]", "{}"):
        (progress.folder / "run.json").write_text(content)
        with pytest.raises(EvaluationError, match="is damaged: remove"):
            progress.read_run()


def test_the_attacker_who_knows_the_transform(base_model, settings, tmp_path):
    """A mean shift hides nothing from this attacker. A text's canaries are found, in the records that hold them."""
    shifted = save_transform(base_model, tmp_path / "shifted.safetensors", scale=(1e-5, 2e-5))
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text('{"text": "the keyword"}\n{"text": "module in"}\n')
    data = tmp_path / "secrets.jsonl"
    texts = ("the keyword of a", "a module in of a", "in of a")
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked = settings(transform=shifted, data=data, attacks=("nearest", "known"), known_tokens=6, canaries=canaries)
    metrics = run(base_model, asked)
    known = metrics["attacks"]["known"]
    assert metrics["strongest_attack"] in ("known", "nearest")
    assert (known["failure_rate"], known["exact_sequence_rate"], known["canary_recall"]) == (0.0, 1.0, 1.0)
    assert known["canaries"] == 2
    assert 3 <= known["tokens"] <= metrics["data"]["transformed_tokens"]
    assert known["failure_rates"] == {"1": 0.0, "16": 0.0}
    assert known["ci95"][0] == 0
    assert (asked.out / "attacks.png").read_bytes().startswith(b"\x89PNG")


def test_noise_that_hides_from_the_attacker_who_knows(base_model, settings, tmp_path):
    strong = save_transform(base_model, tmp_path / "strong.safetensors", scale=(0.02, 0.04))
    metrics = run(base_model, settings(transform=strong, attacks=("known",), known_tokens=64))
    known = metrics["attacks"]["known"]
    assert 0.05 < known["failure_rate"] < 0.95
    assert known["failure_rates"]["16"] <= known["failure_rate"]
    assert known["records"] >= 8
    low, high = known["ci95"]
    assert 0 <= low < known["failure_rate"] < high <= 1


def test_canaries_that_the_data_does_not_hold(settings, tmp_path):
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text('{"text": "the"}\n{"text": "no such words"}\n')
    with pytest.raises(EvaluationError, match=r"canaries.jsonl, line 2: .* has no such text"):
        identity_of(settings(canaries=canaries))
    canaries.write_text('{"messages": [{"role": "user", "content": "the"}]}\n')
    with pytest.raises(EvaluationError, match=r"line 1: a canary must be a text"):
        identity_of(settings(canaries=canaries))


def test_known_needs_memory(base_model, settings):
    asked = settings(attacks=("nearest", "known"), memory_budget=3 * 2**20)
    with pytest.raises(EvaluationError, match=r"the attack known cannot be run: it needs .* of memory"):
        run(base_model, asked)
    metrics = run(base_model, asked, chosen=False)
    assert "it needs" in metrics["left_out"]["known"]
    assert "known" not in metrics["attacks"]
