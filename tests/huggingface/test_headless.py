"""Training without logits gives the numbers of training with logits, whatever wraps the head; all else has logits."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sgfast.huggingface import distillation_compute_loss
from sgfast.loss import DivergenceLoss
from sgfast.model.head_weights import plain_head_refusal
from tests.processes import in_processes
from tests.tiny_models import FAMILIES, LAYERS, VOCABULARY, WIDTH, tiny_causal_lm, with_lora

LOSS = DivergenceLoss("jensen_shannon", temperature=2.0, hard_label_weight=0.25)
PLAIN_FAMILIES = [family for family in FAMILIES if family != "gemma2"]
SETTINGS = {"initializer_range": 0.3, "use_cache": False}


def pair(family="llama", **settings):
    """A student in training mode and a teacher, without dropout."""
    settings = SETTINGS | settings
    if family == "gpt2":
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    student, *_ = tiny_causal_lm(family, num_hidden_layers=2, **settings)
    teacher, *_ = tiny_causal_lm(family, **settings)
    return student.train(), teacher.requires_grad_(False)


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, VOCABULARY, (3, 7), generator=generator)
    labels = input_ids.clone()
    labels[0, :4] = -100
    return input_ids, labels


def step(student, teacher, *, from_hidden, loss=LOSS, call=None):
    """One training step: the loss, the gradients by name, and the width of what the student returned."""
    student.zero_grad()
    compute_loss = distillation_compute_loss(student, teacher, loss, from_hidden=from_hidden)
    input_ids, labels = tokens()
    outputs = (student if call is None else call)(input_ids=input_ids)
    value = compute_loss(outputs, labels, torch.tensor(15))
    value.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    return value.item(), gradients, outputs.logits.shape[-1], compute_loss.explain()


def check_same(student, teacher, width=WIDTH, **options):
    value, gradients, returned, explained = step(student, teacher, from_hidden=True, **options)
    expected, expected_gradients, with_logits, _ = step(student, teacher, from_hidden=False, **options)
    assert (returned, with_logits) == (width, VOCABULARY)
    assert "student: hidden states and head" in explained
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest.item(), msg=name)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_families(family):
    check_same(*pair(family))


@pytest.mark.parametrize("kind", ["forward_kl", {"reverse_kl": 0.5, "total_variation": 2.0}, "cross_entropy"])
def test_kinds_and_supports(kind):
    for options in ({}, {"top_k": 5, "support": "renormalize"}):
        check_same(*pair(), loss=DivergenceLoss(kind, **options))


def test_tied_and_separate_weights():
    for tied in (False, True):
        student, teacher = pair(tie_word_embeddings=tied)
        check_same(student, teacher)


def test_a_teacher_of_another_width():
    student, _ = pair()
    teacher, *_ = tiny_causal_lm("qwen2", hidden_size=24, **SETTINGS)
    check_same(student, teacher.requires_grad_(False))


def test_scales_around_the_head():
    """Granite divides its logits, Cohere multiplies them: hidden states carry the factor."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        "use_cache": False,
    }
    _, teacher = pair()
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**settings, logits_scaling=0.25)).train()
    cohere = transformers.CohereForCausalLM(transformers.CohereConfig(**settings, logit_scale=4.0)).train()
    for student in (granite, cohere):
        check_same(student, teacher)


class TestAdapters:
    def test_on_the_body_with_the_base_as_teacher(self):
        base, _ = pair()
        student = with_lora(base).train()

        def teacher(**inputs):
            with student.disable_adapter():
                return student(**inputs)

        check_same(student, teacher)

    @pytest.mark.parametrize("bias", ["none", "lora_only"])
    def test_on_the_head(self, bias):
        base, teacher = pair()
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], bias=bias)
        student = peft.get_peft_model(base, config)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        check_same(student.train(), teacher)

        def own_base(**inputs):
            with student.disable_adapter():
                return student(**inputs)

        check_same(student, own_base)

    def test_a_trained_copy_of_the_head(self):
        base, teacher = pair()
        student = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        nn.init.normal_(student.base_model.model.lm_head.modules_to_save["default"].weight)
        check_same(student.train(), teacher)

    def test_dropout_on_the_head_keeps_logits(self):
        base, teacher = pair()
        config = peft.LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.5)
        student = peft.get_peft_model(base, config).train()
        *_, width, explained = step(student, teacher, from_hidden=True)
        assert width == VOCABULARY
        assert "student: logits, because its head has an adapter with dropout" in explained


class TestOtherHeadsKeepLogits:
    def check(self, student, teacher, reason):
        value, _, width, explained = step(student, teacher, from_hidden=True)
        expected, _, _, _ = step(student, teacher, from_hidden=False)
        assert width == VOCABULARY
        assert reason in explained
        assert value == pytest.approx(expected, rel=1e-6)

    def test_a_soft_cap(self):
        self.check(*pair("gemma2"), "student: logits, because its forward does more than one product")

    def test_a_module_around_the_model(self):
        class Colder(nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, **inputs):
                outputs = self.model(**inputs)
                outputs.logits = outputs.logits.sin()
                return outputs

        student, teacher = pair()
        self.check(Colder(student).train(), teacher, "a Colder is around the model of transformers")

    def test_a_function_that_changes_its_logits(self):
        """Found at the first call, which then runs again with logits."""
        student, model = pair()

        for change in (lambda logits: logits.sin(), lambda logits: logits.sin_()):

            def teacher(change=change, **inputs):
                outputs = model(**inputs)
                outputs.logits = change(outputs.logits)
                return outputs

            expected, *_ = step(student, teacher, from_hidden=False)
            compute_loss = distillation_compute_loss(student, teacher, LOSS)
            input_ids, labels = tokens()
            value = compute_loss(student(input_ids=input_ids), labels, torch.tensor(15))
            assert value.item() == pytest.approx(expected, rel=1e-5)
            assert "teacher: logits, because the function does not return its model's logits" in compute_loss.explain()

    def test_reasons(self):
        bert = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
        )
        assert "has no head that can be read" in plain_head_refusal(bert)
        with torch.device("meta"):
            meta = tiny_causal_lm("llama")[0]
        assert "not in this process's memory" in plain_head_refusal(meta)


