"""What may stand in a settings file: plain values of a reasonable number and size, and nothing secret.

Settings are written into the run folder, into every checkpoint and onto pages, so a password must not be among them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SHOWN = 200  # characters of a value in a message
_MOST_VALUES, _DEEPEST = 100_000, 50
_USER_AND_PASSWORD = re.compile(r"://[^/?#\s@:]*:(?!\d+/)[^?#\s@]+@")  # keys of AWS have slashes; a port is none
_SIGNED_QUERY = re.compile(
    r"[?&][^=&#\s]*(?:signature|credential|token|secret|password|key)[^=&#\s]*=.*", re.IGNORECASE
)
_SECRET_KEY = re.compile(
    r"secret|passw(or)?d|credential|(api|access|private)_?key|(auth|access|bearer|hf|hub|api)_?token", re.IGNORECASE
)


class PlainLoader(yaml.SafeLoader):
    """Builds plain values only, and refuses a key that stands twice: the first of them would be lost in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As SafeLoader's. Raises ConstructorError for a key that stands twice."""
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                again = f" with the value {show(value.value)}" if isinstance(value, yaml.ScalarNode) else ""
                problem = f"{key.value}: stands a second time{again}; once is allowed"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def refuse_odd_values(tree: Any, source: str) -> None:
    """Check a tree of plain values.

    Raises:
        ValueError: it has a password, text that no file holds, a whole number beyond 64 bits, or more values than any
            settings (aliases of YAML can multiply). Names key, value and rule; never shows what is secret.
    """
    waiting, count = [("", tree, 0)], 0
    while waiting:
        key, value, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES or depth > _DEEPEST:
            raise ValueError(
                f"{source}: {key[:_SHOWN]}: comes to more than {_MOST_VALUES:,} values, or {_DEEPEST} within each "
                "other. Settings have some hundred, a few deep; aliases that refer to each other multiply. Write the "
                "values out."
            )
        problem = _problem(key, value)
        if problem:
            raise ValueError(f"{source}: {key or 'settings'}: {problem}")
        if isinstance(value, dict):
            waiting += [(key, name, depth) for name in value]
            start = f"{key}." if key else ""
            waiting += [(f"{start}{_name(name)}", below, depth + 1) for name, below in value.items()]
        elif isinstance(value, list | tuple | set):
            waiting += [(f"{key}[{place}]", below, depth + 1) for place, below in enumerate(value)]


def _problem(key: str, value: Any) -> str | None:
    """What is odd about one value."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a whole number of {value.bit_length()} bits. At most 63 are allowed. Lower it."
    if not isinstance(value, str):
        return None
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value):
        return f"{show(value)} has characters that no file can hold. Text is allowed. Correct it."
    if "://" in value and (_USER_AND_PASSWORD.search(value) or _SIGNED_QUERY.search(value)):
        return (
            f"{show(value)} has a password or a key in it, and settings are written into the run folder. Addresses "
            "without one are allowed. Put it into the environment or a credentials file of the storage."
        )
    if value and _SECRET_KEY.search(key.rpartition(".")[2]):
        return (
            "looks like a secret (its value is not shown), and settings are written into the run folder. No setting "
            "takes one. Put it into the environment of the job."
        )
    return None


def show(value: Any) -> str:
    """A value as a message shows it: short, and without passwords of addresses."""
    return repr(show_text(value)) if isinstance(value, str) else show_text(repr(value))


def show_text(text: str) -> str:
    """As `show`, without quotes."""
    text = _SIGNED_QUERY.sub("?***", _USER_AND_PASSWORD.sub("://***@", text))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _name(key: Any) -> str:
    return key[:_SHOWN] if isinstance(key, str) else type(key).__name__
