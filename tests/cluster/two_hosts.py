"""Two hosts on one machine: namespaces with addresses, names, processes and sshd of their own, and a cable between.

Nothing outside them is changed: their /etc/hosts, ssh_config, /run and /dev/shm are mounts that only they see.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil

from cluster.debian_packages import HOSTS, PATH, require
from cluster.slurm_cluster import wait_for
from s3_server import die_with_parent

_BOOT = """\
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/ssh_config" /etc/ssh/ssh_config &&
mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount -t tmpfs -o size=256m tmpfs /dev/shm &&
exec /usr/sbin/sshd -D -e -f "$2/sshd_config-$1"
"""
_SSHD = """\
Port 22
ListenAddress {address}
HostKey {folder}/host_key
PidFile none
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PasswordAuthentication no
UsePAM no
UseDNS no
"""
# ServerAlive: without it a launcher would wait for a host that a cut link took from it until TCP gives up.
_SSH = """\
Host *
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 3
  ServerAliveCountMax 3
"""


class TwoHosts:
    """`left` (10.78.0.1) and `right` (10.78.0.2). Needs root."""

    names = ("left", "right")

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self._spaces = {name: f"{name}{os.getpid()}" for name in self.names}
        self._anchors: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> TwoHosts:
        if os.geteuid() != 0:
            raise RuntimeError("two hosts: root is needed for network namespaces. Run as root.")
        require(HOSTS)
        try:
            self._write_files()
            for space in self._spaces.values():
                _run("ip", "netns", "add", space)
            left, right = self._spaces.values()
            _run("ip", "link", "add", "cable", "netns", left, "type", "veth", "peer", "name", "cable", "netns", right)
            for number, (name, space) in enumerate(self._spaces.items(), start=1):
                _run("ip", "-n", space, "addr", "add", f"10.78.0.{number}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    _run("ip", "-n", space, "link", "set", device, "up")
                self._boot(name)
            for name in self.names:
                there = self.command("left", "ssh", name, "true")
                wait_for(lambda there=there: subprocess.run(there, capture_output=True).returncode == 0, 30)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _write_files(self) -> None:
        addresses = {name: f"10.78.0.{number}" for number, name in enumerate(self.names, start=1)}
        for key in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / key))
        public = " ".join((self.folder / "host_key.pub").read_text().split()[:2])
        lines = {
            "hosts": "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items()),
            "known_hosts": "".join(f"{name},{address} {public}\n" for name, address in addresses.items()),
            "ssh_config": _SSH.format(folder=self.folder),
            "hostfile": "".join(f"{name} slots=1\n" for name in self.names),
        }
        for name, address in addresses.items():
            lines[f"sshd_config-{name}"] = _SSHD.format(address=address, folder=self.folder)
        for file, text in lines.items():
            (self.folder / file).write_text(text)

    def _boot(self, name: str) -> None:
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"{name}.log", "ab") as log:
            self._anchors[name] = subprocess.Popen(
                ["ip", "netns", "exec", self._spaces[name], *unshare, "sh", "-c", _BOOT, "sh", name, str(self.folder)],
                env={**os.environ, "PATH": PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        wait_for(lambda: bool(self._first(name)), 10)

    def _first(self, name: str) -> list[psutil.Process]:
        """The host's process 1, as seen from outside."""
        return psutil.Process(self._anchors[name].pid).children()

    def command(self, name: str, *command: str) -> list[str]:
        """What runs a command on a host, in this folder and with this environment."""
        target = str(self._first(name)[0].pid)
        spaces = ["--net", "--uts", "--mount", "--pid"]
        return ["nsenter", "--target", target, *spaces, f"--wd={os.getcwd()}", "--", *command]

    def processes(self, name: str, text: str) -> list[psutil.Process]:
        """A host's living processes with `text` in their command line."""
        space = os.readlink(f"/proc/{self._first(name)[0].pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if here and text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def plug(self, state: str) -> None:
        """Cut the cable (`down`), or heal it (`up`)."""
        _run("ip", "-n", self._spaces["right"], "link", "set", "cable", state)

    def stop(self) -> None:
        """End both hosts with all that runs on them."""
        for anchor in self._anchors.values():
            for process in psutil.Process(anchor.pid).children() if anchor.poll() is None else []:
                process.kill()
            anchor.wait(10)
        for space in self._spaces.values():
            subprocess.run(["ip", "netns", "del", space], env={**os.environ, "PATH": PATH}, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def _run(*command: str) -> None:
    subprocess.run(command, env={**os.environ, "PATH": PATH}, check=True)
