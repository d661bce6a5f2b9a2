"""A fast tokenizer as plain data, and back: no pickle, no file, no class named by the data."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# A hundred times those of today's models.
_LARGEST_ID = 2**24
# Attributes that bear on ids, masks or decoding.
_SETTINGS = {
    "padding_side": str,
    "truncation_side": str,
    "model_max_length": int,
    "split_special_tokens": bool,
    "clean_up_tokenization_spaces": bool,
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "backend": str,
    "chat_template": (str, type(None)),
    "named_special_tokens": dict,
    "other_special_tokens": list,
    **_SETTINGS,
}


def backend_copy(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """Copy the Rust tokenizer, without the truncation and padding that earlier calls left on it."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenizer_state(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Return everything ``tokenizer_from_state`` needs, in types that JSON has."""
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return {
        "backend": backend_copy(tokenizer).to_str(),
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        "named_special_tokens": named,
        "other_special_tokens": [token for token in tokenizer.all_special_tokens if token not in named.values()],
        **{name: kind(getattr(tokenizer, name)) for name, kind in _SETTINGS.items()},
    }


def tokenizer_from_state(state: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Rebuild a tokenizer, always as a ``PreTrainedTokenizerFast``.

    Args:
        state: what ``tokenizer_state`` returned.

    Raises:
        ValueError: a field is missing or not of its type, or the Rust tokenizer does not read its part.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    check_fields(state, _TYPES, "the saved tokenizer")
    # These names become keyword arguments of the tokenizer, and some keyword arguments open files.
    if not all(isinstance(token, str) for token in state["other_special_tokens"]):
        raise ValueError("the saved tokenizer has special tokens that are no strings")
    for name, token in state["named_special_tokens"].items():
        if not name.endswith("_token") or not isinstance(token, str):
            raise ValueError(f"the saved tokenizer has an invalid special token {name!r}")
    try:
        backend = Tokenizer.from_str(state["backend"])
    except BaseException as error:  # tokenizers raises no narrower class, and its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the saved tokenizer cannot be read: {error}") from error
    # Writing a vocabulary out again takes memory by its largest id, whatever their number.
    if max(backend.get_vocab().values(), default=0) > _LARGEST_ID:
        raise ValueError(f"the saved tokenizer has ids above {_LARGEST_ID}")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=state["chat_template"],
        additional_special_tokens=state["other_special_tokens"],
        **{name: state[name] for name in _SETTINGS},
        **state["named_special_tokens"],
    )


def check_fields(state: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Check that every field is there with its type."""
    invalid = [name for name, allowed in types.items() if not isinstance(state.get(name), allowed)]
    if invalid:
        raise ValueError(f"{where} has no valid {', '.join(invalid)}")
