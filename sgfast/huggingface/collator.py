"""Collator that pads examples of different lengths to one batch. Every mask is False on the padding."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100
PaddingSide = Literal["left", "right"]
_REQUIRED, _OPTIONAL = "input_ids", ("attention_mask", "noise_mask", "loss_mask", "labels")


class NoiseMaskCollator:
    """Pad tokenized examples and their masks to one batch, for a ``DataLoader`` or as a Trainer's ``data_collator``.

    The collator adds the masks that the examples lack: an ``attention_mask`` that attends to all tokens of the example,
    a ``noise_mask`` that selects every attended token, as in the noise layers, and a ``loss_mask`` that selects every
    token with a label, or every attended token if there are no ``labels``. ``labels`` are passed on, never made.
    At tokens that are not attended, ``noise_mask`` and ``loss_mask`` are False and ``labels`` are −100, even if the
    example says otherwise.

    Args:
        tokenizer: the tokenizer whose padding token is used, or its end-of-sequence token if it has no padding token.
        padding_side: "left" or "right". By default the collator reads ``tokenizer.padding_side`` at each call.
        pad_to_multiple_of: the batch's length is rounded up to a multiple of this number (at least 1).

    Raises:
        ValueError: ``padding_side`` is unknown or ``pad_to_multiple_of`` below 1.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> from sgfast.huggingface import NoiseMaskCollator
        >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
        >>> collator = NoiseMaskCollator(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"))
        >>> batch = collator([{"input_ids": [1, 2, 1], "noise_mask": [0, 1, 1]}, {"input_ids": [2], "noise_mask": [1]}])
        >>> batch["input_ids"]
        tensor([[1, 2, 1],
                [2, 0, 0]])
        >>> batch["noise_mask"]
        tensor([[False,  True,  True],
                [ True, False, False]])
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        padding_side: PaddingSide | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        if padding_side is not None and padding_side not in get_args(PaddingSide):
            raise ValueError(f"padding_side must be left or right; got {padding_side!r}")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1; got {pad_to_multiple_of}")
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate a list of examples.

        Args:
            examples: dictionaries with ``input_ids`` and, optionally, ``attention_mask``, ``noise_mask``,
                ``loss_mask`` and ``labels``. All examples have the same keys. A value is a list, an array or a tensor
                of T integers or booleans; its shape may also be (1, T), as tokenizer wrappers return one example.

        Returns:
            ``input_ids`` and ``attention_mask`` (int64), ``noise_mask`` and ``loss_mask`` (bool) and, if the examples
            have labels, ``labels`` (int64), each (B, T).

        Raises:
            ValueError: there is no example, a key is unknown or missing, lengths within an example differ, a mask
                holds other values than 0 and 1, or the tokenizer has no token to pad with.
            TypeError: an example is not a dictionary, or a value does not hold integers or booleans.
        """
        rows = _rows(examples)
        longest = max(len(row["input_ids"]) for row in rows)
        width = round_up(longest, self.pad_to_multiple_of)
        return padded(rows, self.tokenizer, self.padding_side or self.tokenizer.padding_side, width)


def round_up(length: int, multiple: int | None) -> int:
    """Round a length up to a multiple; None leaves the length as it is."""
    return length if multiple is None else -(-length // multiple) * multiple


def padded(
    rows: Sequence[Mapping[str, Tensor]], tokenizer: "PreTrainedTokenizerBase", side: str, width: int
) -> dict[str, Tensor]:
    """Pad rows with the same keys to one width: ids with the padding token, labels with −100, masks with 0."""
    padding = padding_id(tokenizer) if any(len(row["input_ids"]) < width for row in rows) else 0
    values = {"input_ids": padding, "labels": IGNORED_LABEL}
    batch = {}
    for name, first in rows[0].items():
        batch[name] = first.new_full((len(rows), width), values.get(name, 0))
        for target, row in zip(batch[name], rows, strict=True):
            length = len(row[name])
            target[width - length if side == "left" else 0 :][:length] = row[name]
    return batch


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the padding token, or of the end-of-sequence token if there is no padding token."""
    tokens = tokenizer.special_tokens_map
    token = tokens.get("pad_token", tokens.get("eos_token"))
    if token is None:
        raise ValueError("examples of different lengths need padding: set tokenizer.pad_token or eos_token")
    padding: int = tokenizer.convert_tokens_to_ids(token)
    return padding


def _rows(examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
    """Check all examples and add the masks that they lack."""
    if not isinstance(examples, Sequence) or isinstance(examples, str):
        raise TypeError(f"examples must be a list of dictionaries; got {type(examples).__name__}")
    if not examples:
        raise ValueError("examples must hold at least one example; got none")
    rows = []
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise TypeError(f"example {index} must be a dictionary; got {type(example).__name__}")
        if example.keys() != examples[0].keys():
            different = ", ".join(sorted(map(str, example.keys() ^ examples[0].keys())))
            raise ValueError(
                f"all examples must have the same keys; example {index} and example 0 differ in {different}"
            )
        rows.append(_row(example, index))
    return rows


def _row(example: Mapping[str, Any], index: int) -> dict[str, Tensor]:
    if _REQUIRED not in example:
        raise ValueError(f"example {index} has no {_REQUIRED}")
    unknown = [repr(name) for name in example if name not in (_REQUIRED, *_OPTIONAL)]
    if unknown:
        known = ", ".join((_REQUIRED, *_OPTIONAL))
        raise ValueError(f"example {index} may have the keys {known} only; remove {', '.join(unknown)}")
    given = {name: _integers(values, f"example {index}: {name}") for name, values in example.items()}
    ids = given["input_ids"]
    for name, values in given.items():
        if len(values) != len(ids):
            raise ValueError(f"example {index}: {name} has {len(values)} entries, input_ids has {len(ids)}")
        if name.endswith("_mask") and not ((values == 0) | (values == 1)).all():
            raise ValueError(f"example {index}: {name} must hold 0 and 1 only")
    attention = given.get("attention_mask", torch.ones_like(ids))
    attended = attention != 0
    labels = given.get("labels")
    counted = attended if labels is None else labels != IGNORED_LABEL
    noise, loss = given.get("noise_mask", attention), given.get("loss_mask", counted)
    row = {"input_ids": ids, "attention_mask": attention}
    row |= {"noise_mask": (noise != 0) & attended, "loss_mask": (loss != 0) & attended}
    if labels is not None:
        row["labels"] = labels.where(attended, IGNORED_LABEL)
    return row


def _integers(values: Any, where: str) -> Tensor:
    """Convert values to a one-dimensional int64 tensor on the CPU."""
    try:
        tensor = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} must be a list of integers: {error}") from error
    if tensor.ndim == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 1:
        raise ValueError(f"{where} must have one dimension; got the shape {tuple(tensor.shape)}")
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"{where} must hold integers or booleans; got {tensor.dtype}")
    return tensor.to(torch.long)
