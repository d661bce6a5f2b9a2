"""Check of the parts of an untrusted fast tokenizer, before the Rust library builds the tokenizer.

A tokenizer is a small program: its parts rewrite, split and extend a text one after the other. Parts of a forged file
can double a text thirty times, match a pattern for hours, or ask for so much memory that the Rust library ends the
process. Therefore each part must be of a known kind, and the size of each number and string is bounded. The product of
the factors by which all parts can lengthen a text is bounded too. Published tokenizers stay within each bound.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

from sgfast.huggingface.precompiled_map import longest_growth
from sgfast.utils import strict_json
from sgfast.utils.bounded_pattern import check_pattern

# Ids of today's models are below a hundredth of this bound.
LARGEST_ID = 2**24
# JSON characters outside strings. The vocabulary and merges of Gemma take 4.7 million.
_LARGEST_STRUCTURE = 2**23
# Most bytes that all parts together may make of one byte of text. The largest published chain, ALBERT's, can make 726.
_MOST_GROWTH = 1024
# Bytes of all added tokens that are normalized, after their growth.
_MOST_NORMALIZED = 2**24
_MOST_ADDED, _ADDED_CHARACTERS = 2**14, 2**20
_LONGEST_TOKEN, _LONGEST_TEXT = 1024, 64
# Characters in base64. The maps of SentencePiece itself take a third of this bound.
_LONGEST_MAP = 2**20
_MOST_PARTS, _DEEPEST = 32, 4
# Ids without a token. Copying a tokenizer prints the number of each.
_MOST_GAPS = 2**16
# Time of a search inside a word grows with the square of the word's length.
_LONGEST_WORD = 1000
_MOST_PIECES = 32
# Largest growth of a character in UTF-8 by Unicode's forms. The characters are U+FDFA, U+1D160 and U+0130.
_COMPATIBILITY, _CANONICAL, _LOWERCASE = 11.0, 3.0, 1.5


def check_backend(text: str) -> None:
    """Check the JSON text of a Rust tokenizer, as ``Tokenizer.to_str`` writes it.

    Raises:
        ValueError: the text is no such JSON, or a part is of an unknown kind or exceeds a bound. The message names the
            part.
    """
    whole = _Part(strict_json.loads(text, largest_structure=_LARGEST_STRUCTURE), "its tokenizer")
    whole.text("version")
    for name in ("truncation", "padding"):
        if whole.take(name) is not None:
            whole.refuse(f"{name} must be null")
    model = _Part(whole.take("model"), "its model")
    tokens, largest = _model(model)
    normalized = _chain(whole.take("normalizer"), "its normalizer", _NORMALIZERS)
    growth = normalized * _chain(whole.take("pre_tokenizer"), "its pre_tokenizer", _PRE_TOKENIZERS)
    if growth > _MOST_GROWTH:
        whole.refuse(f"can make {growth:.3g} bytes of one byte; allowed are {_MOST_GROWTH}")
    if _chain(whole.take("decoder"), "its decoder", _DECODERS) > _MOST_GROWTH:
        whole.refuse(f"has a decoder that can make more than {_MOST_GROWTH} bytes of one byte")
    post_processor = whole.take("post_processor")
    _chain(post_processor, "its post_processor", _POST_PROCESSORS)
    largest = _check_added(whole.list("added_tokens", _MOST_ADDED), tokens, largest, normalized)
    if _largest_number(post_processor) > max(largest, 1):  # all numbers are ids, or types (0 and 1)
        whole.refuse(f"has a post_processor with ids above the largest, {largest}")
    whole.close()


class _Part:
    """Fields of one part. Each field is taken once, and `close` refuses fields that are left."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        if not isinstance(value, dict):
            self.refuse("must be an object")
        self._fields = dict(value)

    def refuse(self, fault: str) -> NoReturn:
        raise ValueError(f"{self.where} {fault}")

    def take(self, name: str) -> Any:
        return self._fields.pop(name, None)

    def text(self, name: str, longest: int = _LONGEST_TEXT) -> str:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self.refuse(f"has a {name} that is not a string")
        if value is not None and len(value) > longest:
            self.refuse(f"has a {name} of {len(value)} characters; allowed are {longest}")
        return value or ""

    def number(self, name: str, least: int, most: int) -> int:
        value = self.take(name)
        if value is None:
            return least
        if type(value) is not int or not least <= value <= most:
            self.refuse(f"has a {name} that is not between {least} and {most}")
        return int(value)

    def list(self, name: str, most: int) -> list[Any]:
        value = self.take(name)
        if not isinstance(value, list | None):
            self.refuse(f"has {name} that are not a list")
        if value is not None and len(value) > most:
            self.refuse(f"has {len(value)} {name}; allowed are {most}")
        return value or []

    def token(self, name: str) -> None:
        """Check a pair of a token and its id, as some post-processors hold it."""
        value = self.take(name)
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and _is_id(value[1])):
            self.refuse(f"has no valid {name}")

    def close(self) -> None:
        """Refuse unknown fields except true, false and null: another version may add options of these small values."""
        unknown = [name for name, value in self._fields.items() if not isinstance(value, bool | None)]
        if unknown:
            self.refuse(f"has the unknown field {unknown[0][:40]!r}")


