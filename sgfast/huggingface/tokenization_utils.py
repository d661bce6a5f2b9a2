"""From chats to tensors: which tokens a transform must hide, and which count in the loss.

The chat template turns messages into one text, in which ``content_spans`` finds what came from which message; the
tokenizer turns that text into ids with offsets into it, by which ``chat_rows`` carries the spans over to tokens.
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
from sgfast.ops.validation import check_bool
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
    """What a ``TokenizerWrapper`` is called on.

    ``CHAT``: a list of messages, each ``{"role": "system" | "user" | "assistant", "content": str}``.
    ``INSTRUCTION``: a dictionary of the strings instruction, system_prompt, context and response.
    """

    CHAT = "chat"
    INSTRUCTION = "instruction"


class TokenizerWrapper:
    """Tokenize chats or instructions together with the masks that training and inference of a transform need.

    Content of system and user messages (of instruction, system_prompt and context) is selected by ``noise_mask``;
    template tokens, assistant content (response) and padding are not. A token that straddles the border of selected
    content and template is selected. Contents may repeat, be empty, or look like template text: the module's
    docstring says how they are found. An instruction becomes a chat and goes through the same chat template:
    ``system_prompt`` the system message (none if empty), ``instruction`` the user message, followed by a blank line
    and ``context`` if there is one, ``response`` the assistant message (none if empty).

    Vocabulary and special tokens are copied at construction; chat template, padding side and padding token are
    read from ``tokenizer`` at each call. Padding uses the padding token, or the end-of-sequence token where there is
    none; the masks never depend on which it is.

    Args:
        tokenizer: a fast tokenizer of transformers.
        model_type: the base model's class, or its name. Kept for the reader of a saved file.
        include_labels: add ``labels``: the input ids, −100 where ``loss_mask`` is False.
        ignore_prompt_loss: restrict ``loss_mask`` to responses: assistant content and, if the template writes an added
            token such as ``<|im_end|>`` after it, that token. Otherwise every attended token counts.
        prompt_type: what the wrapper is called on, see ``PromptType``.

    Raises:
        ValueError: the tokenizer is not a fast one (others report no offsets), or ``prompt_type`` is unknown.
        TypeError: ``model_type`` is neither a class nor a string, or an option no bool.

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
            raise ValueError(f"prompt_type must be one of {allowed}; got {prompt_type!r}") from error

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
                dictionary or a list of dictionaries. No keys but the documented ones: text under another key would
                reach the template unprotected.
            add_generation_prompt: end with the template's opening of an assistant message, to let a model answer.
            truncation: cut ids and masks alike at ``max_length``, on the tokenizer's ``truncation_side``.
            max_length: tokens kept; by default the tokenizer's ``model_max_length``.

        Returns:
            ``input_ids`` and ``attention_mask`` (int64), ``noise_mask`` and ``loss_mask`` (bool) and, if
            ``include_labels``, ``labels`` (int64), each (B, T), padded on the tokenizer's ``padding_side`` to the
            longest example.

        Raises:
            ValueError: there is no chat template, or it refuses a chat; a role or key is unknown or missing; there is
                no example or no message; ``max_length`` does not fit ``truncation``; there is no token to pad with.
            TypeError: an example, message or string is of another type.
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
            truncation: cut at ``max_length``, special tokens included, on the tokenizer's ``truncation_side``.
            max_length: tokens kept; by default the tokenizer's ``model_max_length``.

        Returns:
            The dictionary of ``__call__``. ``noise_mask`` selects the tokens of the text: all attended ones but the
            special tokens that the tokenizer adds around it. ``loss_mask`` selects every attended token: plain text
            has no prompt.

        Raises:
            ValueError: there is no text, ``max_length`` does not fit ``truncation``, or there is no token to pad with.
            TypeError: ``texts`` holds something else than strings.
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
        """Everything ``from_json`` needs, as one JSON text: tokenizer, chat template, special tokens and options."""
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
        """Rebuild a wrapper whose outputs equal those of the one that wrote ``text``.

        Nothing named in ``text`` is imported or opened: the tokenizer is always a ``PreTrainedTokenizerFast`` and
        ``model_type`` stays a string. The tokenizer's parts are bounded (`sgfast.huggingface.tokenizer_parts`), and
        the chat template runs in the sandbox of transformers with a budget for its time and output.

        Args:
            text: what ``to_json`` returned.

        Raises:
            ValueError: ``text`` is not such a JSON text.
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
