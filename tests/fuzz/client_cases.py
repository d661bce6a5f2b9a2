"""Client files: mutated text under a right checksum, and forged parts."""

import base64
import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from sgfast.client import StainedGlassTransformForText, file_format
from sgfast.client.file_format import read_client_file
from tests.client.forged_client import forge

CHAT = [{"role": "system", "content": "étude"}, {"role": "user", "content": "the keyword? 12  \n of ① {x} <|end|>"}]
VALUES = ["null", "-1", "1e999", "[]", "{}", '""', "true", "9" * 30, "0", '"../../x"', "1e-320", '"\\ud800"', "[[[]]]"]
ODD: list[Any] = [
    None,
    -1,
    0,
    1,
    2,
    2**31,
    2**63,
    2**70,
    1.5,
    -0.0,
    1e308,
    "",
    "a",
    "\0",
    "a" * 2000,
    "ﷺ",
    [],
    {},
    True,
]
ODD += [[1], ["a"], {"a": 1}, {"type": "x"}, "../../etc/passwd", "os.system", [[[[]]]], "\U0010ffff"]


def mutated(good: Path, path: Path, generator: random.Random) -> None:
    """Change bytes of the file, or of the description inside it; usually with the checksum made right again."""
    kind = generator.random()
    if kind < 0.15:  # anywhere, the checksum not made right
        content = bytearray(good.read_bytes())
        for _ in range(generator.choice([1, 1, 2, 20])):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content[: generator.choice([len(content)] * 3 + [generator.randrange(len(content))])])
        return
    if kind < 0.35:  # in the header
        shutil.copyfile(good, path)
        content = bytearray(path.read_bytes())
        end = 8 + int.from_bytes(content[:8], "little")
        for _ in range(generator.choice([1, 1, 2, 5])):
            content[generator.randrange(8, end)] = generator.choice(b'0159"{}[],:truefals\\ \xff\x00')
        path.write_bytes(content)
    else:
        tensors, description = read_client_file(good)
        text = list(json.dumps(description))
        for _ in range(generator.choice([1, 1, 1, 2, 4])):
            _change(text, generator)
        metadata = {"format": file_format.FORMAT, "format_version": "1", "sha256": "0" * 64}
        save_file(tensors, path, metadata={**metadata, "content": "".join(text)})
    with contextlib.suppress(ValueError):  # the field itself was changed
        file_format._write_checksum(path)


def _change(text: list[str], generator: random.Random) -> None:
    start = generator.randrange(len(text) - 1)
    joined = "".join(text)
    end = joined.find(",", start)
    before = joined.rfind(":", 0, start) + 1
    choice = generator.random()
    if choice < 0.4:
        text[start] = generator.choice('0159"{}[],:truefals\\ ')
    elif choice < 0.8 and end > before:
        text[before:end] = generator.choice(VALUES)
    elif choice < 0.9:
        del text[start : start + generator.randrange(1, 30)]
    else:
        text[start:start] = text[before : before + generator.randrange(1, 60)]


def forged(good: Path, path: Path, generator: random.Random) -> None:
    """One to three hostile parts: of a list, or a value anywhere in the description replaced by an odd one."""

    def edit(tensors: dict[str, Any], description: dict[str, Any]) -> None:
        for _ in range(generator.choice([1, 1, 2, 3])):
            generator.choice(_EDITS)(tensors, description, generator)

    try:
        forge(good, path, edit)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):  # not a file that can be written
        shutil.copyfile(good, path)


def load_and_call(path: Path) -> str:
    """What a client does with a file; returns what became of it."""
    try:
        client = StainedGlassTransformForText.from_pretrained(path)
    except ValueError as error:
        _check(error, path)
        return "refused at loading"
    try:
        output = client.encode(CHAT, seed=1)["inputs_embeds"]
    except ValueError as error:
        if "no chat template" not in str(error):
            _check(error, path)
        return "refused at a call"
    return "used" if bool(output.isfinite().all()) else "used, not finite"


def _check(error: ValueError, path: Path) -> None:
    if str(path) not in str(error) or len(str(error)) > 1500:
        raise AssertionError(f"the error does not name the file: {str(error)[:300]}") from error


