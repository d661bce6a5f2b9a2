"""CPU time and peak memory of one training step of every loss factory, beside plain PyTorch of the same loss.

    python -m benchmarks.training_step [--out benchmarks/results/training-step-cpu.md]

Every measurement runs in a process of its own. The plain step uses the same noise layer and the same noise. It runs the
base model on clean embeddings without a graph and on transformed embeddings with a graph. It takes a layer from
``output_hidden_states`` of the body, or the logits of the whole model, and computes the formulas with
PyTorch's functions.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgfast.loss.distillation import (
    cross_entropy_distillation_factory,
    distillation_loss_factory,
    mutual_information_cross_entropy_distillation_factory,
    mutual_information_distillation_loss_factory,
)
from sgfast.loss.jigsaw import jigsaw_loss_factory
from sgfast.model import NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from sgfast.ops import standard_normal
from sgfast.utils.files import check_output_file, replacing

RESULTS = Path(__file__).parent / "results" / "training-step-cpu.md"
STEPS = 2
BATCH, LENGTH, VOCABULARY, WIDTH, LAYERS, LAYER = 4, 64, 49152, 576, 6, 2
ALPHA, MAX_SCALE = 0.4, 2.0
HEADING = """# One training step of every factory beside plain PyTorch

`python -m benchmarks.training_step`: forward, loss and backward on {batch} rows of {length} tokens, by a Llama with
random weights ({layers} layers of width {width}, vocabulary {vocabulary}), distilled at layer {layer} or at the logits,
in float32, each in a process of its own. Seconds are the process's CPU seconds, the fewest of {steps} steps after a
first one. `peak` is resident memory at its highest in the first step beyond what the models held before it, gradients
included. The plain step runs the clean half without a graph, the whole body and no language-model head where a layer is
distilled, and the formulas as one would write them.

