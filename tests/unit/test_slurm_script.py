"""The batch script: quoted, checked by shellcheck, and run against stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dispersion_pretrain import slurm
from dispersion_pretrain.cluster_file import ClusterSettings
from dispersion_pretrain.slurm_script import Origin, Submission, render_script, sbatch_options

ROOT = Path(__file__).resolve().parents[2]
NASTY = [
    "$(touch x)", "`touch x`", "two words", "it's", 'say "x"', "new\nline", "a;touch x", "*",
    "${HOME}", "back\\slash", "#c", "-rf", "é",
]  # fmt: skip

# Leaves its arguments, NUL-separated, then runs what follows the options, as srun does for each task.
FAKE_SRUN = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD/srun"
trap 'echo USR1 > "$RECORD/srun-signal"; got=1' USR1
echo $$ > "$RECORD/srun-pid"
while [ -e "$RECORD/hold" ] && [ -z "${got:-}" ]; do sleep 0.05; done
[ -n "${got:-}" ] && sleep 0.2
while [[ "$1" == --* ]]; do shift; done
SLURM_PROCID=3 SLURM_LOCALID=1 "$@"
exit "$SRUN_EXIT_CODE"
"""
FAKE_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'host7\\nhost8\\n'; else printf '%s\\n' "$*" >> "$RECORD/scontrol"; fi
"""
FAKE_PYTHON = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD/python"
{ printf '%s\\0' "$RANK" "$LOCAL_RANK" "$WORLD_SIZE" "$LOCAL_WORLD_SIZE"
  printf '%s\\0' "$MASTER_ADDR" "$MASTER_PORT" "$PWD"; } > "$RECORD/environment"
"""


