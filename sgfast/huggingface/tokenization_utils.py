"""From chats to tensors: which tokens a transform must hide, and which count in the loss.

The chat template turns messages into one text, in which ``content_spans`` finds what came from which message; the
tokenizer turns that text into ids with offsets into it, which carry the spans over to tokens. A token that straddles
the border of content and template counts as content: hiding a piece of the template costs a little utility, showing
a piece of a message costs privacy. For the same reason a special token that a user typed is content.
"""

import enum
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sgfast.huggingface.collator import IGNORED_LABEL, NoiseMaskCollator
from sgfast.huggingface.content_spans import Rendering, locate_contents, overlapping_tokens, skip_white_space
from sgfast.huggingface.examples import (
    RESPONSE_ROLE,
    TRANSFORMED_ROLES,
    Message,
    checked_message,
    described,
    instruction_messages,
    is_list,
)
from sgfast.huggingface.tokenizer_state import backend_copy, check_fields, tokenizer_from_state, tokenizer_state

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast

# Above this, transformers' model_max_length means "not known".
_UNKNOWN_MODEL_MAX_LENGTH = 10**12
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


class _Row(NamedTuple):
    """One example before padding: ids and masks of one length."""

    ids: Tensor
    noise: Tensor
    loss: Tensor


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
        TypeError: ``model_type`` is neither a class nor a string.

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
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "tokenizer must be a fast tokenizer: the masks are found by character offsets, which "
                f"{type(tokenizer).__name__} does not report. Load it with AutoTokenizer.from_pretrained(..., "
                "use_fast=True)"
            )
        if not isinstance(model_type, type | str):
            raise TypeError(f"model_type must be a class or its name; got {type(model_type).__name__}")
        self.tokenizer = tokenizer
        self.model_type = model_type
        self.include_labels = include_labels
        self.ignore_prompt_loss = ignore_prompt_loss
        self.prompt_type = PromptType(prompt_type)
        # For rendered templates, which hold their special tokens already: a post-processor would add them, and a
        # byte-level one may trim white space off the offsets, so that it would pass for template.
        self._offset_tokenizer = backend_copy(tokenizer)
        self._offset_tokenizer.post_processor = None
        self._offset_tokenizer.encode_special_tokens = tokenizer.split_special_tokens

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
        renderings, conversations = [], []
        for index, example in enumerate(self._examples(examples)):
            conversation = self._conversation(example, f"example {index}")
            conversations.append(conversation)
            renderings.append(self._render(conversation, add_generation_prompt, f"example {index}"))
        encodings = self._offset_tokenizer.encode_batch([r.text for r in renderings], add_special_tokens=False)
        end_of_turn = self._end_of_turn_id() if self.ignore_prompt_loss else None
        rows = [self._row(*parts, end_of_turn) for parts in zip(conversations, renderings, encodings, strict=True)]
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
        encoded = self.tokenizer(
            list(batch), truncation=truncation, max_length=kept, padding=False, return_special_tokens_mask=True
        )
        rows = []
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            ids = torch.tensor(ids, dtype=torch.long)
            rows.append(_Row(ids, torch.tensor(special, dtype=torch.long) == 0, torch.ones_like(ids, dtype=torch.bool)))
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
        ``model_type`` stays a string. The chat template runs in the sandbox of transformers.

        Args:
            text: what ``to_json`` returned.

        Raises:
            ValueError: ``text`` is not such a JSON text.
        """
        try:
            loaded = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a saved TokenizerWrapper must be JSON: {error}") from error
        state = loaded if isinstance(loaded, dict) else {}
        if state.get("format") != _JSON_FORMAT:
            raise ValueError(
                f"a saved TokenizerWrapper must be an object of format {_JSON_FORMAT}; got {state.get('format')!r}"
            )
        check_fields(state, _STATE_TYPES, "the saved TokenizerWrapper")
        return cls(
            tokenizer_from_state(state["tokenizer"]),
            state["model_type"],
            include_labels=state["include_labels"],
            ignore_prompt_loss=state["ignore_prompt_loss"],
            prompt_type=PromptType(state["prompt_type"]),
        )

    def _examples(self, examples: Any) -> list[Any]:
        """A list of examples, from one or several."""
        if self.prompt_type is PromptType.INSTRUCTION and isinstance(examples, Mapping):
            return [examples]
        if not is_list(examples):
            wanted = "messages" if self.prompt_type is PromptType.CHAT else "dictionaries, or one dictionary"
            raise TypeError(f"examples must be a list of {wanted}; got {described(examples)}")
        if not examples:
            raise ValueError("examples must hold at least one example; got none")
        if self.prompt_type is PromptType.CHAT and not is_list(examples[0]):
            return [examples]
        return list(examples)

    def _conversation(self, example: Any, where: str) -> list[Message]:
        if self.prompt_type is PromptType.INSTRUCTION:
            return instruction_messages(example, where)
        if not is_list(example):
            raise TypeError(f"{where} must be a list of messages; got {described(example)}")
        if not example:
            raise ValueError(f"{where} must hold at least one message; got none")
        return [checked_message(message, f"{where}, message {index}") for index, message in enumerate(example)]

    def _render(self, conversation: list[Message], add_generation_prompt: bool, where: str) -> Rendering:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: set tokenizer.chat_template to the Jinja template of the base "
                "model, or tokenize text without a template by encode_text"
            )

        def render(contents: Sequence[str]) -> str:
            messages = [
                {"role": message.role, "content": content}
                for message, content in zip(conversation, contents, strict=True)
            ]
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return rendered

        try:
            return locate_contents(render, [message.content for message in conversation])
        except Exception as error:  # a template is a program of its own: it raises what it likes
            raise ValueError(f"the chat template refused {where}: {error}") from error

    def _row(
        self, conversation: list[Message], rendering: Rendering, encoding: "Encoding", end_of_turn: int | None
    ) -> _Row:
        ids = torch.tensor(encoding.ids, dtype=torch.long)
        offsets = torch.tensor(encoding.offsets, dtype=torch.long).view(-1, 2)
        noise, response = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        for message, spans in zip(conversation, rendering.spans, strict=True):
            for start, end in spans:
                if message.role in TRANSFORMED_ROLES:
                    noise |= overlapping_tokens(offsets, start, end)
                    continue
                response |= overlapping_tokens(offsets, start, end)
                if end_of_turn is not None:
                    after = skip_white_space(rendering.text, end)
                    response |= overlapping_tokens(offsets, after, after + 1) & (ids == end_of_turn)
        return _Row(ids, noise, response if self.ignore_prompt_loss else torch.ones_like(response))

    def _end_of_turn_id(self) -> int | None:
        """The added token that the template writes after an assistant's content, if it writes one."""
        probe = [Message("user", "question"), Message(RESPONSE_ROLE, "answer")]
        text, (_, answer_spans) = self._render(probe, False, "a user message followed by an assistant message")
        if not answer_spans:
            return None
        after = skip_white_space(text, answer_spans[-1][1])
        encoding = self._offset_tokenizer.encode(text, add_special_tokens=False)
        added = self._offset_tokenizer.get_added_tokens_decoder()
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if start <= after < end:
                return token if token in added else None
        return None

    def _kept_length(self, truncation: bool, max_length: int | None) -> int | None:
        if not truncation:
            if max_length is not None:
                raise ValueError(f"max_length={max_length} needs truncation=True")
            return None
        kept = self.tokenizer.model_max_length if max_length is None else max_length
        if not isinstance(kept, int) or isinstance(kept, bool):
            raise TypeError(f"max_length must be an int; got {type(kept).__name__}")
        if kept < 1:
            raise ValueError(f"max_length must be at least 1; got {kept}")
        if kept > _UNKNOWN_MODEL_MAX_LENGTH:
            raise ValueError("truncation=True needs max_length: the tokenizer does not know the model's own maximum")
        return kept

    def _collate(self, rows: list[_Row], kept: int | None) -> dict[str, Tensor]:
        if kept is not None:
            cut = slice(-kept, None) if self.tokenizer.truncation_side == "left" else slice(kept)
            rows = [_Row(*(values[cut] for values in row)) for row in rows]
        examples = []
        for row in rows:
            example = {"input_ids": row.ids, "noise_mask": row.noise, "loss_mask": row.loss}
            if self.include_labels:
                example["labels"] = row.ids.where(row.loss, IGNORED_LABEL)
            examples.append(example)
        return NoiseMaskCollator(self.tokenizer)(examples)