_Kinds = dict[str, Callable[[_Part], float]]


def _chain(value: Any, where: str, kinds: _Kinds) -> float:
    """Check a part or a sequence of parts, and return the largest factor by which they can lengthen a text in bytes."""
    growth, count = 1.0, 0
    waiting = [(value, 0)] if value is not None else []
    while waiting:
        value, depth = waiting.pop()
        part = _Part(value, where)
        kind = part.text("type")
        count += 1
        if depth > _DEEPEST or count > _MOST_PARTS:
            part.refuse(f"has more than {_MOST_PARTS} parts, or nests them more than {_DEEPEST} deep")
        if kind == "Sequence":
            for name in ("normalizers", "pretokenizers", "processors", "decoders"):
                waiting += [(one, depth + 1) for one in part.list(name, _MOST_PARTS)]
        elif kind in kinds:
            part.where = f"{where} {kind}"
            growth *= kinds[kind](part)
        else:
            part.refuse(f"has a part of the unknown kind {kind!r}")
        part.close()
    return growth


def _plain(growth: float = 1.0) -> Callable[[_Part], float]:
    """Make the check of a kind of part whose fields are all true or false."""
    return lambda part: growth


def _pattern(part: _Part) -> int:
    """Check a pattern, and return the fewest bytes that the pattern matches."""
    pattern = _Part(part.take("pattern"), f"{part.where}'s pattern")
    regular, string = pattern.text("Regex", 10_000), pattern.text("String", _LONGEST_TOKEN)
    pattern.close()
    if regular:
        return check_pattern(regular, pattern.where)
    return len(string.encode())


def _replace(part: _Part) -> float:
    content, matched = part.text("content", _LONGEST_TOKEN), _pattern(part)
    if matched == 0:  # an empty match inserts the content between all characters
        return 1.0 + len(content.encode())
    return max(1.0, len(content.encode()) / matched)


def _prepend(part: _Part) -> float:
    return 1.0 + len(part.text("prepend").encode())


def _precompiled(part: _Part) -> float:
    return longest_growth(part.text("precompiled_charsmap", _LONGEST_MAP))


def _split(part: _Part) -> float:
    part.text("behavior")
    _pattern(part)
    return 1.0


def _metaspace(part: _Part) -> float:
    for name in ("prepend_scheme", "str_rep"):
        part.text(name)
    # The replacement stands in place of each space, or before a piece.
    return 1.0 + len(part.text("replacement").encode())


def _with_texts(*names: str) -> Callable[[_Part], float]:
    def check(part: _Part) -> float:
        for name in names:
            part.text(name)
        return 1.0

    return check


def _fixed_length(part: _Part) -> float:
    part.number("length", 1, LARGEST_ID)
    return 1.0


def _strip_decoder(part: _Part) -> float:
    part.text("content")
    for name in ("start", "stop"):
        part.number(name, 0, _LONGEST_TEXT)
    return 1.0


def _two_tokens(part: _Part) -> float:
    part.token("sep")
    part.token("cls")
    return 1.0


def _template(part: _Part) -> float:
    for name in ("single", "pair"):
        for piece in part.list(name, _MOST_PIECES):
            _check_piece(_Part(piece, part.where))
    special = part.take("special_tokens")
    if not isinstance(special, dict) or len(special) > _MOST_PIECES:
        part.refuse(f"must have at most {_MOST_PIECES} special_tokens")
    for value in special.values():
        token = _Part(value, part.where)
        token.text("id", _LONGEST_TOKEN)
        if not all(map(_is_id, token.list("ids", _MOST_PIECES))):
            token.refuse("has ids that are not integers of at least 0")
        token.list("tokens", _MOST_PIECES)
        token.close()
    return 1.0


def _check_piece(piece: _Part) -> None:
    for kind in ("SpecialToken", "Sequence"):
        if (value := piece.take(kind)) is not None:
            named = _Part(value, piece.where)
            named.text("id", _LONGEST_TOKEN)
            named.number("type_id", 0, 1000)
            named.close()
    piece.close()


