"""The character map of SentencePiece's normalizers, checked before the Rust library follows it.

The map is a double-array trie over UTF-8 and a text of replacements, each ended by a zero byte. Its format is that of
SentencePiece (``precompiled_charsmap``): four bytes with the trie's length in bytes, 32-bit units, and the text. An
index beyond the arrays is not noticed by the library that follows it until the process panics.
"""

import base64
import binascii

import torch
from torch import Tensor

# A UTF-8 character has four bytes, and the rules of published maps are for at most a few characters.
_LONGEST_RULE = 64
_NODES_AT_ONCE = 1024
# Equal ends of rules share units: one may be met at several lengths.
_MOST_VISITS = 2
_LEAF, _OFFSET_SHIFTED, _VALUE = 1 << 8, 1 << 9, (1 << 31) - 1


def longest_growth(text: str) -> float:
    """Check a map in base64; return the most bytes that it makes of one.

    Raises:
        ValueError: not base64, or a map that points outside itself.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"its precompiled_charsmap is not base64: {error}") from error
    length = int.from_bytes(content[:4], "little")
    if len(content) < 4 or length % 4 or not 4 <= length <= len(content) - 4:
        raise ValueError(f"its precompiled_charsmap has {len(content)} bytes, which cannot hold a trie of {length}")
    units = torch.frombuffer(bytearray(content[4 : 4 + length]), dtype=torch.int32).long() & 0xFFFFFFFF
    replacements = content[4 + length :]
    starts, ends = _borders(replacements)
    growth, visited = 1.0, 0
    nodes = _children(units, torch.zeros(1, dtype=torch.long))
    for matched in range(1, _LONGEST_RULE + 1):
        if not len(nodes):
            return growth
        visited += len(nodes)
        if visited > _MOST_VISITS * len(units):
            raise ValueError("its precompiled_charsmap has more rules than its size allows")
        leaves = nodes[units[nodes] & _LEAF != 0]
        values = units[_bases(units, leaves)] & _VALUE
        if bool((values >= len(replacements)).any()) or not bool(starts[values].all()):
            raise ValueError("its precompiled_charsmap points outside its replacements, or into a character")
        growth = max(growth, (ends[values] - values).max().item() / matched if len(values) else 1.0)
        nodes = _children(units, nodes)
    raise ValueError(f"its precompiled_charsmap has rules for more than {_LONGEST_RULE} bytes")


def _bases(units: Tensor, nodes: Tensor) -> Tensor:
    """Where the children of nodes begin: a unit's upper bits, shifted once more where bit 9 is set."""
    unit = units[nodes]
    places = nodes ^ ((unit >> 10) << ((unit & _OFFSET_SHIFTED) >> 6))
    if bool((places >= len(units)).any()):
        raise ValueError("its precompiled_charsmap points outside its trie")
    return places


def _children(units: Tensor, nodes: Tensor) -> Tensor:
    """The different children of nodes, over all bytes but zero."""
    labels, found = torch.arange(1, 256), []
    for some in torch.split(nodes, _NODES_AT_ONCE):
        places = _bases(units, some)[:, None] ^ labels
        if bool((places >= len(units)).any()):
            raise ValueError("its precompiled_charsmap points outside its trie")
        # A unit with the highest bit is a value: it has no label that equals a byte.
        found.append(places[(units[places] & 0x800000FF) == labels])
    children: Tensor = torch.unique(torch.cat(found))
    return children


def _borders(replacements: bytes) -> tuple[Tensor, Tensor]:
    """For each byte whether a character begins there, and where the replacement that it lies in ends."""
    try:
        replacements.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its precompiled_charsmap has replacements that are not UTF-8: {error.reason}") from error
    values = torch.frombuffer(bytearray(replacements or b"\0"), dtype=torch.uint8)
    places = torch.where(values == 0, torch.arange(len(values)), len(values))
    ends = places.flip(0).cummin(0).values.flip(0)
    return (values & 0xC0) != 0x80, ends
