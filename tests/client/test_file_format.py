"""The client's file against damage, truncation and forgery: always a ValueError that names it, in bounded memory."""

import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sgfast.client import StainedGlassTransformForText, file_format
from sgfast.client.file_format import read_client_file, write_client_file
from sgfast.huggingface import TokenizerWrapper
from sgfast.model import NoiseMaskedNoisyTransformerModel
from sgfast.noise_layer import TransformerCloak
from tests.tiny_models import tiny_causal_lm
from tests.tiny_tokenizer import tiny_tokenizer

CHAT = [{"role": "user", "content": "what is the keyword?"}]
EMBEDDING = "model.embed_tokens.weight"
DATA = b"\0" * 8
ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    tokenizer = tiny_tokenizer()
    base_model, body, target_layer = tiny_causal_lm("llama", vocab_size=300)
    model = NoiseMaskedNoisyTransformerModel(
        TransformerCloak, base_model, None, target_layer, config_path=base_model.config, transformer_type=body
    )
    client = StainedGlassTransformForText(model, TokenizerWrapper(tokenizer, "LlamaForCausalLM"), [EMBEDDING])
    path = tmp_path_factory.mktemp("good") / "transform.safetensors"
    client.save_pretrained(path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "transform.safetensors"


def refused(path, fault=None):
    with pytest.raises(ValueError, match=fault) as caught:
        StainedGlassTransformForText.from_pretrained(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def write_raw(path, header, data=DATA, length=None):
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def header_of(tensors=f'"noise_layer.a":{ENTRY}', content="{}", **metadata):
    fields = {"format": file_format.FORMAT, "format_version": "1", "content": content, "sha256": "0" * 64} | metadata
    return f'{{"__metadata__":{json.dumps(fields, separators=(",", ":"))}{"," if tensors else ""}{tensors}}}'


def sealed(path, header, data=DATA):
    """A forged file with its right checksum."""
    write_raw(path, header, data)
    file_format._write_checksum(path)


def test_every_damaged_byte_and_every_truncation_is_refused(good, path):
    whole = good.read_bytes()
    generator = random.Random(7)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(12), *generator.choices(range(header_end), k=150), *generator.choices(range(len(whole)), k=60)]
    # The padding at the header's end, which any white space could replace, and the last byte.
    places += [header_end - 1, header_end, len(whole) - 1]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= generator.randrange(1, 256)
        path.write_bytes(damaged)
        refused(path)
    for _ in range(30):  # several bytes at once
        damaged = bytearray(whole)
        for _ in range(generator.randrange(2, 50)):
            damaged[generator.randrange(header_end)] = generator.randrange(256)
        path.write_bytes(damaged)
        refused(path)
    for kept in [0, 1, 7, 8, 9, header_end, len(whole) - 1, *generator.choices(range(len(whole)), k=40)]:
        path.write_bytes(whole[:kept])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path, "needs? .* bytes, it has")
    path.write_bytes(whole)
    assert torch.equal(
        StainedGlassTransformForText.from_pretrained(path)(CHAT, seed=1),
        StainedGlassTransformForText.from_pretrained(good)(CHAT, seed=1),
    )


