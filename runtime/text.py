"""Results as text, without what is slow to import."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def without_nan(content: Any) -> Any:
    """NaN and infinities, which JSON does not have, as null."""
    if isinstance(content, Mapping):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_text(content: Any) -> str:
    """One JSON document for a file or for stdout."""
    return json.dumps(without_nan(content), indent=2, default=str) + "\n"
