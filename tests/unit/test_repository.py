"""House rules: who imports whom, how files are named and how long they are, what the Makefile explains.

Each rule is a function of the repository's folder, so that it can be shown a folder that breaks it.
"""

from __future__ import annotations

import ast
import importlib.machinery
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "dispersion_pretrain"

# What each module of the package may import from it, in an order in which arrows point up only.
ALLOWED: dict[str, set[str]] = {
    "exit_codes": set(),
    "heartbeat": set(),
    "hang_report": {"heartbeat"},
    "watchdog": {"exit_codes", "hang_report", "heartbeat"},
    "stopping": {"exit_codes"},
    "launcher": {"heartbeat"},
    "config": set(),
    "plain_values": set(),
    "settings_file": {"config", "plain_values"},
    "layout": {"config"},
    "slurm": set(),
    "cluster_file": {"plain_values", "settings_file", "slurm"},
    "slurm_script": {"cluster_file", "exit_codes", "slurm"},
    "angular_kernel": set(),
    "pair_sums": {"angular_kernel", "heartbeat"},
    "dispersion": {"heartbeat", "pair_sums"},
    "distributed": set(),
    "provenance": set(),
    "submission": {"cluster_file", "config", "layout", "provenance", "settings_file", "slurm", "slurm_script"},
    "condensation": {"distributed"},
    "condensation_pictures": {"condensation"},
    "condensation_family": {"condensation", "condensation_pictures"},
    "loss_head": set(),
    "fused_kernels": set(),
    "model": {"config", "fused_kernels", "loss_head"},
    "baselines": {"config", "distributed", "model"},
    "objective": {"baselines", "config", "dispersion", "distributed", "loss_head", "pair_sums"},
    "faults": {"config", "distributed", "objective"},
    "optim": {"config"},
    "remotes": set(),
    "shard_cache": set(),
    "corpus_files": {"remotes", "shard_cache"},
    "corpus": {"corpus_files", "remotes"},
    "condensation_texts": {"condensation", "corpus"},
    "order": set(),
    "data": {"corpus", "order"},
    "corpora": {"config", "corpus", "data", "layout", "order"},
    "metrics": {"distributed"},
    "checkpoint": {"distributed"},
    "retention": {"checkpoint"},
    "host_copy": set(),
    "saving": {"checkpoint", "distributed", "host_copy", "retention"},
    "reshard": {"distributed"},
    "crash_loop": {"config", "distributed", "exit_codes", "heartbeat", "metrics", "provenance", "settings_file"},
    "run_list": {"crash_loop", "exit_codes", "heartbeat", "metrics", "slurm", "submission"},
    "run_lock": {"distributed", "heartbeat"},
    "zero_gradients": set(),
    "engine": {"config", "heartbeat", "layout", "optim", "reshard", "zero_gradients"},
    "export": {"checkpoint", "config", "engine", "model", "settings_file"},
    "suites": set(),
    "held_out": {"corpus", "suites"},
    "dataset_mirror": {"condensation_texts", "suites"},
    "evaluation_ranks": set(),
    "lm_tasks": {"dataset_mirror", "evaluation_ranks", "held_out", "suites"},
    "evaluate": {
        "checkpoint", "config", "corpus", "evaluation_ranks", "export", "heartbeat", "held_out", "lm_tasks",
        "model", "provenance", "settings_file", "suites",
    },
    "evaluation_jobs": {
        "checkpoint", "evaluate", "export", "heartbeat", "settings_file", "slurm", "slurm_script", "suites",
    },
    "assembly": {
        "baselines", "config", "corpora", "data", "dispersion", "distributed", "engine", "faults", "layout", "metrics",
        "model", "objective", "optim", "provenance",
    },
    "certificate": {"assembly", "checkpoint", "distributed", "metrics", "provenance"},
    "replicas": {"assembly", "distributed", "metrics"},
    "resume": {
        "assembly", "certificate", "checkpoint", "config", "distributed", "evaluation_jobs", "export", "faults",
        "metrics", "provenance", "saving", "settings_file",
    },
    "profiling": {"config", "heartbeat"},
    "train": {
        "assembly", "baselines", "certificate", "checkpoint", "condensation", "condensation_pictures", "config",
        "crash_loop", "data", "distributed", "engine", "evaluation_jobs", "exit_codes", "faults", "heartbeat",
        "launcher", "metrics", "model", "objective", "optim", "profiling", "replicas", "resume", "run_lock", "saving",
        "stopping", "watchdog",
    },
    "doctor": {
        "assembly", "config", "data", "distributed", "engine", "layout", "metrics", "model", "objective",
        "settings_file", "train",
    },
    "memory_trial": {
        "assembly", "config", "data", "distributed", "engine", "metrics", "objective", "train",
    },
    "batch_finder": {
        "assembly", "config", "distributed", "engine", "heartbeat", "launcher", "layout", "memory_trial", "provenance",
        "run_lock",
    },
    "machine": {"assembly", "config", "distributed", "engine", "provenance"},
    "run_folder": {"condensation", "metrics"},
    "arms": {"run_folder"},
    "comparison": set(),
    "outcomes": {"arms", "comparison", "run_folder"},
    "tables": {"arms", "comparison", "outcomes"},
    "figures": {"arms", "condensation", "condensation_pictures", "run_folder"},
    "report": {"arms", "comparison", "figures", "outcomes", "run_folder", "tables"},
    "plan_machine": {"config", "plain_values", "settings_file"},
    "plan_work": set(),
    "plan_trace": {"baselines", "config", "loss_head", "model", "objective", "plan_work"},
    "plan_memory": {"config", "engine", "layout", "plan_machine", "plan_trace"},
    "plan_time": {"config", "engine", "layout", "metrics", "model", "plan_machine", "plan_memory", "plan_trace"},
    "plan": {
        "assembly", "config", "layout", "metrics", "plan_machine", "plan_memory", "plan_time", "plan_trace",
    },
    "plan_text": {"plan", "plan_memory"},
    "plan_picture": {"figures", "plan"},
}  # fmt: skip

