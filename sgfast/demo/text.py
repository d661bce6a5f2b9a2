"""Real text for the demo: Python's own documentation topics, or any UTF-8 file."""

import random
import re
from pathlib import Path
from typing import NamedTuple

from sgfast.utils.input_files import open_regular

_MINIMUM_PASSAGES = 16
# The text is in memory several times over.
_LARGEST_TEXT = 2**26


class Passages(NamedTuple):
    """Disjoint passages of one text."""

    train: list[str]
    held_out: list[str]


def read_text(path: Path | None) -> str:
    """Read the file's text; None for the documentation topics that every Python carries.

    Raises:
        ValueError: no such file, no regular one, not UTF-8 text, or more than 64 MiB.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics[name] for name in sorted(topics))
    with open_regular(path, wanted="text file") as file:
        content = file.read(_LARGEST_TEXT + 1)
    if len(content) > _LARGEST_TEXT:
        raise ValueError(f"{path} has more than {_LARGEST_TEXT} bytes: the demo reads no more (`sgfast train` does)")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as UTF-8 text: {error}") from error


def split_passages(text: str, words_per_passage: int, held_out: int, seed: int) -> Passages:
    """Cut a text into passages of equal length in words, shuffle them, and hold some out.

    Args:
        text: any length.
        words_per_passage: words in each passage; a last incomplete passage is dropped.
        held_out: number of passages kept for measuring, at most a quarter of all.
        seed: seed of the shuffle.

    Raises:
        ValueError: the text is too short to train on and hold a part out.

    Example:
        >>> passages = split_passages("a b c d " * 40, words_per_passage=4, held_out=8, seed=0)
        >>> len(passages.train), len(passages.held_out), passages.train[0]
        (32, 8, 'a b c d')
    """
    words = re.sub(r"([*=~^_-])\1{3,}", "", text).split()  # the rules under headings are no words
    passages = [
        " ".join(words[start : start + words_per_passage])
        for start in range(0, len(words) - words_per_passage + 1, words_per_passage)
    ]
    if len(passages) < _MINIMUM_PASSAGES:
        raise ValueError(
            f"the text holds {len(words)} words; at least {_MINIMUM_PASSAGES * words_per_passage} are needed"
        )
    random.Random(seed).shuffle(passages)
    count = min(held_out, len(passages) // 4)
    return Passages(train=passages[count:], held_out=passages[:count])