def cluster(**changes: object) -> ClusterSettings:
    values: dict[str, object] = {
        "nodes": 2, "gpus_per_node": 2, "cpus_per_task": 3, "notice_s": 120, "max_requeues": 5,
    }  # fmt: skip
    return ClusterSettings.model_validate(values | changes)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Job:
    """A rendered script beside stand-ins for srun, scontrol and python that record how they were called."""

    def __init__(self, folder: Path, name: str = "plain", *, elements: int = 1, **changes: object) -> None:
        self.record = folder / "record"
        self.record.mkdir()
        self.working_folder = folder / name
        self.working_folder.mkdir()
        self.snapshot = self.working_folder / "config.yaml"
        self.python = executable(folder / f"bin {name}" / "python", FAKE_PYTHON)
        executable(folder / "slurm" / "srun", FAKE_SRUN)
        executable(folder / "slurm" / "scontrol", FAKE_SCONTROL)
        self.path = f"{folder / 'slurm'}:{os.environ['PATH']}"
        self.script = folder / "job.sh"
        self.run_folder = folder / "run"
        (self.run_folder / "slurm").mkdir(parents=True, exist_ok=True)
        runs = [Submission(self.run_folder, self.snapshot)] * elements
        wanted, origin = cluster(**changes), Origin(name, str(self.python), self.working_folder)
        options = sbatch_options(wanted, "t", self.run_folder / "slurm" / "%j.log", elements=elements)
        text = render_script(options, wanted, runs, origin)
        self.script.write_text(text, encoding="utf-8")

    def start(self, srun_exit_code: int = 0, **extra: str) -> subprocess.Popen[str]:
        environment = {
            "PATH": self.path, "RECORD": str(self.record), "SRUN_EXIT_CODE": str(srun_exit_code),
            "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "host[7-8]", **extra,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.script)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.record,
        )

    def run(self, srun_exit_code: int = 0, **extra: str) -> tuple[int, str]:
        process = self.start(srun_exit_code, **extra)
        output, _ = process.communicate(timeout=20)
        return process.returncode, output

    def signalled(self, number: signal.Signals, srun_exit_code: int) -> tuple[int, str]:
        (self.record / "hold").touch()
        process = self.start(srun_exit_code)
        deadline = time.monotonic() + 10
        while not (self.record / "srun-pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # srun runs before the script's traps are set, a moment later
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        return process.returncode, output

    def recorded(self, name: str) -> list[str]:
        return (self.record / name).read_text(encoding="utf-8").split("\0")[:-1]

    @property
    def requeues(self) -> list[str]:
        path = self.record / "scontrol"
        return path.read_text().splitlines() if path.exists() else []


def shellcheck() -> str:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed (the dev extra brings it)")
    return found


@pytest.mark.parametrize("name", NASTY)
def test_script_is_clean_and_its_values_arrive_unchanged(tmp_path: Path, name: str) -> None:
    job = Job(tmp_path, name)
    checked = subprocess.run([shellcheck(), str(job.script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout

    code, output = job.run()

    assert code == 0, output
    assert job.recorded("python") == [str(ROOT / "launch" / "pretrain.py"), "--config", str(job.snapshot)]
    assert job.recorded("environment")[-1] == str(job.working_folder)
    assert not list(tmp_path.rglob("x")), "a value was run as a command"


def test_script_starts_one_task_per_rank_with_its_numbers(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.run()
    assert job.recorded("environment")[:6] == ["3", "1", "4", "2", "host7", str(20000 + 12345 % 12000)]
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3", "--kill-on-bad-exit=0"} <= set(
        job.recorded("srun")
    )


def test_script_clears_the_locks_of_killed_builds_and_keeps_what_was_built(tmp_path: Path) -> None:
    lock = tmp_path / "run" / "slurm" / "torch_extensions" / "operator" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    lock.with_name("operator.so").touch()
    code, output = Job(tmp_path).run()
    assert code == 0, output
    assert [path.name for path in lock.parent.iterdir()] == ["operator.so"]


@pytest.mark.parametrize(
    ("exit_code", "restarts", "requeued"),
    [
        (0, None, False),
        (1, None, False),
        (87, None, False),
        (85, None, True),
        (85, "4", True),
        (85, "5", False),
        (86, None, True),
        (86, "5", False),
    ],  # fmt: skip
)
def test_only_ranks_that_ask_are_requeued_and_not_for_ever(
    tmp_path: Path, exit_code: int, restarts: str | None, requeued: bool
) -> None:
    job = Job(tmp_path, max_requeues=5)
    code, output = job.run(exit_code, **({} if restarts is None else {"SLURM_RESTART_COUNT": restarts}))
    assert code == exit_code, output
    assert job.requeues == (["requeue 12345"] if requeued else [])


@pytest.mark.parametrize(
    ("srun_exit_code", "ending", "expected"),
    [(137, {"exit_code": 86}, 86), (137, {"exit_code": 1}, 137), (137, None, 137), (0, {"exit_code": 86}, 0)],
)
def test_kill_of_a_rank_that_hangs_counts_as_a_hang(
    tmp_path: Path, srun_exit_code: int, ending: dict[str, int] | None, expected: int
) -> None:
    job = Job(tmp_path)
    if ending is not None:
        (tmp_path / "run" / "heartbeats").mkdir(parents=True)
        (tmp_path / "run" / "heartbeats" / "ending.json").write_text(json.dumps({"reason": "r", **ending}))
    code, output = job.run(srun_exit_code)
    assert code == expected, output
    assert job.requeues == (["requeue 12345"] if expected == 86 else [])


@pytest.mark.parametrize(
    ("number", "exit_code", "requeued"),
    [
        (signal.SIGUSR1, 85, True),
        (signal.SIGUSR1, 138, True),  # the notice came before the ranks could catch it
        (signal.SIGUSR1, 0, False),
        (signal.SIGTERM, 85, False),  # a person stopped it
    ],
)
def test_signals_reach_the_ranks_and_the_exit_code_is_that_of_srun(
    tmp_path: Path, number: signal.Signals, exit_code: int, requeued: bool
) -> None:
    job = Job(tmp_path)
    code, output = job.signalled(number, exit_code)
    assert code == exit_code, output
    assert (job.record / "srun-signal").exists()
    assert job.requeues == (["requeue 12345"] if requeued else [])


@pytest.mark.parametrize("name", [*sorted(slurm.VALUES), "mem"])
@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "1\n", "a b", 'a"', "a'", "a\\", "a#b", "$(touch x)"])
def test_sbatch_values_cannot_leave_their_line(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: "):
        slurm.option(name, value)


@pytest.mark.parametrize("name", sorted(slurm.VALUES))
def test_named_options_are_not_empty(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name}: "):
        slurm.option(name, "")


@pytest.mark.parametrize("name", ["wrap", "output", "requeue", "a b", "--mem", "mem\n#SBATCH"])
def test_options_that_the_script_sets_itself_and_odd_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="A long option of sbatch without its dashes"):
        cluster(sbatch={name: "1"})


@pytest.mark.parametrize("folder", ['/runs/a"b', "/runs/a\n#SBATCH --uid=0", "/runs/50%", "/runs/a\\b"])
def test_log_folder_that_sbatch_would_misread_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"run\.folder: "):
        sbatch_options(cluster(), "t", Path(folder) / "%j.log")


def test_sbatch_options_state_what_was_asked() -> None:
    named = {"partition": "gpu,big", "time": "1-12:00:00", "constraint": "(h100|h200)&ib", "reservation": "tuesday"}
    log = Path("/runs/two words/slurm/%j.log")
    wanted = cluster(**named, sbatch={"mem": "0", "exclusive": ""})
    options = sbatch_options(wanted, "run-1", log, dependency="afterok:7", elements=3, at_once=2)
    assert options == [
        "--job-name=run-1", *(f"--{name}={value}" for name, value in named.items()), "--mem=0", "--exclusive",
        "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3", "--gpus-per-node=2", "--array=0-2%2",
        "--dependency=afterok:7", "--kill-on-invalid-dep=yes",
        '--output="/runs/two words/slurm/%j.log"', "--open-mode=append", "--signal=B:USR1@120", "--requeue",
    ]  # fmt: skip
    plain = sbatch_options(cluster(gpus_per_node=0), "t", log)
    assert not any("gpus" in option or "array" in option or "dependency" in option for option in plain)


@pytest.mark.parametrize("index", ["0", "2"])
def test_element_of_an_array_is_requeued_by_its_index(tmp_path: Path, index: str) -> None:
    job = Job(tmp_path, elements=3)
    code, output = job.run(85, SLURM_ARRAY_JOB_ID="12345", SLURM_ARRAY_TASK_ID=index)
    assert code == 85, output
    assert job.requeues == [f"requeue 12345_{index}"]  # 12345 alone would be the whole array
    line = json.loads((job.run_folder / "slurm" / "requeues.jsonl").read_text())
    assert (line["job"], line["requeue"], line["exit_code"]) == (f"12345_{index}", 1, 85) and "asked" in line["reason"]


def test_job_whose_nodes_fail_again_and_again_is_left_alone(tmp_path: Path) -> None:
    job = Job(tmp_path, max_requeues=5)
    code, output = job.run(SLURM_RESTART_COUNT="6")
    assert code == 1 and "at most 5" in output
    assert not (job.record / "srun").exists()


NASTY_VALUE = " ".join(NASTY)


def test_exported_variables_and_setup_lines_reach_the_ranks(tmp_path: Path) -> None:
    record = f'printf %s "$NASTY" > {tmp_path}/setup; export NASTY=other'
    job = Job(tmp_path, export={"NASTY": NASTY_VALUE}, shell_setup=f"false; {record}; echo $UNSET")
    executable(job.python, '#!/bin/bash\nprintf %s "$NASTY" > "$RECORD/nasty"\n')
    checked = subprocess.run([shellcheck(), "-S", "warning", str(job.script)], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
    code, output = job.run(NASTY="before")
    assert code == 0, output
    assert (tmp_path / "setup").read_text() == "before"
    assert (job.record / "nasty").read_text() == NASTY_VALUE
    assert not list(tmp_path.rglob("x")), "a value was run as a command"


def test_container_of_pyxis_is_an_option_of_srun(tmp_path: Path) -> None:
    container = {"image": "/images/a b.sqsh", "mounts": ["/data"]}
    job = Job(tmp_path, container=container)
    executable(tmp_path / "slurm" / "python", FAKE_PYTHON)
    code, output = job.run()
    assert code == 0, output
    work, run = job.working_folder, job.run_folder
    assert [part for part in job.recorded("srun") if part.startswith("--container")] == [
        "--container-image=/images/a b.sqsh",
        f"--container-mounts={work}:{work},{run}:{run},/data",
        f"--container-workdir={work}",
    ]


def test_container_of_apptainer_wraps_each_rank(tmp_path: Path) -> None:
    container = {"image": "a b.sif", "runtime": "apptainer", "mounts": ["/data:/d"], "code": "/code"}
    job = Job(tmp_path, container=container)
    executable(tmp_path / "slurm" / "apptainer", '#!/bin/bash\nprintf "%s\\0" "$RANK" "$@" > "$RECORD/apptainer"\n')
    code, output = job.run()
    assert code == 0, output
    work, run = str(job.working_folder), str(job.run_folder)
    assert job.recorded("apptainer") == [
        "3", "exec", "--nv", "--bind", f"{work}:{work}", "--bind", f"{run}:{run}", "--bind", "/data:/d", "--pwd", work,
        "a b.sif", "python", "/code/launch/pretrain.py", "--config", str(job.snapshot),
    ]  # fmt: skip
