"""Which tokenizers of files are built: all kinds of published ones, and none whose time or memory is not bounded."""

import base64
import json
import resource
import struct
import time
import unicodedata

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sgfast.huggingface.tokenizer_parts import check_backend
from sgfast.huggingface.tokenizer_state import TokenizerError, tokenizer_from_state, tokenizer_state
from tests.chat_templates import smollm2_tokenizer
from tests.tiny_tokenizer import tiny_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4, "▁": 5}
PIECES = [("<unk>", 0.0), ("▁", -1.0), ("a", -2.0), ("b", -2.5)]


def character_map(replacement: bytes, units: dict[int, int] | None = None) -> bytes:
    """SentencePiece's format with one rule, for the letter a."""
    node = 256 ^ ord("a")
    array = [0] * 768
    array[0] = 256 << 10
    array[node] = (node ^ 512) << 10 | 1 << 8 | ord("a")
    array[512] = 1 << 31
    for place, unit in (units or {}).items():
        array[place] = unit
    return struct.pack("<I", 4 * len(array)) + struct.pack(f"<{len(array)}I", *array) + replacement + b"\0"


def built(model, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def like_gpt2():
    return built(
        models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]),
        pre_tokenizer=pre_tokenizers.ByteLevel(),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(),
    )


def like_llama3(pattern=LLAMA3):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    template = processors.TemplateProcessing("a $A", "a $A a $B", special_tokens=[("a", 0)])
    return built(
        models.BPE({"a": 0, "b": 1}, [], ignore_merges=True),
        pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)]),
        post_processor=processors.Sequence([processors.ByteLevel(), template]),
        decoder=decoders.ByteLevel(),
    )


def like_gemma():
    return built(
        models.BPE(dict(WORDS), [], unk_token="[UNK]", byte_fallback=True, fuse_unk=True),
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )


def like_llama2():
    return built(
        models.BPE(dict(WORDS), [], unk_token="[UNK]", byte_fallback=True),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]),
    )


def like_t5():
    parts = [
        normalizers.Precompiled(character_map(b"ab")),
        normalizers.Strip(),
        normalizers.Replace(Regex(" {2,}"), "▁"),
    ]
    return built(
        models.Unigram(PIECES, unk_id=0),
        normalizer=normalizers.Sequence(parts),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
        decoder=decoders.Metaspace(),
    )


def like_albert():
    parts = [
        normalizers.Replace("``", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Precompiled(character_map(b"a long text")),
    ]
    return built(models.Unigram(PIECES, unk_id=0), normalizer=normalizers.Sequence(parts))


def like_bert():
    return built(
        models.WordPiece(dict(WORDS), unk_token="[UNK]"),
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        post_processor=processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        decoder=decoders.WordPiece(),
    )


def like_others():
    splits = [
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Digits(True),
        pre_tokenizers.CharDelimiterSplit("-"),
        pre_tokenizers.UnicodeScripts(),
        pre_tokenizers.FixedLength(5),
        pre_tokenizers.Whitespace(),
    ]
    return built(
        models.WordLevel(dict(WORDS), unk_token="[UNK]"),
        normalizer=normalizers.Sequence([normalizers.Nmt(), normalizers.NFC(), normalizers.ByteLevel()]),
        pre_tokenizer=pre_tokenizers.Sequence(splits),
        post_processor=processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)),
        decoder=decoders.Sequence([decoders.CTC(), decoders.BPEDecoder()]),
    )


@pytest.mark.parametrize(
    "make",
    [
        like_gpt2,
        like_llama3,
        lambda: like_llama3(GPT4O),
        lambda: like_llama3(r"(?=(\d{3})+(?!\d))"),
        like_gemma,
        like_llama2,
        like_t5,
        like_albert,
        like_bert,
        like_others,
    ],
)
def test_the_kinds_of_published_tokenizers(make):
    check_backend(make().to_str())


def test_a_real_tokenizer_and_its_round_trip():
    tokenizer = smollm2_tokenizer()
    state = tokenizer_state(tokenizer)
    before = time.process_time()
    check_backend(state["backend"])
    assert time.process_time() - before < 1
    text = "Ada's 3 fish,\n\n  étude"
    assert tokenizer_from_state(state)(text)["input_ids"] == tokenizer(text)["input_ids"]


