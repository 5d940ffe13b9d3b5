"""Processes that need not import the packages again: forked from a server of this interpreter that has.

Importing PyTorch, transformers, streaming and DeepSpeed takes a rank 6 to 8 s of a core; most tests with ranks need
less for all else. The ranks are processes of their own as ever: nothing has run in the server but imports.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PRELOADED = ["dispersion_pretrain.train", "dispersion_pretrain.doctor", "deepspeed"]


def warm_process(function: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Make a process that calls `function(*arguments)`, both picklable, once it is started.

    The environment is that of the first process started so: a function that needs another sets it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context.Process(target=function, args=arguments)


class WarmRanks:
    """A script on several ranks of this machine, or one process without a rank; in the manner of subprocess.Popen."""

    def __init__(self, script: list[str], ranks: int, *, cwd: Path, env: Mapping[str, str], log: Path) -> None:
        """Start `script`, its path and arguments. Output goes to `log`, at the end."""
        self.args = script
        self._process = warm_process(_launch, script, ranks, str(cwd), dict(env), str(log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while there is none."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode


def _launch(script: list[str], ranks: int, cwd: str, env: dict[str, str], log: str) -> None:
    os.setsid()
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(log, os.O_WRONLY | os.O_APPEND))):
        os.dup2(source, target)
    os.dup2(1, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if ranks == 1:
        _run(script)
    children = {}
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            _run(script)
        children[pid] = rank
    code = 0
    while children:  # as launchers do: the first failure ends the others and is the exit code
        pid, status = os.wait()
        del children[pid]
        if status and not code:
            code = os.waitstatus_to_exitcode(status) % 256
            for other in children:
                os.kill(other, signal.SIGTERM)
    os._exit(code)


def _run(script: list[str]) -> None:
    """What an interpreter does with a script, to its end."""
    sys.argv = list(script)
    sys.path.insert(0, str(Path(script[0]).parent))
    code: Any = 0
    try:
        runpy.run_path(script[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
