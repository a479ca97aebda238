"""What differs between two configs, a line a key."""

import json
from collections.abc import Iterator, Mapping


def same_config(saved: Mapping, current: Mapping) -> list[str]:
    """What differs, as "grpo.kl_coef: 0.001 -> 0.0"; empty when nothing does."""
    old, new = (dict(_leaves(json.loads(json.dumps(c)))) for c in (saved, current))
    absent = object()
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key, absent), new.get(key, absent)
        if a != b:
            shown = ("(not set)" if value is absent else repr(value) for value in (a, b))
            lines.append(f"{key}: " + " -> ".join(shown))
    return lines


def _leaves(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