class TestAllElseHasLogits:
    def test_evaluation_generation_and_labels(self):
        student, teacher = pair()
        compute_loss = distillation_compute_loss(student, teacher, LOSS)
        input_ids, labels = tokens()
        assert student(input_ids=input_ids).logits.shape[-1] == WIDTH
        assert student(input_ids=input_ids, labels=labels).logits.shape[-1] == VOCABULARY
        assert student(input_ids, None, None, None, None, labels).loss.isfinite()
        with torch.no_grad():
            assert student(input_ids=input_ids).logits.shape[-1] == VOCABULARY
        generated = student.generate(input_ids[:1], max_new_tokens=3, do_sample=False)
        student.eval()
        assert torch.equal(generated, student.generate(input_ids[:1], max_new_tokens=3, do_sample=False))
        outputs = student(input_ids=input_ids)
        assert outputs.logits.shape[-1] == VOCABULARY
        expected = compute_loss(outputs, labels).item()
        student.train()
        assert compute_loss(student(input_ids=input_ids), labels).item() == pytest.approx(expected, rel=1e-5)

    def test_a_forward_that_fails_leaves_the_head(self):
        student, teacher = pair()
        compute_loss = distillation_compute_loss(student, teacher, LOSS)
        with pytest.raises((TypeError, ValueError)):
            student(input_ids=None, attention_mask="no mask")
        hidden = torch.randn(2, WIDTH)
        assert student.lm_head(hidden).shape[-1] == VOCABULARY
        del compute_loss

    def test_a_copy_and_a_deleted_loss_have_their_heads(self):
        student, teacher = pair()
        compute_loss = distillation_compute_loss(student, teacher, LOSS)
        input_ids, _ = tokens()
        copied = copy.deepcopy(student)
        expected = copied(input_ids=input_ids).logits
        assert expected.shape[-1] == VOCABULARY
        assert student(input_ids=input_ids).logits.shape[-1] == WIDTH
        del compute_loss
        torch.testing.assert_close(student(input_ids=input_ids).logits, expected)
        assert "forward" not in student.lm_head.__dict__
        assert teacher(input_ids=input_ids).logits.shape[-1] == VOCABULARY
        assert "forward" not in teacher.lm_head.__dict__

    def test_two_losses_over_one_student(self):
        student, teacher = pair()
        first, second = (distillation_compute_loss(student, teacher, LOSS) for _ in range(2))
        input_ids, labels = tokens()
        outputs = student(input_ids=input_ids)
        assert outputs.logits.shape[-1] == WIDTH
        expected = first(outputs, labels).item()
        assert second(outputs, labels).item() == pytest.approx(expected, rel=1e-6)
        third = distillation_compute_loss(student, teacher, LOSS, from_hidden=False)
        outputs = student(input_ids=input_ids)
        assert outputs.logits.shape[-1] == VOCABULARY
        for compute_loss in (first, second, third):
            assert compute_loss(outputs, labels).item() == pytest.approx(expected, rel=1e-5)
        del first, third, compute_loss
        outputs = student(input_ids=input_ids)
        assert outputs.logits.shape[-1] == WIDTH
        assert second(outputs, labels).item() == pytest.approx(expected, rel=1e-6)


class TestWrappers:
    def test_gradient_checkpointing(self):
        student, teacher = pair()
        student.gradient_checkpointing_enable({"use_reentrant": False})
        check_same(student, teacher)

    def test_compiled(self):
        student, teacher = pair()
        compiled = torch.compile(student, backend="aot_eager")
        check_same(student, teacher, call=compiled)

    def test_autocast(self):
        student, teacher = pair()

        def call(**inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return student(**inputs)

        value, _, width, _ = step(student, teacher, from_hidden=True, call=call)
        expected, *_ = step(student, teacher, from_hidden=False)
        assert width == WIDTH
        assert value == pytest.approx(expected, rel=0.02)

    def test_several_processes(self):
        in_processes(2, _in_parallel)


def _in_parallel(rank: int) -> None:
    torch.manual_seed(0)
    for wrap in (
        DistributedDataParallel,
        lambda student: DistributedDataParallel(student, static_graph=True),
        lambda student: DistributedDataParallel(student, find_unused_parameters=True),
        fully_shard,
        _shard_layers_and_head,
        lambda student: fully_shard(student, mp_policy=MixedPrecisionPolicy(output_dtype=torch.float64)),
    ):
        student, teacher = pair()
        reference = copy.deepcopy(student)
        expected, gradients, _, _ = step(reference, teacher, from_hidden=False)
        compute_loss = distillation_compute_loss(student, teacher, LOSS)
        wrapped = wrap(student)
        input_ids, labels = tokens()
        for _ in range(2):
            wrapped.zero_grad()
            outputs = wrapped(input_ids=input_ids)
            assert outputs.logits.shape[-1] == WIDTH
            value = compute_loss(outputs, labels, torch.tensor(15))
            value.backward()
            assert value.item() == pytest.approx(expected, rel=1e-5)
            for name, parameter in student.named_parameters():
                gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def _shard_layers_and_head(student):
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student.lm_head)
    return fully_shard(student)


def test_layers_of_the_pair():
    assert LAYERS > 2  # so that student and teacher differ
