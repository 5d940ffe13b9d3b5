"""A folder with the data sets that suites need, for machines that cannot reach the Hugging Face hub.

DIR/<name on the hub>/<configuration, or "default">/<split>.parquet, and manifest.json with the size and sha256 of each,
written last. partial.json is its state while the folder is filled, which a repetition goes on from.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from dispersion_pretrain.condensation_texts import DATASETS
from dispersion_pretrain.suites import SuiteTask

FORMAT_VERSION = 1
MANIFEST, PARTIAL = "manifest.json", "partial.json"
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True)
class Part:
    """One split of a data set on the hub."""

    dataset: str
    config: str | None
    split: str

    @property
    def file(self) -> str:
        """Its place in a mirror."""
        return f"{self.dataset}/{self.config or 'default'}/{self.split}.parquet"


# What the condensation of published models is measured on.
CONDENSATION = tuple(Part(each.hub_name, each.config, "train") for each in DATASETS.values())


@functools.cache
def index() -> dict[str, Any]:
    """lm-eval's tasks, groups and tags by name, without their data; reads 14,000 files (10 to 20 s), once."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return dict(TaskManager().task_index)


def unknown_task(name: str) -> str:
    """What to say of a name that is not in lm-eval's index."""
    nearest = difflib.get_close_matches(name, index(), n=3)
    near = f" The nearest are {', '.join(nearest)}." if nearest else ""
    return f"{name}: lm-eval has no such task.{near} One of `lm-eval ls tasks` is allowed. Correct the suite."


def members(name: str) -> dict[str, Any]:
    """Return what a task or group consists of, itself included: entries of lm-eval's index with a file, by name.

    Raises:
        KeyError: lm-eval has nothing of that name.
    """
    entry = index()[name]
    config = entry.cfg or {}
    children = config["task"] if isinstance(config.get("task"), list) else [] if entry.yaml_path else entry.tags
    found = {} if entry.yaml_path is None else {name: entry}
    for child in sorted(
        child if isinstance(child, str) else child.get("task", child.get("group")) for child in children
    ):
        found |= members(child)
    return found


def parts_of(task: SuiteTask) -> dict[str, list[Part]]:
    """Return the splits that each lm-eval task of a suite's task names; none of one over held-out text.

    Raises:
        KeyError: lm-eval does not know it.
    """
    if task.held_out is not None:
        return {}
    found = {}
    for name, entry in members(task.task).items():
        config = entry.cfg
        if "dataset_path" in config:
            splits = dict.fromkeys(config[key] for key in _SPLITS if config.get(key))
            found[name] = [Part(config["dataset_path"], config.get("dataset_name"), split) for split in splits]
    return found


# ---- filling


def fill(folder: Path, parts: Iterable[Part], source: Path | None = None) -> dict[str, Any]:
    """Bring data sets into a mirror and return its manifest; what is there already, whole, is not fetched again.

    Args:
        source: folder with copies of the hub's data-set repositories, SOURCE/<name on the hub>; None: the hub, or what
            HF_ENDPOINT and HF_HOME name.

    Raises:
        RuntimeError: some cannot be had, a line for each; the others are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _recorded(folder)
    errors = []
    for part in sorted(set(parts), key=lambda part: part.file):
        recorded = files.get(part.file)
        if recorded is not None and _describe(folder / part.file) == {
            key: recorded[key] for key in ("bytes", "sha256")
        }:
            continue
        print(f"{part.file}: is fetched", flush=True)
        try:
            files[part.file] = _fetch(folder, part, source)
        except RuntimeError as error:
            errors.append(str(error))
            continue
        _write(folder / PARTIAL, files)
    if errors:
        raise RuntimeError("\n".join(errors))
    _write(folder / MANIFEST, files)
    (folder / PARTIAL).unlink(missing_ok=True)
    return files


def _recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (MANIFEST, PARTIAL):
        if (folder / name).exists():
            found |= _read(folder / name)
    return found


def _read(path: Path) -> dict[str, Any]:
    """The files that a manifest names."""
    try:
        files: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is damaged ({type(error).__name__}: {error}). It lists the files of the mirror. Remove it, and "
            "fill the mirror again with launch/mirror_datasets.py."
        ) from None
    return files


def _fetch(folder: Path, part: Part, source: Path | None) -> dict[str, Any]:
    import datasets

    place = part.dataset if source is None else str(source / part.dataset)
    try:
        if source is not None and not Path(place).is_dir():
            raise FileNotFoundError(f"{place} is no folder")
        found = datasets.load_dataset(place, part.config, split=part.split)
    except Exception as error:  # whatever the hub, its files and their readers raise
        text = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"{place}: configuration {part.config or 'default'}, split {part.split} cannot be had "
            f"({type(error).__name__}: {text}). A machine that reaches the hub, or --source with a copy, is needed. "
            "Log in where a data set asks for it (`hf auth login`), and repeat: what is there is kept."
        ) from None
    path = folder / part.file
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    found.to_parquet(temporary)
    temporary.replace(path)
    checksums = sorted(found.info.download_checksums or {}) if source is None else []
    return {"rows": found.num_rows, **_describe(path), "source": checksums}  # addresses on the hub name the revision


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write(path: Path, files: dict[str, Any]) -> None:
    versions = {name: metadata.version(name) for name in ("datasets", "lm_eval", "pyarrow")}
    content = {"format_version": FORMAT_VERSION, "versions": versions, "files": dict(sorted(files.items()))}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)


# ---- reading


def write_configs(task: SuiteTask, scratch: Path, mirror: Path | None) -> None:
    """Write lm-eval configurations that include lm-eval's own, and read their data from a mirror where there is one.

    Raises:
        KeyError: lm-eval does not know the task.
        ValueError: a data set is not in the mirror, or not what was written there.
    """
    needed = {} if mirror is None else parts_of(task)
    files = {} if mirror is None else _check(mirror, [part for parts in needed.values() for part in parts])
    for name, entry in members(task.task).items():
        config: dict[str, Any] = {"include": str(entry.yaml_path)}
        if name in needed:
            config["dataset_path"] = "parquet"
            config["dataset_name"] = None
            config["dataset_kwargs"] = {
                "data_files": {part.split: str(files[part]) for part in needed[name]},
                "cache_dir": str(scratch / "datasets"),
            }
        (scratch / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _check(folder: Path, parts: list[Part]) -> dict[Part, Path]:
    remedy = (
        "A folder that `launch/mirror_datasets.py` has filled for this suite is needed. Run it, or correct --datasets"
    )
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder / MANIFEST}: is missing. {remedy}")
    files = _read(folder / MANIFEST)
    for part in dict.fromkeys(parts):
        recorded, found = files.get(part.file), _describe(folder / part.file)
        if recorded is None or not found:
            raise ValueError(f"{folder / part.file}: is missing. {remedy}")
        if found != {key: recorded[key] for key in ("bytes", "sha256")}:
            raise ValueError(f"{folder / part.file}: is not what {MANIFEST} says. {remedy}")
    return {part: (folder / part.file).resolve() for part in parts}
