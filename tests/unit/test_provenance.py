"""The state of the code that is kept with a submission."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

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
