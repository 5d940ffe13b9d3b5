"""Builds the CPU image of docker/Dockerfile and runs commands in it, without a Docker engine and without a registry.

The base image is made from Debian's packages under the name that the Dockerfile would pull. pip and apt in the build
see what this machine's own see: their settings and the local folders that those name.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

BASE = "docker.io/library/python:3.11-slim-bookworm"
_PROGRAMS = {
    "buildah": "buildah",
    "podman": "podman",
    "mmdebstrap": "mmdebstrap",
    "runc": "runc",
    "newuidmap": "uidmap",
}
_APT = ("/etc/apt/sources.list", "/etc/apt/sources.list.d", "/etc/apt/apt.conf.d", "/usr/share/keyrings")


def install_tools() -> None:
    """Install what is missing from Debian's packages.

    Raises:
        RuntimeError: this is not root, or apt-get fails.
    """
    missing = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program) is None})
    if not missing:
        return
    if os.geteuid() != 0:
        raise RuntimeError(f"{', '.join(missing)}: not installed, and only root can. Install them.")
    _run(["apt-get", "install", "--yes", "--no-install-recommends", *missing])


def make_base() -> None:
    """Make the base image: Debian 12 with its Python, in place of the one on the hub. Minutes, the first time."""
    if subprocess.run(["podman", "image", "exists", BASE], check=False).returncode == 0:
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = f"{folder}/base.tar"
        _run(["mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,python3-dev,ca-certificates",
              "bookworm", tree])  # fmt: skip
        _run(["podman", "import", tree, BASE])


def build(root: Path, name: str) -> None:
    """Build `root`'s CPU image under a name; layers of an earlier build are used again."""
    with tempfile.TemporaryDirectory() as folder:
        mounts = [option for source, target in _package_settings(Path(folder)) for option in
                  ("--volume", f"{source}:{target}:ro")]  # fmt: skip
        _run(["buildah", "bud", "--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker",
              "--layers", "--build-arg", f"BASE_IMAGE={BASE}", *mounts, "--file", str(root / "docker" / "Dockerfile"),
              "--tag", name, str(root)])  # fmt: skip


def run(name: str, command: list[str], mounts: Mapping[Path, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a container without a network; `mounts` are folders of this machine by their place in it."""
    volumes = [option for source, target in mounts.items() for option in ("--volume", f"{source}:{target}")]
    return subprocess.run(
        ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "run", "--rm", "--no-healthcheck",
         "--network", "none", "--ulimit", "nofile=1024:4096", "--ulimit", "nproc=4096:8192", "--env",
         "OMP_NUM_THREADS=1", *volumes, name, *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _package_settings(folder: Path) -> list[tuple[str, str]]:
    """(path here, path in the build) of the settings of pip and apt, and of the local folders that pip's name."""
    lines = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    settings: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition("=")
        key, text = name.split(".")[-1], value.strip("'\"")
        if key != "constraint":  # the image has the repository's own
            settings.setdefault(key, []).extend(part for part in text.split() if part not in settings.get(key, []))
    (folder / "pip.conf").write_text(
        "[global]\n" + "".join(f"{key} = {' '.join(values)}\n" for key, values in settings.items())
    )
    text = "\n".join(" ".join(values) for values in settings.values())
    folders = {str(Path(path)) for path in re.findall(r"(?<![\w:/])(/[^\s]+)", text) if Path(path).exists()}
    # The pages of an index link to files that lie beside them.
    folders |= {str(Path(path).parent) for path in re.findall(r"file://(/[^\s]+)", text) if Path(path).exists()}
    local = sorted(folders - {"/"})
    own = [path for path in (*_APT, *local) if Path(path).exists()]
    return [(str(folder / "pip.conf"), "/etc/pip.conf"), *((path, path) for path in own)]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command[:3])} ... ends with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}"
        )
