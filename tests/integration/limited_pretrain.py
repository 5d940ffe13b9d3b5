"""The main job, with less memory on one rank: MEMORY_LIMIT="RANK MIB", of what the kernel counts as data."""

from __future__ import annotations

import os
import resource
import runpy
from pathlib import Path

if __name__ == "__main__":
    rank, mib = os.environ["MEMORY_LIMIT"].split()
    if os.environ["RANK"] == rank:
        resource.setrlimit(resource.RLIMIT_DATA, (int(mib) * 2**20, int(mib) * 2**20))
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"), run_name="__main__")
