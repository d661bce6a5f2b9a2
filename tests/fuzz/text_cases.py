"""Settings in YAML, and records in JSONL."""

import random
from pathlib import Path

_YAML = Path(__file__).parents[2] / "docs" / "train.yaml"
_NAMES = ["data", "out", "model", "text_unit", "text_as", "loss", "noise_layer", "lora", "steps", "batch_size", "seed"]
_NAMES += [
    "accumulation",
    "max_length",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "max_gradient_norm",
    "precision",
]
_NAMES += ["save_steps", "ignore_prompt_loss", "unknown", "<<", "", "1", "~", "!!binary aGk=", "? [a]", "steps"]
_INNER = ["name", "alpha", "scale", "mean_num_hidden_layers", "std_num_hidden_layers", "mean_num_attention_heads", "r"]
_INNER += [
    "percent_to_mask",
    "value_range",
    "shallow",
    "mean_dropout",
    "directly_learn_stds",
    "rhos_init",
    "lora_alpha",
]
_INNER += ["target_modules", "lora_dropout", "distillation_layer_index", "seed", "std_num_attention_heads"]
_VALUES = [
    "1",
    "-1",
    "0",
    "9" * 400,
    "9" * 5000,
    "0x" + "f" * 3000,
    ".nan",
    ".inf",
    "-.inf",
    "1e-3",
    "1e999",
    "true",
    "null",
]
_VALUES += [
    "[a]",
    "[[1]]",
    "{a: 1}",
    "{}",
    "[]",
    "2001-01-01",
    "2001-99-99",
    "1:2:3",
    "&a [*a]",
    "*b",
    "'x'",
    '"\\ud800"',
]
_VALUES += ['"a\\0b"', "!!python/object/apply:os.system [true]", "!!set {a}", "!!omap [a: 1]", "|", "jigsaw", "cloak"]
_VALUES += [
    "distillation",
    "bfloat16",
    "line",
    "100000000",
    "[1, 0]",
    "[0.1, 1.0]",
    "'12'",
    "'(a+)+b'",
    "all-linear",
    "0.5",
]
_VALUES += [
    "[" * 50,
    "{a: " * 50,
    "!!timestamp x",
    "!!int x",
    "!!float .",
    "\t",
    "'" + "y" * 3000 + "'",
    "[1.0, .nan]",
    "2",
]
_TEMPLATES = [
    "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)),
    "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n  k{i}: 1\n" for i in range(1, 25)),
]


def settings(generator: random.Random) -> bytes:
    """Settings put together from odd pieces, or the documented example with changes."""
    if generator.random() < 0.05:
        return generator.choice(_TEMPLATES).encode()
    if generator.random() < 0.5:
        text = _YAML.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        for _ in range(generator.choice([0, 1, 1, 2, 4])):
            place = generator.randrange(len(lines))
            name = lines[place].split(":")[0]
            lines[place : place + generator.choice([0, 1])] = [f"{name}: {generator.choice(_VALUES)}"]
    else:
        lines = []
        for name in generator.sample(_NAMES, generator.randrange(1, 6)):
            if name in ("loss", "noise_layer", "lora") and generator.random() < 0.8:
                inner = generator.sample(_INNER, generator.randrange(1, 4))
                lines += [f"{name}:", *(f"  {one}: {generator.choice(_VALUES)}" for one in inner)]
            else:
                lines.append(f"{name}: {generator.choice(_VALUES)}")
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    return _with_bytes_changed(content, generator, 0.1)


_LINES = [
    '{"text": "the keyword of the function"}',
    '{"text": "class", "id": "a"}',
    '{"messages": [{"role": "user", "content": "the module"}, {"role": "assistant", "content": "yes"}]}',
    '{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "\\u00e9 <|end|>"}]}',
]
_ODD_LINES = [
    "",
    "null",
    "[]",
    '"text"',
    "{}",
    "NaN",
    '{"text": NaN}',
    '{"text": "a", "score": NaN}',
    '{"text": "\\ud800"}',
    '{"text": "a", "text": "b"}',
    '{"text": "a", "messages": []}',
    '{"text": ["a"]}',
    '{"text": " "}',
    '{"text": "a", "id": ' + "9" * 5000 + "}",
    '{"text": "a", "id": ' + "9" * 400 + "}",
    '{"text": "a", "id": 1e400}',
    '{"text": "a", "id": true}',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "user", "content": "a", "tool": 1}]}',
    '{"messages": [[]]}',
    '{"messages": {"role": "user"}}',
    '{"messages": [{"role": ["user"], "content": "a"}]}',
    '{"messages": [{"role": "tool", "content": "a"}]}',
    '{"messages": [{"role": "assistant", "content": "a"}]}',
    "[" * 100_000,
    '{"a":' * 10_000,
    '{"text": "a", "x": ' + "[[]," * 300_000 + "1]}",
    '{"text": "' + "the keyword " * 1000 + '"}',
    "{" + ",".join(f'"{i}":0' for i in range(200_000)) + "}",
    "\ufeff" + _LINES[0],
    "\0",
    '{"text": "\0"}',
    '{"text": "\\u0000"}',
    _LINES[0] + _LINES[0],
]


def records(generator: random.Random) -> bytes:
    """Lines of JSON, good and odd, with line ends and bytes of all kinds."""
    count = generator.choice([0, 1, 2, 6])
    lines = [generator.choice(_LINES) for _ in range(count)]
    for _ in range(generator.choice([0, 1, 1, 2])):
        lines.insert(generator.randrange(len(lines) + 1), generator.choice(_ODD_LINES))
    end = generator.choice(["\n", "\n", "\n", "\r\n", "\r", "\n\n"])
    content = bytearray(end.join(lines).encode("utf-8", "surrogatepass"))
    if generator.random() < 0.1:
        content[:0] = generator.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b"])
    return _with_bytes_changed(content, generator, 0.15)


def _with_bytes_changed(content: bytearray, generator: random.Random, likely: float) -> bytes:
    if content and generator.random() < likely:
        for _ in range(generator.choice([1, 1, 3, 10])):
            content[generator.randrange(len(content))] = generator.randrange(256)
    return bytes(content)
