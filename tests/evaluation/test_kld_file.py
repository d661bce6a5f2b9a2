"""llama.cpp's base-logits file, beside a reader and a writer of its own that follow the format number by number."""

import math
import struct

import numpy
import pytest
import torch

from sgfast import divergences
from sgfast.evaluation.kld_file import KldFile, scored_positions, writing_kld


def case(vocabulary=37, context=8, windows=3, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    rows = windows * (context - 1 - context // 2)
    tokens = torch.randint(0, vocabulary, (windows, context), generator=generator)
    return tokens, spread * torch.randn(rows, vocabulary, generator=generator)


def written_plainly(tokens, logits):
    """The file, one number after the other, in float32 as llama.cpp computes."""
    one = numpy.float32
    windows, context = tokens.shape
    vocabulary = logits.shape[1]
    content = b"_logits_" + struct.pack("<iii", context, vocabulary, windows)
    content += b"".join(struct.pack("<i", token) for token in tokens.flatten().tolist())
    for row in logits.numpy():
        largest = max(row)
        smallest = max(min(row), one(largest - one(16)))
        log_sum = one(math.log(sum(float(numpy.exp(one(value - largest))) for value in row)))
        scale = one(one(largest - smallest) / one(65535))
        content += struct.pack("<ff", scale, one(one(smallest - largest) - log_sum))
        for value in row:
            code = round(float(one(one(1) / scale) * one(value - smallest))) if scale and value > smallest else 0
            content += struct.pack("<H", code)
        content += b"\0\0" * (vocabulary % 2)
    return content


def read_plainly(content):
    """The log-probabilities of all rows, one number after the other."""
    assert content[:8] == b"_logits_"
    context, vocabulary, windows = struct.unpack_from("<iii", content, 8)
    place = 20 + 4 * windows * context
    padded = (vocabulary + 1) // 2 * 2
    rows = []
    while place < len(content):
        scale, minimum = struct.unpack_from("<ff", content, place)
        codes = struct.unpack_from(f"<{vocabulary}H", content, place + 8)
        rows.append([scale * code + minimum for code in codes])
        place += 8 + 2 * padded
    assert place == len(content)
    assert len(rows) == windows * (context - 1 - context // 2)
    return torch.tensor(rows, dtype=torch.float64)


def write(path, tokens, logits, vocabulary=None):
    with writing_kld(path, tokens, vocabulary or logits.shape[1]) as writer:
        for part in logits.split(4):
            writer.write(part)


@pytest.mark.parametrize(("vocabulary", "context"), [(37, 8), (38, 9), (1, 3), (300, 4)])
def test_a_file_that_another_program_wrote(tmp_path, vocabulary, context):
    tokens, logits = case(vocabulary, context)
    path = tmp_path / "base.kld"
    path.write_bytes(written_plainly(tokens, logits))
    with KldFile(path) as file:
        assert file.vocabulary == vocabulary
        assert file.tokens.tolist() == tokens.tolist()
        assert len(file) == len(logits)
        found = torch.cat([file.log_probs(row, row + 1) for row in range(len(file))])
        assert torch.equal(found, file.log_probs(0, len(file)))
    assert (found.double() - read_plainly(path.read_bytes())).abs().max() < 1e-5
    exact = logits.double().log_softmax(-1)
    kept = logits >= logits.amax(-1, keepdim=True) - 16
    assert (found - exact)[kept].abs().max() < 16 / 65535 / 2 + 1e-5


@pytest.mark.parametrize(("vocabulary", "context", "spread"), [(37, 8, 4.0), (38, 9, 20.0), (1, 3, 1.0), (6, 5, 0.0)])
def test_a_file_for_another_program(tmp_path, vocabulary, context, spread):
    """The same codes as the plain writer, but for values that lie between two codes."""
    tokens, logits = case(vocabulary, context, spread=spread)
    path = tmp_path / "base.kld"
    write(path, tokens, logits)
    content, plain = path.read_bytes(), written_plainly(tokens, logits)
    assert len(content) == len(plain)
    start = 20 + 4 * tokens.numel()
    assert content[:start] == plain[:start]
    assert (read_plainly(content) - read_plainly(plain)).abs().max() < 16 / 65535 + 1e-5
    different = numpy.frombuffer(content, "<u2") != numpy.frombuffer(plain, "<u2")
    assert different.mean() < 0.05


def test_a_minus_infinity_is_sixteen_below(tmp_path):
    logits = torch.tensor([[0.0, -math.inf, -3.0]], dtype=torch.float64)
    write(tmp_path / "base.kld", torch.tensor([[0, 1, 2]]), logits)
    with KldFile(tmp_path / "base.kld") as file:
        found = file.log_probs(0, 1)
    assert (found[0, 0] - found[0, 1]).item() == pytest.approx(16, abs=1e-4)


def test_divergences_of_a_stored_reference(tmp_path):
    """The rounding of the format is what separates them: 1e-3 of a divergence that is not small."""
    tokens, logits = case(windows=8)
    candidate = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    write(tmp_path / "base.kld", tokens, logits)
    with KldFile(tmp_path / "base.kld") as file:
        stored = divergences(candidate, file.log_probs(0, len(file)), "forward_kl")["forward_kl"]
    exact = divergences(candidate, logits, "forward_kl")["forward_kl"]
    assert (stored.min() >= 0).item()
    assert stored.mean().item() == pytest.approx(exact.mean().item(), rel=1e-3)
    assert list(scored_positions(8)) == [4, 5, 6]


def damaged(content):
    """Damages by name: the file with each, and words of the message."""
    row = 20 + 4 * 24
    yield "another file", b"GGUF" + content[4:], "is no base-logits file"
    yield "empty", b"", "is no base-logits file"
    yield "header cut off", content[:15], "header has 15 of 20 bytes"
    yield "tokens cut off", content[:40], "cut off: it has 40 bytes"
    yield "last byte cut off", content[:-1], "cut off"
    yield "longer", content + b"\0", "damaged or cut off"
    yield "huge windows", content[:16] + struct.pack("<i", 2**31 - 1) + content[20:], "damaged or cut off"
    yield "negative vocabulary", content[:12] + struct.pack("<i", -5) + content[16:], "-5 tokens of the vocabulary"
    yield "short windows", content[:8] + struct.pack("<i", 2) + content[12:], "2 tokens a window"
    yield "token", content[:24] + struct.pack("<i", 37) + content[28:], "token 1 is 37, which is outside"
    for name, number in (("nan", math.nan), ("infinite", math.inf), ("large", 3.0), ("negative", -1.0)):
        yield name, content[:row] + struct.pack("<f", number) + content[row + 4 :], "probabilities of row 0"
    yield "minimum", content[: row + 4] + struct.pack("<f", -30.0) + content[row + 8 :], "probabilities of row 0"


def test_every_damage_is_one_line(tmp_path):
    tokens, logits = case()
    content = written_plainly(tokens, logits)
    path = tmp_path / "base.kld"
    names = []
    for name, changed, words in damaged(content):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=words) as caught, KldFile(path) as file:
            file.log_probs(0, len(file))
        message = str(caught.value)
        assert message.startswith(str(path)), name
        assert "\n" not in message, name
        names.append(name)
    assert len(names) == 15
    with pytest.raises(ValueError, match="is a folder"):
        KldFile(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        KldFile(tmp_path / "missing.kld")


def test_wrong_rows_leave_no_file(tmp_path):
    tokens, logits = case()
    path = tmp_path / "base.kld"
    for rows, words in (
        (logits[:-1], "1 rows of"),
        (torch.cat([logits, logits[:1]]), "rows; the windows have 1 more"),
        (logits[:, :-1], "logits must have shape"),
        (logits * math.nan, "finite largest"),
        (logits.where(logits != logits.max(), math.inf), "finite largest"),
    ):
        with pytest.raises(ValueError, match=words):
            write(path, tokens, rows, vocabulary=37)
        assert not list(tmp_path.iterdir())
    for wrong, error in ((tokens + 37, ValueError), (tokens[:, :2], ValueError), (tokens.float(), TypeError)):
        with pytest.raises(error, match="tokens"), writing_kld(path, wrong, 37):
            pass
