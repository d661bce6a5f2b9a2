"""Conversion of a fast tokenizer to plain data and back, without pickles, files and class names in the data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sgfast.huggingface.tokenizer_parts import check_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Templates of models take a few kilobytes. Models have at most a thousand special tokens outside the vocabulary.
_LONGEST_TEMPLATE = 2**17
_MOST_SPECIAL, _MOST_NAMED, _LONGEST_TOKEN = 4096, 64, 1024
# Attributes that affect ids, masks or decoding.
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


class TokenizerError(ValueError):
    """Error of a tokenizer that fails on a valid input: the fault lies in the tokenizer."""


@contextmanager
def tokenizer_faults(what: str) -> Iterator[None]:
    """Turn errors of the Rust library into `TokenizerError`. Its panics are included, although no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {str(error)[:200]}") from error


def backend_copy(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """Copy the Rust tokenizer, without the truncation and padding settings of earlier calls."""
    from tokenizers import Tokenizer

    with tokenizer_faults("the tokenizer cannot be copied"):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def tokenizer_state(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """Return the state of a tokenizer for ``tokenizer_from_state``, in types that JSON has.

    Raises:
        ValueError: ``tokenizer_from_state`` would refuse the tokenizer.
    """
    named = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    state = {
        "backend": backend_copy(tokenizer).to_str(),
        "chat_template": tokenizer.get_chat_template() if tokenizer.chat_template else None,
        "named_special_tokens": named,
        "other_special_tokens": [token for token in tokenizer.all_special_tokens if token not in named.values()],
        **{name: kind(getattr(tokenizer, name)) for name, kind in _SETTINGS.items()},
    }
    _check_state(state)
    return state


def tokenizer_from_state(state: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Rebuild a tokenizer, always as a ``PreTrainedTokenizerFast``.

    Args:
        state: the result of ``tokenizer_state``.

    Raises:
        ValueError: a field is missing or has the wrong type, a part of the Rust tokenizer is unknown or exceeds the
            bounds of `sgfast.huggingface.tokenizer_parts`, or the Rust library cannot read the tokenizer.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    _check_state(state)
    with tokenizer_faults("the saved tokenizer cannot be read"):
        backend = Tokenizer.from_str(state["backend"])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=state["chat_template"],
            additional_special_tokens=state["other_special_tokens"],
            **{name: state[name] for name in _SETTINGS},
            **state["named_special_tokens"],
        )


def _check_state(state: Mapping[str, Any]) -> None:
    check_fields(state, _TYPES, "the saved tokenizer")
    # The names of special tokens become keyword arguments of the tokenizer, and some keyword arguments open files.
    special, named = state["other_special_tokens"], state["named_special_tokens"]
    if not all(isinstance(token, str) for token in special):
        raise ValueError("the saved tokenizer has special tokens that are not strings")
    for name, token in named.items():
        if not name.endswith("_token") or not isinstance(token, str):
            raise ValueError(f"the saved tokenizer has an invalid special token {name[:40]!r}")
    if len(special) > _MOST_SPECIAL or len(named) > _MOST_NAMED:
        raise ValueError(
            f"the saved tokenizer has {len(named)} named and {len(special)} other special tokens; "
            f"allowed are {_MOST_NAMED} and {_MOST_SPECIAL}"
        )
    if max(map(len, [*special, *named.values()]), default=0) > _LONGEST_TOKEN:
        raise ValueError(f"the saved tokenizer has a special token of more than {_LONGEST_TOKEN} characters")
    if len(state["chat_template"] or "") > _LONGEST_TEMPLATE:
        raise ValueError(f"the saved chat template has more than {_LONGEST_TEMPLATE} characters")
    try:
        check_backend(state["backend"])
    except ValueError as error:
        raise ValueError(f"the saved tokenizer cannot be read: {error}") from error


def check_fields(state: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Check that every field exists and has its type."""
    invalid = [name for name, allowed in types.items() if not isinstance(state.get(name), allowed)]
    if invalid:
        raise ValueError(f"{where} has no valid {', '.join(invalid)}")