def _anywhere(_: Any, description: dict[str, Any], generator: random.Random) -> None:
    """Replace, remove, double or nest any value."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [description]
    while waiting:
        one = waiting.pop()
        entries = list(one.items() if isinstance(one, dict) else enumerate(one))
        if len(entries) > 40:
            entries = generator.sample(entries, 3)
        for key, value in entries:
            places.append((one, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    holder, key = generator.choice(places)
    choice = generator.random()
    if choice < 0.6:
        holder[key] = generator.choice(ODD)
    elif choice < 0.75:
        del holder[key]
    elif choice < 0.85:
        holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        holder[str(generator.choice(ODD))] = holder[key]


def _tokenizer(description: dict[str, Any]) -> dict[str, Any]:
    return description["tokenizer_wrapper"]["tokenizer"]


def _part(name: str) -> Callable[..., None]:
    def edit(_: Any, description: dict[str, Any], generator: random.Random) -> None:
        part = _PARTS[name](generator)
        if generator.random() < 0.4:
            inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[name]
            parts = [_PARTS[name](generator) for _ in range(generator.choice([1, 2, 5, 23, 40]))]
            part = {"type": "Sequence", inner: parts if generator.random() < 0.5 else [part] * len(parts)}
        _tokenizer(description)["backend"][name] = part

    return edit


def _replace(generator: random.Random) -> dict[str, Any]:
    pattern = {generator.choice(["String", "Regex"]): generator.choice(_PATTERNS)}
    return {"type": "Replace", "pattern": pattern, "content": generator.choice(["", "aa", "ﷺ", "a" * 900, "x", "\0"])}


def _character_map(generator: random.Random) -> dict[str, Any]:
    size = generator.choice([0, 4, 256, 1024, 5000])
    content = bytearray(generator.randbytes(size))
    if generator.random() < 0.7 and size >= 8:
        length = generator.choice([size - 4, size // 2 // 4 * 4, 2**32 - 1, 0, 3])
        content[:4] = length.to_bytes(4, "little")
        for place in range(4, size):
            if generator.random() < 0.9:
                content[place] = 0
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


def _split(generator: random.Random) -> dict[str, Any]:
    pattern = {generator.choice(["String", "Regex"]): generator.choice(_PATTERNS)}
    behavior = generator.choice(["Isolated", "Removed", "MergedWithNext", "Contiguous", "Odd"])
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": generator.random() < 0.5}


def _flagged(kind: str) -> dict[str, Any]:
    return {"type": kind, **dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), True)}


_PATTERNS = ["a", "", "(a+)+b", ".", ".*", "(?=a)", r"\s+", "[^x]*x", "(a|b)", r"\p{L}+|.", "(((", "a{3}", "(?i)A", "$"]
_PATTERNS += [r"(\d{3})+(?!\d)", "a?b?c?", r"\b", "^", "[", "|", "a||b", "(?:)", "\\", "{", "a{2,3}?", "[a-\\d]", "\0"]
_PARTS: dict[str, Callable[[random.Random], Any]] = {
    "normalizer": lambda g: g.choice(
        [
            _replace(g),
            _character_map(g),
            *({"type": kind} for kind in ("NFC", "NFKD", "Lowercase", "Nmt", "StripAccents", "ByteLevel", "Odd")),
            {"type": "Strip", "strip_left": True, "strip_right": g.choice(ODD)},
            {"type": "Prepend", "prepend": g.choice(["", "▁", "a" * 64])},
            dict.fromkeys(("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), True)
            | {"type": "BertNormalizer"},
        ]
    ),
    "pre_tokenizer": lambda g: g.choice(
        [
            _split(g),
            _flagged("ByteLevel"),
            *({"type": kind} for kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")),
            {"type": "Metaspace", "replacement": g.choice(["▁", "", "ab"]), "prepend_scheme": "always", "split": True},
            {"type": "FixedLength", "length": g.choice([0, 1, 5, 2**40])},
            {"type": "CharDelimiterSplit", "delimiter": g.choice(["a", "", "ab"])},
            {"type": "Digits", "individual_digits": True},
            {"type": "Punctuation", "behavior": "Isolated"},
        ]
    ),
    "decoder": lambda g: g.choice(
        [_replace(g), {"type": "Fuse"}, {"type": "WordPiece", "prefix": "#", "cleanup": True}]
    ),
}
_TEMPLATES = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ messages[0].content.__class__ }}",
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
    "",
    " ",
    "{{ messages }}",
    "{% include 'x' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ '\ud800' }}",
    "{% for m in messages %}{{ m.content * 1000 }}{% endfor %}",
    "{{ 1 // 0 }}",
]


def _template(_: Any, description: dict[str, Any], generator: random.Random) -> None:
    template = generator.choice(_TEMPLATES + [_tokenizer(description)["chat_template"] or ""] * 3)
    if generator.random() < 0.4 and template:
        place = generator.randrange(len(template))
        piece = generator.choice(["{%", "}}", "{{", "|", "(", "'", "~", "%}", "messages", " * 9", "[0]", ".x"])
        template = template[:place] + piece + template[place + generator.choice([0, 1, 5]) :]
    _tokenizer(description)["chat_template"] = template


def _added(_: Any, description: dict[str, Any], generator: random.Random) -> None:
    count = generator.choice([1, 10, 1000, 20_000])
    flags = {name: generator.random() < 0.5 for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    start = generator.choice([0, 290, 295, 296, 10_000, 2**30])
    text = generator.choice(["<{}>", "a{}", " ", "", "ﷺ{}", "a" * 500 + "{}"])
    backend = _tokenizer(description)["backend"]
    backend["added_tokens"] = [{"id": start + i, "content": text.format(i), **flags} for i in range(count)]


def _special(_: Any, description: dict[str, Any], generator: random.Random) -> None:
    count = generator.choice([1, 100, 4096, 30_000])
    _tokenizer(description)["other_special_tokens"] = [
        generator.choice(["<{}>", "a{}", ""]).format(i) for i in range(count)
    ]


def _model(_: Any, description: dict[str, Any], generator: random.Random) -> None:
    words = {"a": 0, "b": 1, "[UNK]": 2, "the": generator.choice([3, 3, 2, 299, 2**25, -1])}
    pieces = [["a", -1.0], ["<unk>", 0], [generator.choice(["b", "", "a" * 900]), generator.choice([-2.0, 5, "x"])]]
    _tokenizer(description)["backend"]["model"] = generator.choice(
        [
            {"type": "WordLevel", "vocab": words, "unk_token": generator.choice(["[UNK]", "no", None])},
            {"type": "WordPiece", "vocab": words, "unk_token": generator.choice(["[UNK]", "no"]),
             "continuing_subword_prefix": generator.choice(["##", "", "é"]),
             "max_input_chars_per_word": generator.choice([0, 100, 2**40])},
            {"type": "Unigram", "vocab": pieces, "unk_id": generator.choice([0, 1, None, 99]),
             "byte_fallback": generator.random() < 0.5},
            {"type": "BPE", "vocab": words, "merges": generator.choice([[], [["a", "b"]], ["a b"], [["a"]], [1]]),
             "continuing_subword_prefix": generator.choice([None, "é", "##"]),
             "dropout": generator.choice([None, 0.5, 7]),
             "unk_token": generator.choice([None, "[UNK]", "no"]), "byte_fallback": generator.random() < 0.5},
        ]
    )  # fmt: skip


def _layer(_: Any, description: dict[str, Any], generator: random.Random) -> None:
    layer = description["noise_layer"]
    holder = layer["config"] if generator.random() < 0.6 else layer
    holder[generator.choice(sorted(holder))] = generator.choice(ODD)


def _tensor(tensors: dict[str, Any], _: Any, generator: random.Random) -> None:
    name = generator.choice(sorted(tensors))
    choice = generator.random()
    if choice < 0.3:
        del tensors[name]
    elif choice < 0.6:
        tensors[name] = tensors[name][..., :1].contiguous()
    elif choice < 0.8:
        tensors[name] = tensors[name] * float("nan")
    else:
        tensors[str(generator.choice(ODD))] = tensors[name]


_EDITS: list[Callable[..., None]] = [
    _anywhere,
    _anywhere,
    _anywhere,
    _layer,
    _layer,
    _tensor,
    _template,
    _added,
    _special,
]
_EDITS += [_model, *map(_part, ("normalizer", "normalizer", "pre_tokenizer", "pre_tokenizer", "decoder"))]