# Only these modules may import the library at all, or (second set) only inside a function, where it is needed.
CONFINED: dict[str, tuple[set[str], set[str]]] = {
    "deepspeed": ({"engine"}, set()),
    "liger_kernel": (set(), {"fused_kernels"}),
    "matplotlib": ({"condensation_pictures", "figures", "plan_picture"}, set()),
    "lm_eval": (set(), {"dataset_mirror", "evaluate", "lm_tasks"}),
}

MAXIMUM_LINES = 500  # the aim is 400
NAMES_THAT_SAY_NOTHING = {"base", "common", "helpers", "misc", "registry", "util", "utils"}


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Full names that a file imports, each with whether that waits for a call, or is for type checkers only.

    `from a import b` gives a.b, be b a module or not. Relative imports are made absolute from the package's name.
    """

    def visit(node: ast.AST, deferred: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, deferred) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = ".".join(filter(None, [PACKAGE if child.level else "", child.module or ""]))
                yield from ((f"{module}.{alias.name}", deferred) for alias in child.names)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
                yield from visit(child, deferred or is_function or for_types)

    return visit(ast.parse(path.read_text(encoding="utf-8")), False)


def imports_between_modules(root: Path) -> Iterator[str]:
    for path in python_files(root, PACKAGE):
        if path.stem == "__init__":
            continue
        if path.stem not in ALLOWED:
            yield f"{path.name}: is not in the table of modules. Add it to ALLOWED with what it may import."
            continue
        for name, _ in imported(path):
            package, _, rest = name.partition(".")
            module = rest.split(".")[0]
            is_module = (root / PACKAGE / f"{module}.py").exists()
            if package == PACKAGE and is_module and module not in ALLOWED[path.stem]:
                yield f"{path.name}: imports {module}, allowed are {sorted(ALLOWED[path.stem])}"


def imports_of_confined_libraries(root: Path) -> Iterator[str]:
    for path in python_files(root, PACKAGE, "launch", "data_prep"):
        for name, deferred in imported(path):
            library = name.split(".")[0]
            anywhere, in_functions = CONFINED.get(library, ({path.stem}, set()))
            if path.stem not in anywhere and not (deferred and path.stem in in_functions):
                yield f"{path.relative_to(root)}: imports {library}"


def imports_of_the_package_in_data_prep(root: Path) -> Iterator[str]:
    for path in python_files(root, "data_prep"):
        for name, _ in imported(path):
            if name.split(".")[0] == PACKAGE:
                yield f"data_prep/{path.name}: imports {name}"


def scripts_that_shadow_a_library(root: Path) -> Iterator[str]:
    """A script's folder comes first on the path of its imports: launch/profile.py would break `import cProfile`."""
    libraries = [entry for entry in sys.path if "site-packages" in entry or not Path(entry).is_relative_to(ROOT)]
    for path in python_files(root, "launch", "data_prep"):
        if importlib.machinery.PathFinder.find_spec(path.stem, libraries) or path.stem in sys.stdlib_module_names:
            yield f"{path.relative_to(root)}: shadows the library {path.stem}"


def files_too_long(root: Path) -> Iterator[str]:
    for path in python_files(root, PACKAGE, "launch", "data_prep", "tests"):
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAXIMUM_LINES:
            yield f"{path.relative_to(root)}: {lines} lines, at most {MAXIMUM_LINES} are allowed. Divide it."


