"""Tokenization of chats into ids and masks, one row for each chat, without padding.

The chat template renders a chat, and character offsets tell which message each token belongs to.
A token that lies partly in content and partly in the template counts as content: hiding a piece of the template costs
a little utility, but showing a piece of a message costs privacy. A special token that a user typed counts as content
for the same reason.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sgfast.huggingface.content_spans import Rendering, locate_contents, overlapping_tokens, skip_white_space
from sgfast.huggingface.conversations import RESPONSE_ROLE, TRANSFORMED_ROLES, Message
from sgfast.huggingface.tokenizer_state import TokenizerError, backend_copy, tokenizer_faults
from sgfast.ops.validation import check_count

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

# transformers sets model_max_length above this value when the maximum is not known.
_UNKNOWN_MODEL_MAX_LENGTH = 10**12


class Row(NamedTuple):
    """One example before padding: ids (int64) and masks (bool), all of the same length."""

    ids: Tensor
    noise: Tensor
    loss: Tensor


def offset_tokenizer(tokenizer: "PreTrainedTokenizerFast") -> "Tokenizer":
    """Copy a tokenizer for rendered templates, without its post-processor.

    A rendered template already holds its special tokens; a post-processor would add them again. A byte-level
    post-processor may also remove white space from the offsets. White space of a message would then count as template.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer must be a fast tokenizer, because masks need character offsets; "
            f"{type(tokenizer).__name__} does not report offsets. Load the tokenizer with "
            "AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    backend = backend_copy(tokenizer)
    backend.post_processor = None
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


class ChatTemplate:
    """Chat template of a tokenizer (its own or a given one) that renders chats and tells how a turn ends."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        bounded: bool = False,
    ) -> None:
        if not (chat_template or tokenizer.chat_template):
            raise ValueError(
                "the tokenizer has no chat template: set tokenizer.chat_template to the Jinja template of the base "
                "model, or tokenize text without a template by TokenizerWrapper.encode_text"
            )
        if add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt=True starts a new message and continue_final_message=True does not: choose one"
            )
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._add_generation_prompt = add_generation_prompt
        self._continue_final_message = continue_final_message
        # An untrusted template may run for ever.
        self._bounded = bounded

    def render(self, conversation: Sequence[Message], where: str) -> Rendering:
        """Render a conversation with the options of the constructor, and locate its contents."""
        rendering = self._render(conversation, self._add_generation_prompt, where)
        if not self._continue_final_message:
            return rendering
        if not rendering.spans[-1]:
            raise ValueError(f"{where} cannot be continued: the chat template leaves out the final message")
        end = max(end for _, end in rendering.spans[-1])
        spans = [[span for span in spans if span[1] <= end] for spans in rendering.spans]
        return Rendering(rendering.text[:end], spans)

    def end_of_turn_id(self, backend: "Tokenizer") -> int | None:
        """Return the added token that the template writes after an assistant's content, or None."""
        probe = [Message("user", "question"), Message(RESPONSE_ROLE, "answer")]
        text, (_, answer_spans) = self._render(probe, False, "a user message followed by an assistant message")
        if not answer_spans:
            return None
        after = skip_white_space(text, answer_spans[-1][1])
        with tokenizer_faults("the tokenizer failed"):
            encoding = backend.encode(text, add_special_tokens=False)
        added = backend.get_added_tokens_decoder()
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if start <= after < end:
                return token if token in added else None
        return None

    def _render(self, conversation: Sequence[Message], add_generation_prompt: bool, where: str) -> Rendering:
        def render(contents: Sequence[str]) -> str:
            messages = [
                {"role": message.role, "content": content}
                for message, content in zip(conversation, contents, strict=True)
            ]
            return self._text(messages, add_generation_prompt)

        try:
            return locate_contents(render, [message.content for message in conversation])
        except Exception as error:  # a template is a program and can raise any error
            kind = TokenizerError if self._bounded else ValueError
            raise kind(f"the chat template refused {where}: {str(error)[:1000]}") from error

    def _text(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if self._bounded:
            from sgfast.huggingface.bounded_template import render_bounded

            return render_bounded(
                self._chat_template or self._tokenizer.get_chat_template(),
                messages,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens_map,
            )
        rendered: str = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return rendered


def chat_rows(
    conversations: Sequence[Sequence[Message]],
    template: ChatTemplate,
    backend: "Tokenizer",
    *,
    ignore_prompt_loss: bool = False,
) -> list[Row]:
    """Tokenize conversations.

    Args:
        conversations: checked messages.
        template: the template that renders the conversations.
        backend: the result of ``offset_tokenizer``.
        ignore_prompt_loss: count only assistant content and the added token that ends the content in ``loss``.
    """
    renderings = [template.render(conversation, f"example {index}") for index, conversation in enumerate(conversations)]
    with tokenizer_faults("the tokenizer failed"):
        encodings = backend.encode_batch([rendering.text for rendering in renderings], add_special_tokens=False)
    end_of_turn = template.end_of_turn_id(backend) if ignore_prompt_loss else None
    rows = []
    for conversation, rendering, encoding in zip(conversations, renderings, encodings, strict=True):
        row = _row(conversation, rendering, encoding, end_of_turn)
        rows.append(row if ignore_prompt_loss else row._replace(loss=torch.ones_like(row.loss)))
    return rows


def _row(conversation: Sequence[Message], rendering: Rendering, encoding: "Encoding", end_of_turn: int | None) -> Row:
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
    return Row(ids, noise, response)


def checked_max_length(tokenizer: "PreTrainedTokenizerFast", max_length: int | None) -> int:
    """Check and return the length to cut or pad to: ``max_length``, by default the tokenizer's ``model_max_length``."""
    kept = tokenizer.model_max_length if max_length is None else max_length
    if check_count("max_length", kept) > _UNKNOWN_MODEL_MAX_LENGTH:
        raise ValueError("max_length must be given: the tokenizer does not know the model's own maximum")
    return kept


def truncated(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerFast", kept: int) -> list[Row]:
    """Cut ids and masks to ``kept`` tokens, on the tokenizer's ``truncation_side``."""
    cut = slice(-kept, None) if tokenizer.truncation_side == "left" else slice(kept)
    return [Row(*(values[cut] for values in row)) for row in rows]
