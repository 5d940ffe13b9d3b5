"""Programs that the tests of clusters need, installed from Debian's packages where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where daemons lie, whoever runs the tests

SLURM = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
SLURM_PLUGINS = ["slurm-wlm-basic-plugins"]
HOSTS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh", "unshare": "util-linux"}


def require(programs: dict[str, str], also: list[str] | None = None) -> None:
    """Install the packages of those programs that are missing, with `also` beside them.

    Raises:
        RuntimeError: they are missing and cannot be installed here; it names them.
    """
    missing = [package for program, package in programs.items() if shutil.which(program, path=PATH) is None]
    if not missing:
        return
    packages = [*missing, *(also or [])]
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.geteuid() != 0:
        install = ["sudo", "--non-interactive", *install]
    if shutil.which(install[0], path=PATH) is None:
        raise RuntimeError(
            f"{', '.join(missing)}: not installed, and {install[0]} is not there to do it. Install them."
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": PATH}
    done = subprocess.run(install, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{', '.join(missing)}: not installed, and `{' '.join(install)}` fails "
            f"({(done.stderr or done.stdout).strip()[-500:]}). Install them, or run the tests as root."
        )