_NORMALIZERS: _Kinds = {
    **dict.fromkeys(("NFC", "NFD"), _plain(_CANONICAL)),
    **dict.fromkeys(("NFKC", "NFKD"), _plain(_COMPATIBILITY)),
    **dict.fromkeys(("Nmt", "Strip", "StripAccents"), _plain()),
    "BertNormalizer": _plain(2 * _CANONICAL * _LOWERCASE),  # factor 2: spaces on both sides of Chinese characters
    "ByteLevel": _plain(2),
    "Lowercase": _plain(_LOWERCASE),
    "Precompiled": _precompiled,
    "Prepend": _prepend,
    "Replace": _replace,
}
_PRE_TOKENIZERS: _Kinds = {
    **dict.fromkeys(("BertPreTokenizer", "Digits", "UnicodeScripts", "Whitespace", "WhitespaceSplit"), _plain()),
    "ByteLevel": _plain(4),  # one byte becomes two, and each piece gets a space
    "CharDelimiterSplit": _with_texts("delimiter"),
    "FixedLength": _fixed_length,
    "Metaspace": _metaspace,
    "Punctuation": _with_texts("behavior"),
    "Split": _split,
}
_POST_PROCESSORS: _Kinds = {
    "BertProcessing": _two_tokens,
    "ByteLevel": _plain(),
    "RobertaProcessing": _two_tokens,
    "TemplateProcessing": _template,
}
_DECODERS: _Kinds = {
    **dict.fromkeys(("ByteFallback", "ByteLevel", "Fuse"), _plain()),
    "BPEDecoder": _with_texts("suffix"),
    "CTC": _with_texts("pad_token", "word_delimiter_token"),
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _strip_decoder,
    "WordPiece": _with_texts("prefix"),
}


def _model(part: _Part) -> tuple[int, int]:
    """Check the model, and return the number of its tokens and their largest id."""
    kind = part.text("type")
    if kind not in ("BPE", "Unigram", "WordLevel", "WordPiece"):
        part.refuse(f"is of the unknown kind {kind!r}")
    vocabulary = part.take("vocab")
    part.text("unk_token", _LONGEST_TOKEN)
    part.number("max_input_chars_per_word", 0, _LONGEST_WORD)
    part.number("unk_id", 0, LARGEST_ID)
    dropout = part.take("dropout")
    if dropout is not None and not (isinstance(dropout, float | int) and 0 <= dropout <= 1):
        part.refuse("has a dropout that is not between 0 and 1")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        part.text(name)
    part.list("merges", _LARGEST_STRUCTURE)
    part.close()
    tokens, ids = _unigram(part, vocabulary) if kind == "Unigram" else _ordered(part, vocabulary)
    if max(map(len, tokens), default=0) > _LONGEST_TOKEN:
        part.refuse(f"has a token of more than {_LONGEST_TOKEN} characters")
    return len(ids), max(ids, default=-1)


def _unigram(part: _Part, vocabulary: Any) -> tuple[Any, range]:
    if not isinstance(vocabulary, list) or not all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
        part.refuse("has a vocabulary that is not a list of pairs")
    tokens = [token for token, _ in vocabulary]
    if not all(isinstance(token, str) and token for token in tokens):  # an empty piece would match for ever
        part.refuse("has pieces that are not strings, or are empty")
    scores = {type(score) for _, score in vocabulary} <= {int, float}
    if not scores or not all(math.isfinite(score) for _, score in vocabulary):
        part.refuse("has scores that are not finite numbers")
    return tokens, range(len(tokens))


def _ordered(part: _Part, vocabulary: Any) -> tuple[Any, Any]:
    if not isinstance(vocabulary, dict) or not all(type(value) is int for value in vocabulary.values()):
        part.refuse("has a vocabulary that is not an object of ids")
    _check_ids(vocabulary.values(), len(vocabulary))
    return vocabulary, vocabulary.values()


def _check_ids(ids: Any, count: int) -> None:
    largest, smallest = max(ids, default=0), min(ids, default=0)
    if smallest < 0 or largest > LARGEST_ID:
        raise ValueError(f"the saved tokenizer has ids above {LARGEST_ID}, or below 0")
    if largest > 4 * count + _MOST_GAPS:
        raise ValueError(f"the saved tokenizer has {count} tokens and an id of {largest}")


def _check_added(tokens: list[Any], known: int, largest: int, growth: float) -> int:
    """Check the added tokens, and return the largest id of all tokens."""
    ids, characters, normalized = [largest], 0, 0
    for value in tokens:
        token = _Part(value, "an added token")
        identity, content = token.take("id"), token.text("content", _LONGEST_TOKEN)
        if not _is_id(identity):
            token.refuse("has an id that is not an integer of at least 0")
        ids.append(identity)
        characters += len(content)
        if token.take("normalized") is not False:
            normalized += len(content.encode())
        token.close()
    _check_ids(ids[1:], known + len(tokens))
    if characters > _ADDED_CHARACTERS:
        raise ValueError(f"its added tokens have {characters} characters; allowed are {_ADDED_CHARACTERS}")
    if normalized * growth > _MOST_NORMALIZED:
        raise ValueError(
            f"its added tokens could have {normalized * growth:.3g} bytes after normalization; "
            f"allowed are {_MOST_NORMALIZED}"
        )
    return int(max(ids))


def _largest_number(value: Any) -> int:
    """Return the largest integer inside a checked part."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return max(map(_largest_number, inner), default=0)
    return value if isinstance(value, int) else 0


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0