def changed(**parts):
    """A tokenizer's state with other parts."""
    state = tokenizer_state(tiny_tokenizer())
    backend = json.loads(state["backend"])
    for name, part in parts.items():
        if name == "added_tokens":
            backend[name] += part
        elif name == "vocab":
            backend["model"] |= part
        else:
            backend[name] = part
    return state | {"backend": json.dumps(backend)}


def replace(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*parts, name="normalizers"):
    return {"type": "Sequence", name: list(parts)}


def added(content, identity=300, **options):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False) | {"normalized": True} | options
    return {"id": identity, "content": content, **flags}


def precompiled(content):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(content).decode()}


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
META = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
ONCE_IN_A_NODE = 256 ^ ord("a")


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ({"normalizer": sequence(*[replace("a", "aa")] * 23)}, "bytes of one"),
        ({"normalizer": sequence(*[replace("a", "aa")] * 40)}, "40 normalizers; allowed are 32"),
        ({"normalizer": sequence(*[sequence(*[{"type": "NFC"}] * 20)] * 2)}, "more than 32 parts"),
        ({"normalizer": replace("a", "a" * 1025)}, "content of 1025 characters"),
        ({"normalizer": replace("", "aaaaaaaaaaaaaaaa" * 64, "Regex")}, "bytes of one"),
        ({"normalizer": replace("(a+)+b", "", "Regex")}, "more than one way"),
        ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 11)}, "bytes of one"),
        ({"normalizer": sequence(*[{"type": "Prepend", "prepend": "▁"}] * 6)}, "bytes of one"),
        ({"normalizer": sequence(replace("a", "\ufdfa"), {"type": "NFKD"}, replace("ص", "\ufdfa"), {"type": "NFKC"},
                                 replace("ص", "\ufdfa"), {"type": "NFKC"})}, "bytes of one"),
        ({"normalizer": sequence(sequence(sequence(sequence(sequence(sequence({"type": "NFC"}))))))}, "nests them"),
        ({"normalizer": {"type": "Forged"}}, "unknown kind 'Forged'"),
        ({"normalizer": {"type": "Lowercase", "path": "/etc/passwd"}}, "unknown field 'path'"),
        ({"normalizer": precompiled(b"\xff\xff\xff\xff")}, "cannot hold a trie of 4294967295"),
        ({"normalizer": precompiled(b"")}, "cannot hold a trie"),
        ({"normalizer": precompiled(character_map(b"b", {512: 1 << 31 | 7}))}, "outside its replacements"),
        ({"normalizer": precompiled(character_map("é".encode(), {512: 1 << 31 | 1}))}, "into a character"),
        ({"normalizer": precompiled(character_map(b"b", {0: 1024 << 10}))}, "outside its trie"),
        ({"normalizer": precompiled(character_map(b"b", {ONCE_IN_A_NODE: (ONCE_IN_A_NODE ^ 256) << 10 | ord("a")}))},
         "rules"),
        ({"normalizer": precompiled(character_map(b"\xff"))}, "not UTF-8"),
        ({"normalizer": precompiled(character_map(b"b" * 1100))}, "bytes of one"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not base64"),
        ({"pre_tokenizer": split(r"(a|a)*b")}, "more than one way"),
        ({"pre_tokenizer": split(r"[^x]*[^x]*x")}, "passes over the text too often"),
        ({"pre_tokenizer": split(r"(?:(?:a{999}){999}){999}")}, "once its counts are written out"),
        ({"pre_tokenizer": split(r"(a)\1")}, "escape that is not allowed"),
        ({"pre_tokenizer": sequence(*[BYTE_LEVEL] * 6, name="pretokenizers")}, "bytes of one"),
        ({"pre_tokenizer": sequence(*[META] * 6, name="pretokenizers")}, "bytes of one"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length that is not between 1"),
        ({"decoder": sequence(*[replace("a", "aa")] * 12, name="decoders")}, "decoder that can make more"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 33,
                             "pair": [], "special_tokens": {}}}, "33 single"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 99999], "cls": ["b", 1]}}, "ids above the largest"),
        ({"added_tokens": [added("a" * 1025)]}, "content of 1025 characters"),
        ({"added_tokens": [added(f"<{i}>", 300 + i) for i in range(2**14)]}, "added_tokens; allowed are 16384"),
        ({"added_tokens": [added("a" * 1000 + str(i), 300 + i) for i in range(1100)]}, "allowed are 1048576"),
        ({"normalizer": replace("a", "a" * 250), "added_tokens": [added("a" * 1000 + str(i), 300 + i)
                                                                    for i in range(80)]}, "bytes after normalization"),
        ({"added_tokens": [added("<x>", 2**30)]}, "has ids above"),
        ({"added_tokens": [added("<x>", 100_000)]}, "an id of 100000"),
        ({"truncation": {"max_length": 5}}, "truncation must be null"),
        ({"padding": {"strategy": {"Fixed": 10**9}}}, "padding must be null"),
        ({"model": {"type": "WordPiece", "vocab": WORDS, "max_input_chars_per_word": 10**9}}, "max_input_chars"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0]]}}, "or are empty"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", "0"]]}}, "not finite numbers"),
        ({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, "not an object of ids"),
        ({"model": {"type": "BPE", "vocab": {"a" * 1025: 0}, "merges": []}}, "token of more than 1024"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}, "cannot be read"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 7}}, "dropout"),
        ({"model": []}, "its model must be an object"),
        ({"sidecar": "x"}, "unknown field 'sidecar'"),
    ],
)  # fmt: skip
def test_parts_without_a_bound_are_refused_at_once(parts, fault):
    state = changed(**parts)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=fault):
        tokenizer_from_state(state)
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # kilobytes


