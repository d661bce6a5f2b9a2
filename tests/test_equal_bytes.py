"""The same transform saved again, by other processes too, is the same bytes."""

import json
import os
import subprocess
import sys

SAVING = """
import hashlib, json, sys
from pathlib import Path
import torch
from sgfast.client import StainedGlassTransformForText
from sgfast.huggingface import TokenizerWrapper
from sgfast.huggingface.trainer_checkpoint import save_trained, trained_state
from sgfast.training.building import models_over
from sgfast.training.configuration import LoraOptions
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

folder = Path(sys.argv[1])
torch.manual_seed(0)
base_model = tiny_causal_lm("llama", vocab_size=len(tiny_tokenizer()))[0]
lora = LoraOptions(target_modules=["q_proj", "v_proj", "k_proj", "o_proj", "up_proj"])
models = models_over(base_model, TokenizerWrapper(tiny_tokenizer(), "LlamaForCausalLM"), {}, lora)
for number in range(3):
    models.client.save_pretrained(folder / f"transform {number}")
StainedGlassTransformForText.from_pretrained(folder / "transform 0").save_pretrained(folder / "transform loaded")
save_trained(models.student, trained_state(models.student), folder)
print(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}))
"""


def test_saves_are_equal_bytes_whatever_the_process(tmp_path):
    started = []
    for hash_seed in ("0", "1"):
        folder = tmp_path / hash_seed
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", SAVING, str(folder)]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    digests = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    assert all(process.returncode == 0 for process in started)
    assert {"adapter_config.json", "adapter_model.safetensors", "noise_layer.safetensors"} < digests[0].keys()
    assert digests[0] == digests[1]
    transforms = {digest for name, digest in digests[0].items() if name.startswith("transform")}
    assert len(transforms) == 1
