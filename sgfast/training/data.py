"""Records as training examples: token ids with the masks of what is hidden and of what counts."""

from torch import Tensor
from torch.utils.data import Dataset

from sgfast.huggingface.tokenization_utils import TokenizerWrapper
from sgfast.utils.records import IndexedRecords, Record, RecordError, TextAs


class TokenizedRecords(Dataset[dict[str, Tensor]]):
    """The records of a file, each tokenized when it is asked for.

    A chat goes through the tokenizer's chat template. So does a text, as the message of a user, which is where a
    client's private text stands; with ``text_as="plain"`` it is tokenized as it is, all of it to be hidden.

    Args:
        records: of one file.
        tokenizer_wrapper: says which tokens are hidden and which count.
        max_length: tokens kept of a record.
        text_as: ``"message"`` or ``"plain"``.

    Raises:
        RecordError: for an example, if the wrapper or the chat template refuses it; names file and line.
    """

    def __init__(
        self,
        records: IndexedRecords,
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
        """``input_ids, attention_mask, noise_mask, loss_mask``, each (T,)."""
        record = self.records[index]
        try:
            if record.text is not None and self.text_as == "plain":
                rows = self.tokenizer_wrapper.encode_text(record.text, truncation=True, max_length=self.max_length)
            else:
                rows = self.tokenizer_wrapper(as_chat(record), truncation=True, max_length=self.max_length)
        except (ValueError, TypeError) as error:
            raise RecordError(f"{self.records.path}, line {record.line}: {error}") from error
        return {name: tensor[0] for name, tensor in rows.items()}


def check_trainable(examples: TokenizedRecords) -> None:
    """Check that there is something to learn; usually the first record tells.

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


def as_chat(record: Record) -> list[dict[str, str]]:
    """A record's messages, or its text as the message of a user."""
    return record.messages or [{"role": "user", "content": record.text or ""}]
