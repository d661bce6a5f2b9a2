"""Records as training examples: token ids, the mask of transformed tokens and the mask of tokens that count."""

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.utils.records import IndexedRecords, Record, RecordError, TextAs, TextRecords


class TokenizedRecords(Dataset[dict[str, Tensor]]):
    """The records of a file or of texts. A record is tokenized when it is read.

    Args:
        records: the records of one file, or of texts in memory.
        tokenizer_wrapper: says which tokens are transformed and which count in the loss.
        max_length: number of tokens kept of a record.
        text_as: how `encode_record` reads a text, ``"message"`` or ``"plain"``.

    Raises:
        RecordError: while reading: the wrapper or the chat template refuses a record; the message names file and line.
    """

    def __init__(
        self,
        records: IndexedRecords | TextRecords,
        tokenizer_wrapper: TokenizerWrapper,
        *,
        max_length: int,
        text_as: TextAs = "message",
    ) -> None:
        self.records = records
        self.tokenizer_wrapper = tokenizer_wrapper
        self.max_length = max_length
        self.text_as = text_as

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids, attention_mask, noise_mask, loss_mask``, each (T,)."""
        record = self.records[index]
        try:
            rows = encode_record(
                self.tokenizer_wrapper, record, self.text_as, truncation=True, max_length=self.max_length
            )
        except (ValueError, TypeError) as error:
            raise RecordError(f"{self.records.path}, line {record.line}: {error}") from error
        return {name: tensor[0] for name, tensor in rows.items()}


def check_trainable(examples: TokenizedRecords) -> None:
    """Check that the records have tokens to learn from. Usually the first record is enough.

    Raises:
        RecordError: no record has a token to transform, or none has one that counts; or an example is refused.
    """
    missing = {
        "noise_mask": "to transform (what users and the system say)",
        "loss_mask": "that counts in the loss (with ignore_prompt_loss only what the assistant says)",
    }
    for index in range(len(examples)):
        example = examples[index]
        missing = {mask: what for mask, what in missing.items() if not example[mask].any()}
        if not missing:
            return
    path, kept, what = examples.records.path, examples.max_length, next(iter(missing.values()))
    raise RecordError(f"{path}: no record has a token {what} among its first {kept} tokens (max_length)")


def encode_record(
    tokenizer_wrapper: TokenizerWrapper, record: Record, text_as: TextAs, **options: Any
) -> dict[str, Tensor]:
    """Tokenize a record: ids and masks, (1, T) each.

    A chat goes through the tokenizer's chat template. A text goes through the template as the message of a user,
    because a client's private text stands there. With ``text_as="plain"`` a text is tokenized without the template, and
    all its tokens are transformed.
    """
    if record.text is not None and text_as == "plain":
        return tokenizer_wrapper.encode_text(record.text, **options)
    return tokenizer_wrapper(as_chat(record), **options)


def as_chat(record: Record) -> list[dict[str, str]]:
    """Return a record's messages, or its text as the message of a user."""
    return record.messages or [{"role": "user", "content": record.text or ""}]