def test_a_description_damaged_under_a_right_checksum_never_raises_anything_else(good, path):
    tensors, description = read_client_file(good)
    text = json.dumps(description)
    generator = random.Random(11)
    values = ["null", "-1", "1e999", "[]", "{}", '""', "true", "99999999999999999999", "0", '"../../x"']
    for _ in range(80):
        start = generator.randrange(len(text) - 1)
        changed = list(text)
        if generator.random() < 0.5:
            changed[start] = generator.choice('0159"{}[],:truefals\\ ')
        else:
            end = text.find(",", start)
            changed[text.rfind(":", 0, start) + 1 : end if end > 0 else len(text)] = generator.choice(values)
        metadata = {"format": file_format.FORMAT, "format_version": "1", "sha256": "0" * 64}
        save_file(tensors, path, metadata={**metadata, "content": "".join(changed)})
        file_format._write_checksum(path)
        try:
            StainedGlassTransformForText.from_pretrained(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 - a change may do no harm


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        (header_of(f'"noise_layer.a":{ENTRY},"noise_layer.a":{ENTRY}'), "key 'noise_layer.a' occurs twice"),
        (header_of(f'"__metadata__":{{}},"noise_layer.a":{ENTRY}'), "key '__metadata__' occurs twice"),
        (header_of(f'"a":{ENTRY[:-1]},"shape":[2]}}'), "key 'shape' occurs twice"),
        (header_of(path="../../etc/passwd"), "its metadata must be format, format_version, content, sha256"),
        (header_of(format="pt"), "is not a text transform of sgfast"),
        (header_of(format_version="2"), "its format version is '2', this sgfast reads '1'"),
        (header_of(sha256="x" * 64), "its checksum cannot be read"),
        (header_of(sha256="f" * 64), "its checksum does not match"),
        (header_of('"a":[]'), "must have data_offsets, dtype and shape"),
        (header_of(f'"a":{ENTRY.replace("F32", "I64")}'), "must be of dtype F64, F32, F16, BF16; got 'I64'"),
        (header_of(f'"a":{ENTRY.replace("[2]", "[4611686018427387904,4611686018427387904]")}'), "does not fill its 8"),
        (header_of(f'"a":{ENTRY.replace("[2]", "[0,4611686018427387904]")}'), "has no valid shape"),
        (header_of(f'"a":{ENTRY.replace("[2]", "[-1,-2]")}'), "has no valid shape"),
        (header_of(f'"a":{ENTRY.replace("[2]", "[true,2]")}'), "has no valid shape"),
        (header_of(f'"a":{ENTRY.replace("[2]", "[" + "1," * 9 + "2]")}'), "has no valid shape"),
        (header_of(f'"a":{ENTRY.replace("[0,8]", "[8,0]")}'), "does not fill its -8 bytes"),
        (header_of(f'"a":{ENTRY.replace("[0,8]", "[0.0,8]")}'), "has no valid data_offsets"),
        (header_of(f'"a":{ENTRY.replace("[0,8]", "[8,16]")}'), "does not begin where"),
        (header_of(f'"a":{ENTRY},"b":{ENTRY}'), "does not begin where"),
        (
            header_of('"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}'),
            "its tensors need 4398046511104 bytes, it has 8",
        ),
        (header_of(""), "its tensors need 0 bytes, it has 8"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a":' + "[" * 900_000, "not a safetensors file"),
        ("{" + "[]," * 10_000_000 + "}", "30000002 characters of JSON outside strings"),
        ('{"a":NaN}', "NaN is not JSON"),
        ("[]", "its header is no JSON object"),
        ('{"__metadata__":[]}', "its metadata are no strings"),
        ('{"__metadata__":{"format":1}}', "its metadata are no strings"),
        (b'{"\xff":1}', "not a safetensors file"),
        ("", "not a safetensors file"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) and " " in value else "",
)
def test_forged_headers(path, header, fault):
    write_raw(path, header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, fault)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # kilobytes


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100_000_001, 500])
def test_declared_header_lengths(path, length):
    write_raw(path, header_of(), length=length)
    refused(path, f"cannot hold a header of {length}|not a safetensors file")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[]", "its description is of type list"),
        ("{", "its description is no JSON that is allowed here"),
        ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
        ('{"noise_layer":{},"noise_layer":{}}', "key 'noise_layer' occurs twice"),
        ("{}", "its description must have noise_layer, tokenizer_wrapper, embedding_name, embedding_scale"),
    ],
)
def test_forged_descriptions(path, content, fault):
    sealed(path, header_of(content=content))
    refused(path, fault)


