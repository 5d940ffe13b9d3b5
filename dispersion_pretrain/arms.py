"""Runs put together as arms of a comparison: the same settings under several seeds."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dispersion_pretrain.run_folder import Run

METHODS = ("dispersion", "noisy_embeddings", "active_forgetting", "distillation")  # sections that a baseline lacks
_OWN = ("name", "folder", "seed")  # of section `run`: what may differ within an arm


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed only, in the order of their seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def by_seed(self) -> dict[Any, Run]:
        """The runs under their seeds; None is a seed that is not known."""
        return {_seed(run): run for run in self.runs}


def group(runs: Sequence[Run]) -> list[Arm]:
    """Arms in the order in which their first runs are given.

    A second run with the same settings and the same seed is no evidence about seeds: it begins another arm (the same
    sweep with other code, say). A run whose settings are unknown is one by itself.
    """
    members: dict[tuple[str, int], dict[int | None, Run]] = {}
    for place, run in enumerate(runs):
        settings, turn = _shared_settings(run) or f"unknown {place}", 0
        while _seed(run) in members.setdefault((settings, turn), {}):
            turn += 1
        members[settings, turn][_seed(run)] = run
    alike = [[by_seed[seed] for seed in sorted(by_seed, key=_seed_order)] for by_seed in members.values()]
    return [Arm(name, tuple(runs)) for name, runs in zip(_names(alike), alike, strict=True)]


def choose_reference(arms: Sequence[Arm], name: str | None) -> Arm:
    """The arm of that name; without one the first that uses none of `METHODS`, or else the first.

    Raises:
        ValueError: no arm has the name.
    """
    if name is None:
        return next((arm for arm in arms if arm.runs[0].settings and not _methods(arm.runs[0])), arms[0])
    for arm in arms:
        if arm.name == name:
            return arm
    names = ", ".join(repr(arm.name) for arm in arms)
    raise ValueError(f"--reference: {name!r} is no arm of these runs. {names} are. Name one of them.")


def describe(arm: Arm) -> str:
    """Its name and seeds: `dispersion (seeds 0, 1, 2)`."""
    seeds = [str(seed) for seed in arm.by_seed if seed is not None]
    return f"{arm.name} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})" if seeds else arm.name


def paired_seeds(arm: Arm, reference: Arm) -> list[Any]:
    """Seeds that both have, in order."""
    return [seed for seed in arm.by_seed if seed in reference.by_seed]


def _shared_settings(run: Run) -> str:
    if not run.settings:
        return ""
    settings = copy.deepcopy(run.settings)
    if isinstance(settings.get("run"), dict):
        for key in _OWN:
            settings["run"].pop(key, None)
    return json.dumps(_without_nulls(settings), sort_keys=True, default=str)


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """Runs from before a setting was there are like those that leave it off."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def _seed(run: Run) -> Any:
    section = run.settings.get("run")
    seed = section.get("seed") if isinstance(section, dict) else None
    return seed if isinstance(seed, int) else None


def _seed_order(seed: int | None) -> tuple[bool, int]:
    return seed is None, seed or 0


def _methods(run: Run) -> list[str]:
    return [name for name in METHODS if run.settings.get(name)]


def _names(members: list[list[Run]]) -> list[str]:
    """Name arms by their methods; where that does not tell them apart by what their runs' names begin with."""
    by_method = [" + ".join(_methods(runs[0])) or "baseline" if runs[0].settings else runs[0].name for runs in members]
    names = [
        _common_name(runs) if by_method.count(name) > 1 else name for name, runs in zip(by_method, members, strict=True)
    ]
    return [
        f"{name} {names[:place].count(name) + 1}" if names.count(name) > 1 else name for place, name in enumerate(names)
    ]


def _common_name(runs: list[Run]) -> str:
    """The beginning that names of runs share, without the "_s" or "-seed" before their numbers."""
    if len(runs) == 1:
        return runs[0].name
    common = os.path.commonprefix([run.name for run in runs]).rstrip("0123456789").rstrip("_-./ ")
    for ending in ("seed", "s"):
        shorter = common.removesuffix(ending)
        if shorter != common and shorter.endswith(("_", "-", ".", "/", " ")):
            common = shorter.rstrip("_-./ ")
    return common or runs[0].name
