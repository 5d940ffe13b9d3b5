"""A run that is killed again and again, and what must be true of it in the end."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dispersion_pretrain import checkpoint
from integration.jobs import Job, pretrain_command, trajectory, write_config

CHAOTIC = Path(__file__).with_name("chaotic_pretrain.py")
NUM_STEPS = 60
SEQUENCES = 4  # of a global batch
SAVE_EVERY = 4
RANKS = 2
CRASH_LOOP = 87


@dataclass(frozen=True)
class Kill:
    """When and whom: after seconds or steps of a start, or before a write of a save, by the process itself."""

    who: str  # "one rank", "all ranks", "launcher", "job"
    after_s: float | None = None
    after_steps: int | None = None
    delay_s: float = 0.0  # from then on
    rank: int = 0
    point: int | None = None
    name: str = ""  # of the write


@dataclass(frozen=True)
class Outcome:
    """What came of a kill."""

    kill: Kill
    victim: str  # whom it met: before there are ranks it meets the launcher
    start: float  # when the killed start began
    log: Path  # of that start
    lost_steps: int = 0  # that had to be done again
    first_step_s: float | None = None  # of the next start, to its first update; None where it made none
    refused: int = 0  # starts that were refused with a cure (`Survivor.heeds_refusal`) before one was killed


class Survivor:
    """One run folder and all starts in it."""

    def __init__(self, folder: Path, corpus: Path, *, tiers: int = 2, **sections: dict[str, Any]) -> None:
        """Write its settings; `sections` are added to them."""
        self.folder, self.run = folder, folder / "run"
        folder.mkdir(parents=True)
        local = {"local_folder": str(folder / "disk"), "local_every_steps": 2}
        self.config = write_config(
            folder,
            corpus,
            **{"run": {"doctor": False}, **sections},
            training={"global_batch_tokens": SEQUENCES * 64, "max_tokens": NUM_STEPS * SEQUENCES * 64},
            dispersion={"pool_sequences": SEQUENCES},
            validation={"every_steps": 10, "sequences": 4},
            checkpoint={"every_steps": SAVE_EVERY, "keep_last": 2, **(local if tiers == 2 else {})},
        )
        self.starts, self.started_s = 0, 0.0
        self.outcomes: list[Outcome] = []
        self.seconds = 0.0  # of the start that came to the end
        self.processes: set[psutil.Process] = set()

    def start(self, **variables: str) -> Job:
        """The same command as ever; only the executioner's orders differ."""
        self.starts += 1
        command = [
            str(CHAOTIC) if word.endswith("launch/pretrain.py") else word for word in pretrain_command(self.config)
        ]
        self.started_s = time.monotonic()
        variables |= {"CHAOS_FOLDER": str(self.folder), "CHAOS_STARTED": repr(self.started_s)}
        job = Job(command, self.log, **variables)
        self.processes.add(psutil.Process(job.process.pid))
        return job

    @property
    def log(self) -> Path:
        return self.folder / f"log-{self.starts:03d}"

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What the witness wrote, by all starts in order."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def last_step(self) -> int:
        """The last step done, by whichever rank."""
        return max(
            (lines[-1]["step"] for rank in range(RANKS) if (lines := self.lines(f"samples_{rank}.jsonl"))), default=0
        )

    def is_done(self) -> bool:
        return NUM_STEPS in checkpoint.committed_steps(self.run)

    def steps_of(self, start: float) -> int:
        """How many steps a start has done; an orphan of an earlier one may be at work at the same time."""
        return sum(line["start"] == start for line in self.lines("samples_0.jsonl"))

    # ---- killing

    def strike(self, job: Job, kill: Kill, dice: random.Random) -> str | None:
        """Wait for the moment and kill; return whom, None if the start ended before. Waits for the end of the job.

        After the launcher's death nothing is waited for: its orphans meet the next start.
        """
        if kill.point is not None:
            job.wait()
            return None if job.process.returncode == 0 else kill.who  # also right after the run's last commit
        moment_s, steps = self.started_s + (kill.after_s or 0.0), kill.after_steps or 0
        while time.monotonic() < moment_s or self.steps_of(self.started_s) < steps:
            if job.process.poll() is not None:
                return None
            time.sleep(0.01)
        time.sleep(kill.delay_s)
        family = self.note_processes(job)
        ranks = [process for process in family if _is_rank(process)]
        if kill.who == "job":
            job.kill()
            return "job"
        if kill.who == "launcher" or not ranks:
            victim = dice.choice(
                [process for process in family if process.pid == job.process.pid or _is_launcher(process)]
            )
            victim.kill()
            if victim.pid == job.process.pid:
                job.process.wait(60)
            return "launcher"
        for victim in ranks if kill.who == "all ranks" else [dice.choice(ranks)]:
            if victim.is_running():
                victim.kill()
        job.wait()
        return kill.who

    def note_processes(self, job: Job) -> list[psutil.Process]:
        """The processes of a job that live now, the launcher first; remembered, so that none is forgotten alive."""
        try:
            top = psutil.Process(job.process.pid)
            family = [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.processes |= set(family)
        return family

    def suffer(self, kill: Kill, dice: random.Random) -> Outcome | None:
        """Start and kill; None where the start came to its end unharmed. `measured` completes what is returned."""
        sentence = {}
        if kill.point is not None:
            # The second save from here: the first clears away what the kill before has left. The third of a run at the
            # earliest: the first two have no older checkpoint to remove.
            step = SAVE_EVERY * max(3, -(-(self.last_step() + 1) // SAVE_EVERY) + 1)
            if step > NUM_STEPS:
                return None
            who = "job" if kill.who == "job" else "rank"
            sentence = {"CHAOS_KILL": f"{step} {kill.rank} {kill.point} {who}"}
        job = self.start(**sentence)
        refused = 0
        victim = self.strike(job, kill, dice)
        while self.heeds_refusal(job):
            refused += 1
            job = self.start(**sentence)
            victim = self.strike(job, kill, dice)
        if victim is None:
            assert job.process.returncode == 0, f"{kill}: ended with {job.process.returncode}:\n{job.output()}"
            return None
        self.outcomes.append(Outcome(kill, victim, self.started_s, self.log, refused=refused))
        return self.outcomes[-1]

    def heeds_refusal(self, job: Job) -> bool:
        """Whether a start was refused with a message that names the cure; a cure beyond another start is done here."""
        code = job.process.poll()
        if code == CRASH_LOOP:
            (self.run / "ends.jsonl").unlink()
            return True
        return code == 1 and "is at work in this run folder" in job.output()

    def finish(self, **variables: str) -> None:
        """The same command once more, to the end of the run; then nothing of any start may live on."""
        began_s = time.monotonic()
        while not self.is_done():
            job = self.start(**variables)
            code = job.wait()
            assert self.heeds_refusal(job) or code == 0, f"exit code {code}:\n{job.output()}"
        self.seconds = time.monotonic() - began_s
        # A start whose launcher was killed before it had ranks may have waited for another, and finds nothing to do.
        _, alive = psutil.wait_procs(self.processes, 120)
        assert not alive, f"live on: {alive}"

    # ---- what must be true

    def measured(self) -> list[Outcome]:
        """The kills, with the steps that each cost and the seconds until the next start had made an update."""
        lines, found = self.lines("samples_0.jsonl"), []
        for number, outcome in enumerate(self.outcomes):
            own = [line for line in lines if line["start"] == outcome.start]
            after = [line for line in lines if line["start"] > outcome.start]
            lost = own[-1]["step"] - (after[0]["step"] - 1) if own and after else 0
            next_kill = self.outcomes[number + 1].start if number + 1 < len(self.outcomes) else math.inf
            first_step_s = after[0]["after_s"] if after and after[0]["start"] <= next_kill else None
            found.append(replace(outcome, lost_steps=lost, first_step_s=first_step_s))
        return found

    def check(self, undisturbed: Survivor) -> None:
        """The figures and samples of every step and the state in the checkpoints are the undisturbed run's."""
        mine, theirs = trajectory(self.run), trajectory(undisturbed.run)
        wrong = [step for step in theirs if mine.get(step) != theirs[step]]
        assert not wrong and mine.keys() == theirs.keys(), f"{self.folder}: other figures at steps {wrong[:9]}"
        self.check_samples()
        kept, kept_undisturbed = (checkpoint.committed_steps(one.run) for one in (self, undisturbed))
        assert kept[-1] == NUM_STEPS
        for step in kept:  # those before the last may be of other steps: an orphan saves as it leaves
            own, other = (checkpoint.step_folder(one.run, step) for one in (self, undisturbed))
            assert checkpoint.verify(own) == [], own
            assert step not in kept_undisturbed or _hashes(own) == _hashes(other), f"{own}: another state"

    def check_samples(self) -> None:
        """Every position of the data stream went into exactly one update of the state that the run ended with.

        An update that a kill undid was made again from an older state, so the last record of a step counts. Each
        earlier one must name the same samples: what a kill undid is repeated, and nothing else takes its place.
        """
        used: list[int] = []
        for rank in range(RANKS):
            by_step: dict[int, list[list[int]]] = {}
            for line in self.lines(f"samples_{rank}.jsonl"):
                by_step.setdefault(line["step"], []).append(line["samples"])
            assert sorted(by_step) == list(range(1, NUM_STEPS + 1)), f"{self.folder}: steps are missing on rank {rank}"
            for step, records in by_step.items():
                assert all(record == records[-1] for record in records), f"rank {rank}, step {step}: {records}"
                used += records[-1]
        assert sorted(used) == list(range(NUM_STEPS * SEQUENCES)), f"{self.folder}: not every sample once"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_rank(process: psutil.Process) -> bool:
    return str(CHAOTIC) in _words(process)[2:3]


def _is_launcher(process: psutil.Process) -> bool:
    return "deepspeed.launcher.launch" in _words(process)


def _hashes(folder: Path) -> dict[str, str]:
    """Of the files that hold the state."""
    files = json.loads((folder / checkpoint.MANIFEST).read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items()}
