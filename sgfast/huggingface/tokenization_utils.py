"""Conversion of chats to tensors, with masks of the tokens that a transform hides and that count in the loss.

The chat template turns messages into one text, and ``content_spans`` finds the characters of each message in the text.
The tokenizer turns the text into ids with character offsets, and ``chat_rows`` uses the offsets to find the tokens of
each message.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgfast.huggingface.chat_rows import ChatTemplate, Row, chat_rows, checked_max_length, offset_tokenizer, truncated
from sgfast.huggingface.collator import IGNORED_LABEL, NoiseMaskCollator
from sgfast.huggingface.conversations import chat_conversations, described, instruction_conversations
from sgfast.huggingface.noise_tokenizer import NoiseEncoding, NoiseTokenizer
from sgfast.huggingface.tokenizer_state import check_fields, tokenizer_faults, tokenizer_from_state, tokenizer_state
from sgfast.ops.validation import check_bool, did_you_mean
from sgfast.utils import strict_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["NoiseEncoding", "NoiseTokenizer", "PromptType", "TokenizerWrapper"]

_JSON_FORMAT = 1
_STATE_TYPES = {
    "tokenizer": dict,
    "model_type": str,
    "include_labels": bool,
    "ignore_prompt_loss": bool,
    "prompt_type": str,
}


class PromptType(enum.Enum):
    """Kind of examples that a ``TokenizerWrapper`` takes.

    ``CHAT``: a list of messages, each ``{"role": "system" | "user" | "assistant", "content": str}``.
    ``INSTRUCTION``: a dictionary with the keys instruction, system_prompt, context and response, all strings.
    """

    CHAT = "chat"
    INSTRUCTION = "instruction"


class TokenizerWrapper:
    """Tokenizer of chats or instructions that adds the masks for training and inference of a transform.

    ``noise_mask`` selects the content of system and user messages (instruction, system_prompt and context). The mask
    does not select template tokens, assistant content (response) and padding. A token that lies partly in selected
    content and partly in the template is selected. Contents may repeat, be empty, or look like template text
    (`sgfast.huggingface.content_spans` describes the search).

    An instruction becomes a chat that is rendered by the same chat template. ``system_prompt`` becomes the system
    message. ``instruction`` becomes the user message; if ``context`` is not empty, a blank line and ``context`` follow
    in the same message. ``response`` becomes the assistant message. An empty ``system_prompt`` or ``response`` gives no
    message.

    Vocabulary and special tokens are copied at construction. Chat template, padding side and padding token are read
    from ``tokenizer`` at each call. If the tokenizer has no padding token, the end-of-sequence token is used; the masks
    do not depend on the padding token.

    Args:
        tokenizer: a fast tokenizer of transformers.
        model_type: the class of the base model, or its name. The name is stored in saved files.
        include_labels: add ``labels``: the input ids, and −100 where ``loss_mask`` is False.
        ignore_prompt_loss: True restricts ``loss_mask`` to assistant content (response) and the added token that the
            template writes after the content, such as ``<|im_end|>``, if there is one. False counts every attended
            token.
        prompt_type: the kind of examples, see ``PromptType``.

    Raises:
        ValueError: the tokenizer is not a fast one (other tokenizers report no offsets), or ``prompt_type`` is unknown.
        TypeError: ``model_type`` is neither a class nor a string, or an option is not a bool.

    Example:
        >>> from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from sgfast.huggingface import TokenizerWrapper
        >>> vocabulary = {"?": 0, "<user>": 1, "<end>": 2, "good": 3, " day": 4}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Split(Regex("<user>|<end>| ?[a-z]+"), "isolated")
        >>> template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", chat_template=template)
        >>> wrapper = TokenizerWrapper(tokenizer, model_type="LlamaForCausalLM")
        >>> inputs = wrapper([{"role": "user", "content": "good day"}])
        >>> inputs["input_ids"], inputs["noise_mask"]
        (tensor([[1, 3, 4, 2]]), tensor([[False,  True,  True, False]]))
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        model_type: type | str,
        include_labels: bool = False,
        ignore_prompt_loss: bool = False,
        prompt_type: PromptType = PromptType.CHAT,
    ) -> None:
        self._offset_tokenizer = offset_tokenizer(tokenizer)
        if not isinstance(model_type, type | str):
            raise TypeError(f"model_type must be a class or its name; got {type(model_type).__name__}")
        self.tokenizer = tokenizer
        self._from_elsewhere = False
        self.model_type = model_type
        self.include_labels = check_bool("include_labels", include_labels)
        self.ignore_prompt_loss = check_bool("ignore_prompt_loss", ignore_prompt_loss)
        try:
            self.prompt_type = PromptType(prompt_type)
        except ValueError as error:
            allowed = ", ".join(map(str, PromptType))
            suggestion = did_you_mean(prompt_type, [kind.value for kind in PromptType])
            raise ValueError(f"prompt_type must be one of {allowed}; got {prompt_type!r}{suggestion}") from error

    def __call__(
        self,
        examples: Sequence[Any] | Mapping[str, str],
        *,
        add_generation_prompt: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Tokenize one example or a list of them.

        Args:
            examples: for ``PromptType.CHAT`` a list of messages or a list of such lists, for ``INSTRUCTION`` a
                dictionary or a list of dictionaries. Other keys than the documented ones are refused, because text
                under another key would reach the template unprotected.
            add_generation_prompt: end with the template's opening of an assistant message, so that a model answers.
            truncation: cut ids and masks at ``max_length`` tokens, on the tokenizer's ``truncation_side``.
            max_length: a number of tokens; needs ``truncation``. The default is the tokenizer's ``model_max_length``.

        Returns:
            ``input_ids`` and ``attention_mask`` (int64), ``noise_mask`` and ``loss_mask`` (bool) and, with
            ``include_labels``, ``labels`` (int64), each (B, T), padded on the tokenizer's ``padding_side`` to the
            longest example.

        Raises:
            ValueError: there is no chat template, or the template refuses a chat; a role or key is unknown or missing;
                there is no example or no message; ``max_length`` is invalid or given without ``truncation``; there is
                no token to pad with.
            TypeError: an example, a message or a content has the wrong type.
        """
        kept = self._kept_length(truncation, max_length)
        instructions = self.prompt_type is PromptType.INSTRUCTION
        conversations = instruction_conversations(examples) if instructions else chat_conversations(examples)
        template = ChatTemplate(
            self.tokenizer, add_generation_prompt=add_generation_prompt, bounded=self._from_elsewhere
        )
        rows = chat_rows(conversations, template, self._offset_tokenizer, ignore_prompt_loss=self.ignore_prompt_loss)
        return self._collate(rows, kept)

    def encode_text(
        self, texts: str | Sequence[str], *, truncation: bool = False, max_length: int | None = None
    ) -> dict[str, Tensor]:
        """Tokenize plain text without a template, as for language-model training.

        Args:
            texts: one text or a list of them.
            truncation: cut at ``max_length`` tokens, special tokens included, on the tokenizer's ``truncation_side``.
            max_length: a number of tokens; needs ``truncation``. The default is the tokenizer's ``model_max_length``.

        Returns:
            The same dictionary as ``__call__``. ``noise_mask`` selects the tokens of the text: all attended tokens
            except the special tokens that the tokenizer adds around the text. ``loss_mask`` selects every attended
            token, because plain text has no prompt.

        Raises:
            ValueError: there is no text, ``max_length`` is invalid or given without ``truncation``, or there is no
                token to pad with.
            TypeError: ``texts`` holds values that are not strings.
        """
        batch = [texts] if isinstance(texts, str) else texts
        if not isinstance(batch, Sequence) or not all(isinstance(text, str) for text in batch):
            raise TypeError(f"texts must be a string or a list of strings; got {described(texts)}")
        if not batch:
            raise ValueError("texts must hold at least one text; got none")
        kept = self._kept_length(truncation, max_length)
        with tokenizer_faults("the tokenizer failed"):
            encoded = self.tokenizer(
                list(batch), truncation=truncation, max_length=kept, padding=False, return_special_tokens_mask=True
            )
        rows = []
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            ids = torch.tensor(ids, dtype=torch.long)
            rows.append(Row(ids, torch.tensor(special, dtype=torch.long) == 0, torch.ones_like(ids, dtype=torch.bool)))
        return self._collate(rows, kept)

    def to_json(self) -> str:
        """Return the wrapper as a JSON text for ``from_json``: tokenizer, chat template, special tokens and options."""
        return json.dumps(
            {
                "format": _JSON_FORMAT,
                "tokenizer": tokenizer_state(self.tokenizer),
                "model_type": self.model_type if isinstance(self.model_type, str) else self.model_type.__name__,
                "include_labels": self.include_labels,
                "ignore_prompt_loss": self.ignore_prompt_loss,
                "prompt_type": self.prompt_type.value,
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "TokenizerWrapper":
        """Rebuild a wrapper from the JSON text of ``to_json``. Both wrappers give equal outputs.

        No name in ``text`` is imported or opened: the tokenizer is always a ``PreTrainedTokenizerFast``, and
        ``model_type`` stays a string. The tokenizer's parts are bounded (`sgfast.huggingface.tokenizer_parts`). The
        chat template runs in the sandbox of transformers with a budget for its time and output.

        Args:
            text: the result of ``to_json``.

        Raises:
            ValueError: ``text`` is not a valid JSON text of a wrapper, or the tokenizer in it is refused.
        """
        try:
            loaded = strict_json.loads(text)
        except ValueError as error:
            raise ValueError(f"a saved TokenizerWrapper must be JSON: {error}") from error
        state = loaded if isinstance(loaded, dict) else {}
        if state.get("format") != _JSON_FORMAT:
            raise ValueError(
                f"a saved TokenizerWrapper must be an object of format {_JSON_FORMAT}; got {state.get('format')!r}"
            )
        check_fields(state, _STATE_TYPES, "the saved TokenizerWrapper")
        wrapper = cls(
            tokenizer_from_state(state["tokenizer"]),
            state["model_type"],
            include_labels=state["include_labels"],
            ignore_prompt_loss=state["ignore_prompt_loss"],
            prompt_type=PromptType(state["prompt_type"]),
        )
        wrapper._from_elsewhere = True
        return wrapper

    def _kept_length(self, truncation: bool, max_length: int | None) -> int | None:
        if truncation:
            return checked_max_length(self.tokenizer, max_length)
        if max_length is not None:
            raise ValueError(f"max_length={max_length} needs truncation=True")
        return None

    def _collate(self, rows: list[Row], kept: int | None) -> dict[str, Tensor]:
        if kept is not None:
            rows = truncated(rows, self.tokenizer, kept)
        examples = []
        for row in rows:
            example = {"input_ids": row.ids, "noise_mask": row.noise, "loss_mask": row.loss}
            if self.include_labels:
                example["labels"] = row.ids.where(row.loss, IGNORED_LABEL)
            examples.append(example)
        return NoiseMaskCollator(self.tokenizer)(examples)
