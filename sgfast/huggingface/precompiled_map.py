"""Check of the character map of SentencePiece's normalizers, before the Rust library uses the map.

The map consists of a double-array trie over UTF-8 and a text of replacements, each of which ends with a zero byte.
The format is ``precompiled_charsmap`` of SentencePiece: four bytes with the trie's length in bytes, then the trie as
32-bit units, then the text. The Rust library does not check indices: an index beyond the arrays ends in a panic.
"""

import base64
import binascii

import torch
from torch import Tensor

# In bytes. A UTF-8 character has at most four bytes, and the rules of published maps match at most a few characters.
_LONGEST_RULE = 64
_NODES_AT_ONCE = 1024
# Rules with equal ends share units, so one unit may be visited at several lengths.
_MOST_VISITS = 2
_LEAF, _OFFSET_SHIFTED, _VALUE = 1 << 8, 1 << 9, (1 << 31) - 1


def longest_growth(text: str) -> float:
    """Check a map in base64, and return the most bytes that the map makes of one byte.

    Raises:
        ValueError: the text is not base64, or the map points outside itself.
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
    """Return where the children of nodes begin: the upper bits of the unit, shifted by 8 more if bit 9 is set."""
    unit = units[nodes]
    places = nodes ^ ((unit >> 10) << ((unit & _OFFSET_SHIFTED) >> 6))
    if bool((places >= len(units)).any()):
        raise ValueError("its precompiled_charsmap points outside its trie")
    return places


def _children(units: Tensor, nodes: Tensor) -> Tensor:
    """Return the children of nodes for all bytes except zero, each child once."""
    labels, found = torch.arange(1, 256), []
    for some in torch.split(nodes, _NODES_AT_ONCE):
        places = _bases(units, some)[:, None] ^ labels
        if bool((places >= len(units)).any()):
            raise ValueError("its precompiled_charsmap points outside its trie")
        # A unit with the highest bit set is a value, and its label equals no byte.
        found.append(places[(units[places] & 0x800000FF) == labels])
    children: Tensor = torch.unique(torch.cat(found))
    return children


def _borders(replacements: bytes) -> tuple[Tensor, Tensor]:
    """Return, for each byte, whether a character begins there, and the end of the replacement around the byte."""
    try:
        replacements.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its precompiled_charsmap has replacements that are not UTF-8: {error.reason}") from error
    values = torch.frombuffer(bytearray(replacements or b"\0"), dtype=torch.uint8)
    places = torch.where(values == 0, torch.arange(len(values)), len(values))
    ends = places.flip(0).cummin(0).values.flip(0)
    return (values & 0xC0) != 0x80, ends