def names_that_say_nothing(root: Path) -> Iterator[str]:
    for path in python_files(root, PACKAGE, "launch", "data_prep", "tests"):
        if path.stem in NAMES_THAT_SAY_NOTHING:
            yield f"{path.relative_to(root)}: says nothing about what is in it"


def make_targets_without_help(root: Path) -> Iterator[str]:
    text = (root / "Makefile").read_text(encoding="utf-8")
    phony = set(" ".join(re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)).split())
    explained = set(re.findall(r"^([a-z][a-z0-9-]*):.*## \S", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", text, re.MULTILINE))
    yield from (f"Makefile: {name} has no help line" for name in sorted((targets | phony) - explained))
    yield from (f"Makefile: {name} is not in .PHONY" for name in sorted(targets - phony))


RULES: list[tuple[Callable[[Path], Iterator[str]], str, str]] = [
    # the rule, and a file with the text that breaks it
    (imports_between_modules, f"{PACKAGE}/dispersion.py", f"from {PACKAGE} import config"),
    (imports_between_modules, f"{PACKAGE}/dispersion.py", f"def f():\n    from {PACKAGE}.config import Settings"),
    (imports_between_modules, f"{PACKAGE}/dispersion.py", "from .config import Settings"),
    (imports_between_modules, f"{PACKAGE}/dispersion.py", f"import {PACKAGE}.config"),
    (imports_between_modules, f"{PACKAGE}/novelty.py", ""),
    (imports_of_confined_libraries, f"{PACKAGE}/optim.py", "from deepspeed.ops.adam import FusedAdam"),
    (imports_of_confined_libraries, "launch/pretrain.py", "def main():\n    import deepspeed"),
    (imports_of_confined_libraries, f"{PACKAGE}/evaluate.py", "import lm_eval"),
    (imports_of_confined_libraries, f"{PACKAGE}/condensation.py", "from matplotlib import pyplot"),
    (imports_of_the_package_in_data_prep, "data_prep/sources.py", f"from {PACKAGE}.data import read_manifest"),
    (scripts_that_shadow_a_library, "launch/profile.py", ""),
    (scripts_that_shadow_a_library, "data_prep/tokenizers.py", ""),
    (files_too_long, "tests/unit/test_all.py", "\n" * (MAXIMUM_LINES + 1)),
    (names_that_say_nothing, f"{PACKAGE}/utils.py", ""),
    (make_targets_without_help, "Makefile", ".PHONY: help\nhelp:\n"),
    (make_targets_without_help, "Makefile", ".PHONY: help\nhelp: ## this list\nother: ## another\n"),
]


@pytest.mark.parametrize("rule", list(dict.fromkeys(rule for rule, _, _ in RULES)), ids=lambda rule: rule.__name__)
def test_the_repository_keeps(rule: Callable[[Path], Iterator[str]]) -> None:
    assert list(rule(ROOT)) == []


@pytest.mark.parametrize(("rule", "file", "text"), RULES)
def test_a_breach_is_found(tmp_path: Path, rule: Callable[[Path], Iterator[str]], file: str, text: str) -> None:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "config.py").touch()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    assert len(list(rule(tmp_path))) == 1


def test_the_table_of_imports_allows_no_cycle() -> None:
    above: set[str] = set()
    for module, allowed in ALLOWED.items():
        assert allowed <= above, f"{module} may import what comes after it"
        above.add(module)


def test_the_table_of_imports_names_only_modules_that_exist() -> None:
    assert set(ALLOWED) == {path.stem for path in (ROOT / PACKAGE).glob("*.py")} - {"__init__"}


def test_make_alone_prints_every_target() -> None:
    # `make test` runs this very test: what a make passes on to the makes below it would show in the output.
    outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    printed = subprocess.run(["make"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"setup", "demo", "test", "lint", "bench"} <= set(targets)
    assert [line.split()[1] for line in printed.splitlines()] == targets


@pytest.mark.parametrize(
    ("linter", "file"), [("hadolint", "docker/Dockerfile"), ("shellcheck", ".ci/run")], ids=["dockerfile", "ci"]
)
def test_linter_has_nothing_to_say(linter: str, file: str) -> None:
    program = shutil.which(linter, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{linter} is not installed (the dev extra brings it)")
    checked = subprocess.run([program, str(ROOT / file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_every_direct_dependency_is_pinned() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    pins = re.findall(r"^([A-Za-z0-9._-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    missing = {canonical(re.split(r"[><=\[ ]", line)[0]) for line in wanted} - {canonical(pin) for pin in pins}
    assert not missing
