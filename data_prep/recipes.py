"""Recipes: YAML files that hold options of tokenize_to_mds.py under their names, with `_` for `-`."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from prep_errors import InputError

# What a recipe may say, and of which type. Where a corpus goes, and on how many processors, is no part of what it is.
_TYPES: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "text_column": (str,),
    "dataset_config": (str,),
    "dataset_split": (str,),
    "validation_source": (str,),
    "validation_share": (float,),
    "tokenizer": (str,),
    "seq_len": (int, list),
    "minimum_characters": (int,),
    "deduplicate": (bool,),
    "shard_bytes": (int,),
}
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", list: "a list of integers"}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe; values are of the right type, their range is for whoever uses them to check.

    Raises:
        InputError: no such file, no YAML mapping, an unknown key, a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        recipe, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except FileNotFoundError:
        raise InputError(f"--recipe {path}: no such file. A YAML file is needed. Look under configs/data.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe {path}: cannot be read ({error}). Correct the path.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is no YAML ({' '.join(str(error).split())}). Correct that line.") from error
    if not isinstance(recipe, dict) or not isinstance(tree, yaml.MappingNode) or not recipe:
        raise InputError(f"{path}: holds no options. `name: value` lines are needed. Look under configs/data.")
    names = [name.value for name, _ in tree.value]
    for name in names:
        if names.count(name) > 1:  # the library would take the last one
            raise InputError(f"{path}: option '{name}' is there twice. Once is allowed. Remove one.")
    for key, value in recipe.items():
        _check(path, key, value)
    if {"validation_source", "validation_share"} <= set(recipe):
        raise InputError(
            f"{path}: has validation_source and validation_share. The validation split comes from one of them. Remove "
            "the other."
        )
    return recipe


def _check(path: Path, key: Any, value: Any) -> None:
    if key not in _TYPES:
        nearest = difflib.get_close_matches(str(key), _TYPES, n=1, cutoff=0.5)
        cure = f"Did you mean {nearest[0]}?" if nearest else "Remove it."
        raise InputError(f"{path}: unknown option '{key}'. Allowed are {', '.join(_TYPES)}. {cure}")
    types = _TYPES[key]
    # true is an int to Python
    fits = isinstance(value, types) and isinstance(value, bool) is (types == (bool,))
    if isinstance(value, list):
        fits = fits and len(value) > 0 and all(type(entry) is int for entry in value)
    if not fits:
        names = " or ".join(_NAMES[kind] for kind in types)
        raise InputError(f"{path}: {key} is {value!r}. It must be {names}. Correct it.")