| factory | sgfast s | plain s | sgfast peak MiB | plain peak MiB | loss, relative difference |
|---|---|---|---|---|---|
"""
LAYER_LOSS = {"distillation_layer_index": LAYER, "alpha": ALPHA}
DISTANCES = {
    "std_log_ratio_loss_weight": 0.1,
    "input_embedding_similarity_loss_weight": 0.5,
    "distillation_layer_cosine_distance_loss_weight": 2.0,
    "distillation_layer_l2_distance_loss_weight": 0.3,
}
INFORMATION = {"distillation_layer_l2_distance_loss_weight": 2.0, "mutual_information_loss_weight": 0.3}
CROSS_ENTROPY = {
    "distillation_cross_entropy_loss_weight": 1.5,
    "absolute_cosine_similarity_penalty_weight": 0.4,
    "median_norm_penalty_weight": 0.1,
}
PROTECTION = {
    "distillation_protection_l2_loss_weight": 0.7,
    "clean_embedding_performance_on_student_model_loss_weight": 0.6,
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "distillation": (distillation_loss_factory, LAYER_LOSS | DISTANCES),
    "distillation, at the logits": (
        distillation_loss_factory,
        LAYER_LOSS | DISTANCES | {"distillation_layer_index": None},
    ),
    "mutual information": (mutual_information_distillation_loss_factory, LAYER_LOSS | INFORMATION),
    "cross entropy": (cross_entropy_distillation_factory, CROSS_ENTROPY),
    "mutual information, cross entropy": (
        mutual_information_cross_entropy_distillation_factory,
        CROSS_ENTROPY | {"mutual_information_loss_weight": 0.3},
    ),
    "jigsaw": (jigsaw_loss_factory, LAYER_LOSS | DISTANCES),
    "jigsaw, all terms": (jigsaw_loss_factory, LAYER_LOSS | DISTANCES | PROTECTION),
}


def build(jigsaw: bool) -> tuple[Any, Any]:
    """Teacher, and for jigsaw a student with LoRA adapters over the same base."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    base_model = transformers.LlamaForCausalLM(config)
    teacher = NoiseMaskedNoisyTransformerModel(
        TransformerCloak,
        base_model,
        config_path=config,
        transformer_type=transformers.LlamaModel,
        rhos_init=-2.0,
        seed=7,
    )
    if not jigsaw:
        return teacher, None
    # The student shares the base: the teacher runs the base with adapters off.
    import peft

    adapted = peft.get_peft_model(base_model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(5)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: the adapters would change nothing
            torch.nn.init.normal_(parameter, std=0.5)
    return teacher, PeftNoiseMaskedNoisyTransformerModel(None, adapted, noise_layer=teacher.noise_layer)


def tokens() -> dict[str, Tensor]:
    """Right-padded rows of uneven lengths. The first quarter is a prompt, which the loss does not count."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[LENGTH], [LENGTH * 7 // 8], [LENGTH * 3 // 4], [LENGTH]])
    attention_mask = (torch.arange(LENGTH) < lengths).long()
    return {
        "input_ids": torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator),
        "attention_mask": attention_mask,
        "noise_mask": attention_mask != 0,
        "loss_mask": (attention_mask != 0) & (torch.arange(LENGTH) >= LENGTH // 4),
    }


class FactoryStep:
    """One step with a factory."""

    def __init__(self, case: str) -> None:
        factory, arguments = CASES[case]
        self.models = [model for model in build("jigsaw" in case) if model is not None]
        self.loss_function = factory(*self.models, **arguments)[0]
        self.batch = tokens()
        for model in self.models:
            model.train()

    def __call__(self) -> float:
        """The loss."""
        for model in self.models:
            model(**self.batch)
        loss = self.loss_function(self.batch["loss_mask"])
        loss.backward()
        return float(loss.detach())


class PlainStep:
    """One step of the same loss in plain PyTorch."""

    def __init__(self, case: str) -> None:
        self.arguments = CASES[case][1]
        self.jigsaw = "jigsaw" in case
        self.teacher, self.student = build(self.jigsaw)
        self.layer = self.arguments.get("distillation_layer_index")
        self.batch = tokens()
        embeddings = self.teacher.base_model.get_input_embeddings().weight
        self.median_norm = embeddings.detach().norm(dim=-1).median()

    def __call__(self) -> float:
        """The loss."""
        layer, batch, weights = self.teacher.noise_layer, self.batch, self.arguments
        selected, counted = batch["noise_mask"], batch["loss_mask"]
        x = self.teacher.base_model.get_input_embeddings()(batch["input_ids"])
        mean, std = layer.estimate(x, attention_mask=batch["attention_mask"])
        noise = standard_normal(x.shape, layer._next_seed(x.device), dtype=x.dtype, device=x.device)
        transformed = torch.where(selected[..., None], x + mean + std * noise, x)
        with torch.no_grad():
            clean = self.run(self.teacher, x)
        noisy = self.run(self.student or self.teacher, transformed)
        total = torch.zeros(())
        u, v = noisy[counted], clean[counted]
        utility = 1 - weights.get("alpha", 0.0)
        strength = weights.get("alpha", 1.0)
        ratio = (u - v).norm(dim=-1) / v.norm(dim=-1)
        if "distillation_cross_entropy_loss_weight" in weights:
            cross_entropy = -(v.softmax(-1) * u.log_softmax(-1)).sum(-1).mean()
            total = total + weights["distillation_cross_entropy_loss_weight"] * cross_entropy
        else:
            total = total + utility * weights["distillation_layer_l2_distance_loss_weight"] * ratio.mean()
        if "distillation_layer_cosine_distance_loss_weight" in weights:
            distance = 1 - F.cosine_similarity(u, v, dim=-1)
            total = total + utility * weights["distillation_layer_cosine_distance_loss_weight"] * distance.mean()
        if "distillation_protection_l2_loss_weight" in weights:
            for name, outputs in (
                ("distillation_protection_l2_loss_weight", self.run(self.teacher, transformed)),
                ("clean_embedding_performance_on_student_model_loss_weight", self.run(self.student, x)),
            ):
                far = (outputs[counted] - v).norm(dim=-1) / v.norm(dim=-1)
                total = total + utility * weights[name] * (2 * (1 - far.sigmoid())).mean()
        cosine = F.cosine_similarity(transformed[selected], x[selected], dim=-1)
        if "std_log_ratio_loss_weight" in weights:
            logs = (MAX_SCALE / std[selected]).log().mean()
            total = total + strength * weights["std_log_ratio_loss_weight"] * logs
            total = total + strength * weights["input_embedding_similarity_loss_weight"] * cosine.mean()
        if "median_norm_penalty_weight" in weights:
            penalty = ((x + mean)[selected].norm(dim=-1) - self.median_norm).abs().mean()
            total = total + weights["median_norm_penalty_weight"] * penalty
            total = total + weights["absolute_cosine_similarity_penalty_weight"] * cosine.abs().mean()
        if "mutual_information_loss_weight" in weights:
            information = mutual_information(x + mean, std, selected)
            total = total + strength * weights["mutual_information_loss_weight"] * information
        total.backward()
        return float(total.detach())

    def run(self, model: Any, embeddings: Tensor) -> Tensor:
        """Return the outputs of a layer, or the logits."""
        base_model = model.base_model
        if self.jigsaw and model is self.teacher:
            with self.student.base_model.disable_adapter():
                return self.body_or_logits(self.teacher.base_model, embeddings)
        return self.body_or_logits(model.causal_lm if self.jigsaw else base_model, embeddings)

    def body_or_logits(self, causal_lm: Any, embeddings: Tensor) -> Tensor:
        """Return a layer's outputs or the logits of a transformers model, with its adapters as they are."""
        attention_mask = self.batch["attention_mask"]
        inputs = {
            "inputs_embeds": embeddings,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
            "use_cache": False,
        }
        if self.layer is None:
            return causal_lm(**inputs).logits
        return causal_lm.model(**inputs, output_hidden_states=True).hidden_states[self.layer + 1]


def mutual_information(mean: Tensor, std: Tensor, selected: Tensor) -> Tensor:
    """Compute all pairs at once, as a (pairs, pairs, T, D) tensor."""
    half = len(mean) // 2
    m_i, s_i, m_j, s_j = mean[:half, None], std[:half, None], mean[None, half:], std[None, half:]
    both = (selected[:half, None] & selected[None, half:])[..., None]
    kl = (s_j / s_i).log() + (s_i.square() + (m_i - m_j).square()) / (2 * s_j.square()) - 0.5
    return ((kl * both).sum((-1, -2)) / (both.sum((-1, -2)) * mean.shape[-1])).mean()


def memory_mib(key: str) -> float:
    """Return VmRSS, or VmHWM (the highest so far), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def measure(case: str, plain: bool) -> dict[str, float]:
    """Measure in this process: peak and loss of the first step, and the shortest time of the other steps."""
    step = PlainStep(case) if plain else FactoryStep(case)
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far starts again from here
    loss = step()
    peak = memory_mib("VmHWM") - before
    times = []
    for _ in range(STEPS):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return {"seconds": min(times), "peak": peak, "loss": loss}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description="One training step of every factory beside plain PyTorch")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process and print it as JSON")
    parser.add_argument("--plain", action="store_true", help="with --case: the plain step")
    arguments = parser.parse_args()
    check_output_file(arguments.out)
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.plain)))
        return
    text = HEADING.format(
        batch=BATCH, length=LENGTH, layers=LAYERS, width=WIDTH, vocabulary=VOCABULARY, layer=LAYER, steps=STEPS
    )
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.training_step", "--case", case]
        ours, plain = (
            json.loads(subprocess.run(command + extra, check=True, capture_output=True, text=True).stdout)
            for extra in ([], ["--plain"])
        )
        pairs = [f"{one[key]:.{digits}f}" for key, digits in (("seconds", 2), ("peak", 0)) for one in (ours, plain)]
        difference = abs(ours["loss"] / plain["loss"] - 1)
        text += f"| {' | '.join([case, *pairs, f'{difference:.0e}'])} |\n"
        print(text.splitlines()[-1], flush=True)
    text += f"\nCPU, {torch.get_num_threads()} threads, torch {torch.__version__}.\n"
    with replacing(arguments.out) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
