"""No checkpoint, saved model, log or model card of SgtTrainer tells the seed; draws come from it all the same."""

import json
import random

import numpy
import pytest
import torch
import transformers
from transformers.modelcard import extract_hyperparameters_from_trainer

from sgfast.huggingface.step_seeds import NO_SEED, seed_for, seed_generators
from sgfast.noise_layer import TransformerCloak
from sgfast.utils.one_writer import one_writer
from tests.huggingface.sgt_training import distillation, examples, noisy_language_model, trainer
from tests.seed_search import SEED, SMALL_SEED, assert_tells_no_seed

DATA_SEED = 2718281831


class Draws(transformers.TrainerCallback):
    """What is drawn in each step after the forward, by every generator; and what loggers are shown."""

    def __init__(self):
        self.drawn, self.shown = {}, []

    def on_step_end(self, args, state, control, **_):
        self.drawn[state.global_step] = random.random(), numpy.random.rand(), torch.rand(()).item()
        self.shown += [args.to_json_string(), json.dumps(args.to_sanitized_dict(), default=str)]


def training_of(directory, *, seed=SMALL_SEED, **settings):
    """Five steps of two micro-batches, saved after every one, with an evaluation between."""
    model = noisy_language_model(TransformerCloak, torch.float32, mean_dropout=0.1)
    arguments = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": seed}
    arguments |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    training = trainer(model, distillation(model), directory, **(arguments | settings))
    training.optimizer = None
    draws = Draws()
    training.add_callback(draws)
    return training, draws


def test_no_file_tells_the_seed(tmp_path):
    training, draws = training_of(tmp_path / "run", data_seed=DATA_SEED, hub_token="hf_secret")
    training.train()
    training.save_model(str(tmp_path / "final"))
    card = extract_hyperparameters_from_trainer(training)
    assert card["seed"] == NO_SEED
    assert_tells_no_seed(tmp_path, SMALL_SEED, DATA_SEED)
    stored = [*tmp_path.rglob("training_args.bin")]
    assert len(stored) == 6
    for path in stored:
        arguments = torch.load(path, weights_only=False)
        assert (arguments.seed, arguments.data_seed, arguments.hub_token) == (NO_SEED, None, None)
        assert b"hf_secret" not in path.read_bytes()
    assert len(draws.shown) == 10
    assert not any(str(seed) in text for text in draws.shown for seed in (SMALL_SEED, DATA_SEED))


def test_the_search_finds_what_it_looks_for(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), seed=SMALL_SEED, report_to=[])
    torch.save(arguments, tmp_path / "training_args.bin")
    with pytest.raises(AssertionError, match="tells the seed"):
        assert_tells_no_seed(tmp_path, SMALL_SEED)
    (tmp_path / "training_args.bin").unlink()
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "state.pt")
    with pytest.raises(AssertionError):
        assert_tells_no_seed(tmp_path, SMALL_SEED)
    (tmp_path / "state.pt").unlink()
    for text in (str(SEED), f"x{SEED:x}"):
        (tmp_path / "log").write_text(text)
        with pytest.raises(AssertionError, match="tells the seed"):
            assert_tells_no_seed(tmp_path, SEED)


@pytest.mark.parametrize(
    "settings",
    [
        {"data_seed": DATA_SEED},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"dataloader_num_workers": 1},
    ],
    ids=["data_seed", "an order that torch draws", "workers"],
)
def test_all_generators_and_the_order_of_the_data_are_those_of_the_straight_training(tmp_path, settings):
    straight, expected = training_of(tmp_path / "run", **settings)
    straight.train()
    assert len(set(expected.drawn.values())) == 5
    for step in (1, 2):  # in the middle of an epoch, and between two
        resumed, draws = training_of(tmp_path / f"from-{step}", **settings)
        seed_generators(step)
        resumed.train(str(tmp_path / "run" / f"checkpoint-{step}"))
        assert draws.drawn == {later: drawn for later, drawn in expected.drawn.items() if later > step}
        losses = [
            [record["loss"] for record in one.state.log_history if "loss" in record] for one in (straight, resumed)
        ]
        assert losses[0] == losses[1]


def test_another_seed_is_another_training(tmp_path):
    trainings = [training_of(tmp_path / str(seed), seed=seed, max_steps=2, save_strategy="no") for seed in (1, 1, 2)]
    for training, _ in trainings:
        training.train()
    one, same, other = (draws.drawn for _, draws in trainings)
    assert one == same
    assert not set(one.values()) & set(other.values())


def test_the_seed_is_asked_for_again(tmp_path):
    training, _ = training_of(tmp_path, max_steps=1)
    training.train()
    arguments = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    model = noisy_language_model()
    with pytest.raises(ValueError, match=r"args.seed must not be negative; got -1. Stored arguments hold no seed"):
        type(training)(model, arguments, loss=distillation(model), train_dataset=examples())


def test_the_arguments_given_keep_their_seed(tmp_path):
    model = noisy_language_model()
    arguments = transformers.TrainingArguments(str(tmp_path), seed=SMALL_SEED, data_seed=5, report_to=[], use_cpu=True)
    training = trainer(model, distillation(model), tmp_path)
    training = type(training)(model, arguments, loss=distillation(model), train_dataset=examples())
    assert (arguments.seed, arguments.data_seed) == (SMALL_SEED, 5)
    assert (training.args.seed, training.args.data_seed) == (NO_SEED, None)


def test_seeds_of_places():
    seeds = {
        seed_for(seed, kind, step, rank) for seed in (0, 1) for kind in "ab" for step in (1, 11) for rank in (1, 2)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) > 2**63
    for seed in (0, 2**64 - 1):
        seed_generators(seed)
        drawn = random.random(), numpy.random.rand(), torch.rand(()).item()
        seed_generators(seed)
        assert (random.random(), numpy.random.rand(), torch.rand(()).item()) == drawn


def test_one_training_saves_in_a_folder(tmp_path):
    training, _ = training_of(tmp_path / "run", max_steps=1)
    with one_writer(tmp_path / "run"), pytest.raises(BlockingIOError, match="is being written by another run"):
        training.train()
    training.train()
    without, _ = training_of(tmp_path / "run", max_steps=1, save_strategy="no", eval_strategy="no")
    with one_writer(tmp_path / "run"):
        without.train()
