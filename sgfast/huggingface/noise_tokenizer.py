"""Class ``NoiseTokenizer``: ``apply_chat_template`` of a tokenizer that also returns noise and loss masks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast, get_args

import torch
from torch import Tensor

from sgfast.huggingface.chat_rows import ChatTemplate, Row, chat_rows, checked_max_length, offset_tokenizer, truncated
from sgfast.huggingface.collator import PaddingSide, padded, round_up
from sgfast.huggingface.conversations import chat_conversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Padding = bool | Literal["longest", "max_length"]


class NoiseEncoding(TypedDict):
    """Result of ``NoiseTokenizer.apply_chat_template``, tensors (B, T); pass it on as ``noisy_model(**encoding)``."""

    input_ids: Tensor
    noise_mask: Tensor
    attention_mask: NotRequired[Tensor]
    loss_mask: NotRequired[Tensor]


class NoiseTokenizer:
    """Tokenizer of chats that makes the masks of `TokenizerWrapper`, with options for each call.

    The method `apply_chat_template` takes its options as arguments, like the method of that name of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers. Its vocabulary and special tokens are copied at construction. Its
            chat template, padding token, padding side and truncation side are read at each call.

    Raises:
        ValueError: the tokenizer is not a fast one.

    Example:
        >>> from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from sgfast.huggingface import NoiseTokenizer
        >>> vocabulary = {"?": 0, "<user>": 1, "<end>": 2, "good": 3, " day": 4}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Split(Regex("<user>|<end>| ?[a-z]+"), "isolated")
        >>> template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        >>> tokenizer = NoiseTokenizer(PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template))
        >>> tokenizer.apply_chat_template([{"role": "user", "content": "good day"}], return_loss_mask=False)
        {'input_ids': tensor([[1, 3, 4, 2]]), 'noise_mask': tensor([[False,  True,  True, False]])}
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self._offset_tokenizer = offset_tokenizer(tokenizer)
        self.tokenizer = tokenizer

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        padding: Padding = True,
        truncation: bool = False,
        max_length: int | None = None,
        ignore_prompt_loss: bool = False,
        transform_all_tokens: bool = False,
        return_attention_mask: bool = False,
        return_loss_mask: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> NoiseEncoding:
        """Tokenize one conversation or a list of them.

        Args:
            conversation: a list of messages ``{"role": "system" | "user" | "assistant", "content": str}``, or a list
                of such lists.
            chat_template: a Jinja template in place of the tokenizer's own.
            add_generation_prompt: end with the template's opening of an assistant message.
            continue_final_message: end with the content of the last message, so that a model continues the content.
            padding: True or "longest" pads to the longest example. "max_length" pads to ``max_length``. False does not
                pad and requires examples of one length.
            truncation: cut at ``max_length``, on the tokenizer's ``truncation_side``.
            max_length: a number of tokens. The default is the tokenizer's ``model_max_length``.
            ignore_prompt_loss: restrict ``loss_mask`` to assistant content and the added token that ends the content.
            transform_all_tokens: select every attended token with ``noise_mask``, also template and assistant content.
            return_attention_mask: add ``attention_mask``. Set this option if a batch has padding: the other masks
                cannot replace ``attention_mask``.
            return_loss_mask: add ``loss_mask``.
            tokenizer_kwargs: ``padding_side`` and ``pad_to_multiple_of``, for this call.

        Returns:
            ``input_ids`` (int64) and ``noise_mask`` (bool), and on request ``attention_mask`` (int64) and
            ``loss_mask`` (bool), each (B, T). The masks describe the contents that the template wrote: a template may
            strip or replace a content.

        Raises:
            ValueError: there is no chat template, or the template refuses a chat; a role or key is unknown or missing;
                there is no example or no message; ``padding``, ``max_length`` and the lengths contradict each other;
                there is no token to pad with; ``tokenizer_kwargs`` has an unknown key.
            TypeError: a conversation, a message or a content has the wrong type.
        """
        side, multiple = _padding_options(self.tokenizer, tokenizer_kwargs or {})
        if padding not in (True, False, "longest", "max_length"):
            raise ValueError(f"padding must be True, False, longest or max_length; got {padding!r}")
        if max_length is not None and not truncation and padding != "max_length":
            raise ValueError(f"max_length={max_length} needs truncation=True or padding='max_length'")
        template = ChatTemplate(
            self.tokenizer,
            chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        rows = chat_rows(
            chat_conversations(conversation), template, self._offset_tokenizer, ignore_prompt_loss=ignore_prompt_loss
        )
        limit = checked_max_length(self.tokenizer, max_length) if truncation or padding == "max_length" else None
        if limit is not None and truncation:
            rows = truncated(rows, self.tokenizer, limit)
        width = _width([len(row.ids) for row in rows], padding, limit, multiple)
        names = ["input_ids", "noise_mask"]
        names += ["attention_mask"] if return_attention_mask else []
        names += ["loss_mask"] if return_loss_mask else []
        tensors = [_named(row, transform_all_tokens) for row in rows]
        batch = padded([{name: row[name] for name in names} for row in tensors], self.tokenizer, side, width)
        return cast(NoiseEncoding, batch)


def _named(row: Row, transform_all_tokens: bool) -> dict[str, Tensor]:
    return {
        "input_ids": row.ids,
        "noise_mask": torch.ones_like(row.noise) if transform_all_tokens else row.noise,
        "attention_mask": torch.ones_like(row.ids),
        "loss_mask": row.loss,
    }


def _padding_options(
    tokenizer: "PreTrainedTokenizerFast", tokenizer_kwargs: Mapping[str, Any]
) -> tuple[str, int | None]:
    unknown = [repr(name) for name in tokenizer_kwargs if name not in ("padding_side", "pad_to_multiple_of")]
    if unknown:
        raise ValueError(
            f"tokenizer_kwargs may hold padding_side and pad_to_multiple_of only; got {', '.join(unknown)}"
        )
    side = tokenizer_kwargs.get("padding_side") or tokenizer.padding_side
    if side not in get_args(PaddingSide):
        raise ValueError(f"padding_side must be left or right; got {side!r}")
    multiple = tokenizer_kwargs.get("pad_to_multiple_of")
    if multiple is not None and multiple < 1:
        raise ValueError(f"pad_to_multiple_of must be at least 1; got {multiple}")
    return side, multiple


def _width(lengths: Sequence[int], padding: Padding, limit: int | None, multiple: int | None) -> int:
    """Return the length of the batch, padding included."""
    longest = max(lengths)
    if padding is False:
        if len(set(lengths)) > 1:
            raise ValueError(f"padding=False needs examples of one length; got {sorted(set(lengths))}")
        return longest
    if padding == "max_length" and limit is not None:
        if longest > limit:
            raise ValueError(f"padding to max_length={limit} needs truncation=True: an example has {longest} tokens")
        return round_up(limit, multiple)
    return round_up(longest, multiple)