def test_the_growth_of_unicodes_forms():
    def growth(form):
        return max(
            len(form(c).encode()) / len(c.encode()) for c in map(chr, range(0x110000)) if not "\ud800" <= c <= "\udfff"
        )

    assert (
        growth(lambda c: unicodedata.normalize("NFKD", c)) == growth(lambda c: unicodedata.normalize("NFKC", c)) == 11
    )
    assert growth(lambda c: unicodedata.normalize("NFD", c)) == growth(lambda c: unicodedata.normalize("NFC", c)) == 3
    assert growth(str.lower) == 1.5


def test_growth_below_the_bound_is_built_and_stays_there():
    state = changed(normalizer=sequence(*[replace("a", "aa")] * 8), added_tokens=[added("a" * 100, 300)])
    tokenizer = tokenizer_from_state(state)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("a") == "a" * 256


def test_special_tokens_are_counted():
    state = tokenizer_state(tiny_tokenizer())
    with pytest.raises(ValueError, match="30000 other special tokens; allowed are 64 and 4096"):
        tokenizer_from_state(state | {"other_special_tokens": [f"<{i}>" for i in range(30_000)]})
    with pytest.raises(ValueError, match="a special token of more than 1024 characters"):
        tokenizer_from_state(state | {"other_special_tokens": ["a" * 1025]})
    with pytest.raises(ValueError, match="chat template has more than 131072 characters"):
        tokenizer_from_state(state | {"chat_template": "a" * (2**17 + 1)})


def test_what_could_not_be_read_is_not_written():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")
    with pytest.raises(ValueError, match="cannot be read: its pre_tokenizer Split's pattern repeats something"):
        tokenizer_state(tokenizer)


def test_a_failure_at_call_is_the_tokenizers_own():
    from sgfast.huggingface import TokenizerWrapper

    state = changed(
        model={
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "[UNK]",
            "max_input_chars_per_word": 9,
            "continuing_subword_prefix": "##",
        },
        added_tokens=[],
    )
    wrapper = TokenizerWrapper(tokenizer_from_state(state), "LlamaForCausalLM")
    with pytest.raises(TokenizerError, match="the tokenizer failed: WordPiece error: Missing"):
        wrapper([{"role": "user", "content": "étude"}])
    with pytest.raises(TokenizerError, match="the tokenizer failed: "):
        wrapper.encode_text("étude")
