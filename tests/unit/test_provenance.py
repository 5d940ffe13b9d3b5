"""The state of the code that is kept with a submission, and the names of devices."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from dispersion_pretrain import provenance


def test_code_state_brings_the_code_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str, cwd: Path) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(["git", *identity, *arguments], cwd=cwd, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    code, kept, copy = tmp_path / "code", tmp_path / "kept", tmp_path / "copy"
    for folder in (code / "package", kept):
        folder.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(code / "package" / "provenance.py"))
    provenance.save_code_state(kept)
    assert "no git repository" in (kept / "code.txt").read_text()

    git("init", "-q", cwd=code)
    (code / "package" / "old.py").write_text("a = 1\n")
    git("add", ".", cwd=code)
    git("commit", "-qm", "first", cwd=code)
    provenance.save_code_state(kept)
    assert (kept / "code.txt").read_text() == f"commit: {git('rev-parse', 'HEAD', cwd=code)}\n"
    (code / "package" / "old.py").write_text("a = 2\n")
    (code / "new é.bin").write_bytes(bytes(range(256)))
    (code / "large").write_bytes(bytes(2**20 + 1))
    before = git("status", "--porcelain", cwd=code)
    provenance.save_code_state(kept)
    assert git("status", "--porcelain", cwd=code) == before, "the index is left alone"
    commit, large, changes = (kept / "code.txt").read_text().splitlines()
    assert large == f"left out, {2**20 + 1} bytes: large" and changes == "changes: code.diff"
    git("clone", "-q", str(code), str(copy), cwd=tmp_path)
    git("checkout", "-q", commit.removeprefix("commit: "), cwd=copy)
    git("apply", str(kept / "code.diff"), cwd=copy)
    assert (copy / "package" / "old.py").read_text() == "a = 2\n"
    assert (copy / "new é.bin").read_bytes() == bytes(range(256))


def test_devices_are_named_by_what_decides_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    own = provenance.device_name(cpu)
    assert own.endswith(f"{torch.backends.cpu.get_cpu_capability()})")
    assert provenance.device_name(gpu) == "GPU 3"
    assert provenance.device_name(gpu, with_processor=True) == f"GPU 3, {own}"
    several = "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: A CPU\n\nmodel name\t: B\n"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: several)
    assert provenance.device_name(cpu) == "A CPU (family 6, model 143, AVX2)"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    assert provenance.device_name(cpu).endswith(" (AVX2)")
