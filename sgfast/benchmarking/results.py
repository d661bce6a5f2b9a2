"""Result files: JSON with an environment and records."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgfast.benchmarking.growth import growth
from sgfast.utils.files import replacing


def write_result(path: Path, environment: dict[str, Any], records: Sequence[dict[str, Any]], **more: Any) -> None:
    """Write records and their growth, in the form of ``sgfast.benchmarking``."""
    content = {"environment": environment, **more, "records": list(records), "growth": growth(records)}
    lines = json.dumps(without_nan(content), ensure_ascii=False, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(lines + "\n", encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Replace NaN by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and value != value else value
