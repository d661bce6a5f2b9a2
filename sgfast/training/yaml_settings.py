"""Small YAML texts of settings: nothing is executed, no key is lost, and no short text makes a large value."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from sgfast.utils.input_files import open_regular

# Settings take a kilobyte or two. PyYAML reads some 100 kB a second.
_LARGEST_TEXT = 2**16
# The number of values with every alias replaced by its target. Aliases of aliases double the number at each step.
_MOST_NODES = 10_000
_DEEPEST = 20
# PyYAML raises these if a tag such as ``!!timestamp`` stands before a value of another form.
_OF_A_TAG = (AttributeError, IndexError, KeyError, TypeError)


def read_yaml_file(path: Path) -> Any:
    """Read the value of a YAML file.

    Raises:
        ValueError: no such file, no regular file, or `parse_yaml` refuses the text; the message names file and line.
    """
    with open_regular(path, wanted="file of settings") as file:
        content = file.read(_LARGEST_TEXT + 1)
    return parse_yaml(content, str(path))


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Parse a YAML text.

    Args:
        text: one document.
        where: name of the text in an error.

    Raises:
        ValueError: no YAML, a tag that is not plain YAML's, a key that occurs twice, nested too deeply, an alias inside
            its target, or more than 64 kB or, with aliases written out, 10,000 values.
    """
    if len(text) > _LARGEST_TEXT:
        raise ValueError(f"{where}: settings of more than {_LARGEST_TEXT} bytes are not read")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, *_OF_A_TAG) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = "nested too deeply" if isinstance(error, RecursionError) else problem or str(error)
        if isinstance(error, _OF_A_TAG):
            reason = "a value that its tag does not fit"
        raise ValueError(f"{where}{line}: not YAML: {' '.join(reason.split())[:200]}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with errors for equal keys and for deep brackets.

    PyYAML itself keeps the last of equal keys, and reads deep brackets slowly.
    """

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # ``<<``, which the safe loader resolves
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # which the safe loader refuses
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} occurs twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _check_size(node: yaml.Node, sizes: dict[int, int], inside: set[int]) -> int:
    """Return the number of values under a node, with each alias counted as its target."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in inside:
        raise yaml.constructor.ConstructorError(
            problem="an alias stands inside what it stands for", problem_mark=node.start_mark
        )
    inside.add(id(node))
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for entry in node.value:
            for child in entry if isinstance(entry, tuple) else (entry,):
                total += _check_size(child, sizes, inside)
    inside.discard(id(node))
    if total > _MOST_NODES:
        raise yaml.constructor.ConstructorError(
            problem=f"it holds more than {_MOST_NODES} values", problem_mark=node.start_mark
        )
    sizes[id(node)] = total
    return total
