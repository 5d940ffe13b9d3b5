"""Reads settings: a YAML file, at most one level of `extends`, and `section.key=value` overrides.

Every fault becomes a ValueError with a line for each: file or key, value, rule, cure.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dispersion_pretrain.config import Settings
from dispersion_pretrain.plain_values import PlainLoader, refuse_odd_values, show, show_text

Model = TypeVar("Model", bound=BaseModel)

_MODEL_CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "models"


def load_settings(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file, its `extends`, and `section.key=value` overrides into checked settings.

    Mappings are merged key by key; a null section turns the section off. `model.config` and `zero.overrides` are
    replaced whole by a child file.

    Raises:
        ValueError: any fault, naming file or key, value, rule and cure.
    """
    tree = read_yaml(Path(path))
    parent_name = tree.pop("extends", None)
    if parent_name is not None:
        parent_path = Path(path).parent / str(parent_name)
        parent = read_yaml(parent_path)
        if "extends" in parent:
            raise ValueError(
                f"{parent_path}: a file that is extended extends another. One level of extends is allowed. Write the "
                "settings out in one of them."
            )
        _inline_model_config(parent, parent_path.parent)  # named from the parent's folder
        tree = _merge(parent, tree)
    _inline_model_config(tree, Path(path).parent)
    for override in overrides or []:
        _apply_override(tree, override)
    _inline_model_config(tree, Path(path).parent)
    return parse_settings(tree, source=str(path))


def parse_settings(tree: dict[str, Any], source: str) -> Settings:
    """Check a plain tree. Raises ValueError with one line a fault, prefixed by `source`."""
    return parse_tree(Settings, tree, source)


def parse_tree(model: type[Model], tree: dict[str, Any], source: str) -> Model:
    """`parse_settings` for any tree of pydantic sections."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(fault, model) for fault in error.errors()]
        raise ValueError("\n".join(f"{source}: {line}" for line in dict.fromkeys(lines))) from None


def dump_settings(settings: Settings) -> str:
    """The resolved tree as YAML, which `load_settings` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, width=120)


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's mapping of plain values. Raises ValueError."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), PlainLoader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file. A YAML settings file is needed. Look under configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}). A readable YAML file is needed. Correct the path."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, a number of 5,000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else show_text(" ".join(str(error).split()))
        raise ValueError(f"{path}: is no valid YAML ({reason}). Correct that line.") from None
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path}: holds {type(tree).__name__}. A mapping of sections is needed. See configs/demo.yaml."
        )
    refuse_odd_values(tree, str(path))
    return tree


def _inline_model_config(tree: dict[str, Any], folder: Path) -> None:
    """Replace `model.config: FILE` by the file's mapping, so that the resolved settings stand alone."""
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("config"), str):
        return
    name = model["config"]
    candidates = [folder / name, Path(name), _MODEL_CONFIG_FOLDER / f"{name}.yaml"]
    with contextlib.suppress(OSError):  # a name that no file system takes
        for candidate in candidates:
            if candidate.is_file():
                model["config"] = read_yaml(candidate)
                return
    shipped = sorted(path.stem for path in _MODEL_CONFIG_FOLDER.glob("*.yaml"))
    raise ValueError(
        f"model.config: no file {show(name)}. A mapping, a YAML file or a shipped name is allowed: "
        f"{', '.join(shipped)}. Correct the name."
    )


def _merge(parent: dict[str, Any], child: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    merged = dict(parent)
    for key, value in child.items():
        both_sections = depth == 0 and isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge(merged[key], value, depth + 1) if both_sections else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(
            f"{show(override)}: is no override. section.key=value is allowed, such as run.seed=1. Correct it."
        )
    try:
        value = yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+\.?\d*[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-3 as a string
    refuse_odd_values({key: value}, "command line")
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        below = node.get(section)
        if below is None:
            below = node[section] = {}
        if not isinstance(below, dict):
            raise ValueError(
                f"{key}: {section} is {show(below)}, not a section. Only mappings have keys. Override {section} itself."
            )
        node = below
    node[last] = value


def _explain(fault: Any, root: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"] if part not in _UNION_TAGS]
    key = ".".join(location) or "settings"
    kind, value = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        section = _section(location[:-1], root)
        known = list(section.model_fields) if section is not None else []
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(known)}."
        return f"{key}: unknown key, with the value {show(value)}. {hint}"
    if kind == "missing":
        section = _section(location[:-1], root)
        description = section.model_fields[location[-1]].description if section is not None else None
        return f"{key}: is missing. It has no default{f': {description}' if description else ''}. Add it."
    if kind == "value_error":
        message = str(fault["ctx"]["error"])
        return message if not location else f"{key}.{message}"
    return f"{key}: {show(value)} is not allowed. {fault['msg']}. Correct the value."


_UNION_TAGS = {
    "constrained-int",
    "literal['auto']",
    "literal['all','last','early_half','late_half']",
    "list[int]",
    "function-after[_has_pairs(), DispersionSettings]",
}


def _section(location: list[str], root: type[BaseModel]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = root
    for part in location:
        field = section.model_fields.get(part) if section is not None else None
        if field is None:
            return None
        section = _model_of(field.annotation)
    return section


def _model_of(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