def test_pickles_are_named_and_not_loaded(path, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weight": torch.ones(2)}, path)
    refused(path, "holds pickled data, which is never loaded")
    path.write_bytes(pickle.dumps(Payload()))
    refused(path, "holds pickled data, which is never loaded")
    assert not (tmp_path / "executed").exists()


def test_pipes_and_devices_are_refused_without_waiting(path):
    os.mkfifo(path)
    refused(path, "is no regular file")
    refused("/dev/zero", "is no regular file")


def test_a_link_to_a_good_file_loads(good, path):
    path.symlink_to(good)
    assert StainedGlassTransformForText.from_pretrained(path).embedding_name == EMBEDDING


class TestPartsThatDoNotFit:
    """Right checksums, wrong parts."""

    @pytest.fixture
    def forge(self, good, path):
        tensors, description = read_client_file(good)
        description["tokenizer_wrapper"] = json.loads(description["tokenizer_wrapper"])

        def change(edit, fault):
            edit(tensors, description)
            description["tokenizer_wrapper"] = json.dumps(description["tokenizer_wrapper"])
            write_client_file(path, tensors, description)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            refused(path, fault)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18

        return change

    @pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "num_attention_heads", "head_dim"])
    def test_sizes_that_the_tensors_do_not_have(self, forge, name):
        forge(lambda _, d: d["noise_layer"]["config"].update({name: 2**20}), "cannot be used: ")

    @pytest.mark.parametrize("name", ["num_hidden_layers", "num_labels"])
    def test_counts_of_a_configuration(self, forge, name):
        forge(lambda _, d: d["noise_layer"]["config"].update({name: 2**40}), f"{name} must be an integer of at most")

    def test_numbers_of_layers(self, forge):
        forge(lambda _, d: d["noise_layer"].update(mean_num_hidden_layers=2**30), "mean_num_hidden_layers must be")

    def test_a_missing_tensor(self, forge):
        name = "noise_layer.mean_estimator.head.bias"
        forge(lambda t, _: t.pop(name), "not those of its noise layer: mean_estimator.head.bias")

    def test_a_wrong_shape(self, forge):
        name = "noise_layer.std_estimator.head.bias"
        forge(lambda t, _: t.update({name: torch.ones(3)}), "not those of its noise layer: std_estimator.head.bias")

    def test_a_tensor_of_neither_part(self, forge):
        forge(lambda t, _: t.update({"../lm_head": torch.ones(3)}), "of neither the noise layer nor the base model")

    def test_an_embedding_of_another_width(self, forge):
        forge(
            lambda t, _: t.update({f"base_model.{EMBEDDING}": torch.ones(300, 3)}),
            r"must be \(V, 16\) as the noise layer is; got \(300, 3\)",
        )

    def test_an_embedding_of_fewer_tokens(self, forge):
        forge(
            lambda t, _: t.update({f"base_model.{EMBEDDING}": torch.ones(5, 16)}),
            "the tokenizer has ids up to 294, the embedding table only 5 rows",
        )

    def test_no_embedding(self, forge):
        forge(lambda _, d: d.update(embedding_name="model.other"), "its embedding table is missing")

    @pytest.mark.parametrize("scale", [0.0, -1.0, 1, "1"])
    def test_the_embeddings_scale(self, forge, scale):
        forge(lambda _, d: d.update(embedding_scale=scale), "embedding_scale must be")

    def test_a_body_that_is_not_on_the_list(self, forge):
        forge(lambda _, d: d["noise_layer"].update(transformer_type="os.system"), "transformer type must be one of")

    def test_an_attention_from_a_repository(self, forge):
        forge(lambda _, d: d["noise_layer"].update(attention="someone/kernel"), "attention must be eager or sdpa")

    @pytest.mark.parametrize("name", ["vocab_file", "tokenizer_file", "../../token", "chat_template"])
    def test_special_tokens_that_would_be_files(self, forge, name):
        forge(
            lambda _, d: d["tokenizer_wrapper"]["tokenizer"]["named_special_tokens"].update({name: "/etc/passwd"}),
            "has an invalid special token",
        )

    def test_ids_that_memory_would_be_taken_by(self, forge):
        def edit(_, description):
            state = description["tokenizer_wrapper"]["tokenizer"]
            backend = json.loads(state["backend"])
            backend["model"]["vocab"]["a"] = 2**31
            state["backend"] = json.dumps(backend)

        forge(edit, "has ids above 16777216")

    @pytest.mark.parametrize("backend", ["{}", "[" * 10_000, '{"version":"1.0","model":{"type":"BPE"}}', "../../x"])
    def test_tokenizers_that_are_none(self, forge, backend):
        forge(lambda _, d: d["tokenizer_wrapper"]["tokenizer"].update(backend=backend), "tokenizer cannot be read")


def test_nothing_that_a_file_names_is_opened(good, path):
    """Paths wherever a configuration or tokenizer of transformers might take one."""
    tensors, description = read_client_file(good)
    secret = path.parent / "secret"
    secret.write_text("{}")
    link = path.parent / "tokenizer.json"
    link.symlink_to(secret)
    paths = {"_name_or_path": str(path.parent), "name_or_path": "../..", "auto_map": {"AutoConfig": str(secret)}}
    description["noise_layer"]["config"].update(paths, tokenizer_class=str(link), quantization_config=None)
    wrapper = json.loads(description["tokenizer_wrapper"])
    wrapper["tokenizer"]["named_special_tokens"]["extra_token"] = str(secret)
    wrapper["model_type"] = str(link)
    wrapper["tokenizer"]["tokenizer_file"] = str(link)
    description["tokenizer_wrapper"] = json.dumps(wrapper)
    write_client_file(path, tensors, description)
    opened, watching = [], True

    def watch(event, arguments):
        if watching and event in ("open", "import", "os.listdir", "socket.connect"):
            opened.append((event, str(arguments[0])))

    sys.addaudithook(watch)
    try:
        StainedGlassTransformForText.from_pretrained(path)
    finally:
        watching = False
    assert ("open", str(path)) in opened
    others = [name for event, name in opened if name.startswith(str(path.parent)) and name != str(path)]
    assert others == []
    assert not any(event == "socket.connect" for event, _ in opened)


def test_the_old_file_survives_a_kill_in_the_middle(good, path):
    old = good.read_bytes()
    path.write_bytes(old)
    code = (
        "import os, signal, sys\n"
        "from sgfast.utils.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(b'half of a new f')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_bytes() == old
    assert len(list(path.parent.iterdir())) == 2  # what was written lies beside it, under another name
    StainedGlassTransformForText.from_pretrained(path)


def test_the_new_content_is_on_the_disk_before_it_gets_the_name(good, path, monkeypatch):
    steps = []
    synchronize, replace = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("fsync"), synchronize(descriptor)))
    monkeypatch.setattr(type(path), "replace", lambda *paths: (steps.append("replace"), replace(*paths)))
    StainedGlassTransformForText.from_pretrained(good).save_pretrained(path)
    assert steps == ["fsync", "replace", "fsync"]
    assert path.stat().st_size == good.stat().st_size


@pytest.mark.parametrize(("mask", "permissions"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_are_the_usual_ones(good, path, mask, permissions):
    before = os.umask(mask)
    try:
        StainedGlassTransformForText.from_pretrained(good).save_pretrained(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == permissions


def test_other_readers_of_safetensors_can_read_it(good):
    with safe_open(good, framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert sorted(metadata) == ["content", "format", "format_version", "sha256"]
    assert f"base_model.{EMBEDDING}" in names


def test_descriptions_that_json_cannot_hold_are_not_written(path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_client_file(path, {"a": torch.ones(1)}, {"value": float("nan")})
    assert not path.exists()


def test_descriptions_larger_than_the_format_allows_are_not_written(path, monkeypatch):
    monkeypatch.setattr(file_format, "_LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match=r"tokenizer and configuration take .* bytes; the format allows 1000"):
        write_client_file(path, {"a": torch.ones(1)}, {"value": "a" * 1000})
    assert not path.exists()
