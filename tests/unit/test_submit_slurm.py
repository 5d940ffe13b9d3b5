"""Submissions: what is refused before the queue, what is kept of each, sweeps, and cluster files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dispersion_pretrain import submission
from dispersion_pretrain.cluster_file import load_cluster
from dispersion_pretrain.settings_file import load_settings
from launch import submit_slurm
from unit.test_slurm_script import ROOT, executable, shellcheck

CONFIG = """
run: {name: tiny-run}
model: {config: {model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 2}}
data: {corpus: data/corpus, sequence_length: 256}
training: {global_batch_tokens: 4096, max_tokens: 40960}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with config.yaml in it and an sbatch on the path that records what it was given."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    executable(
        tmp_path / "bin" / "sbatch",
        '#!/bin/bash\nprintf "%s\\0" "$@" > "$RECORD/sbatch"\necho "77;cluster"\n',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ["--config", "config.yaml", "--nodes", "2", "--gpus-per-node", "2"]


def test_submission_keeps_the_resolved_settings_beside_its_script(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = "data/$(touch x) it's; `touch x`"
    assert submit_slurm.main([*ARGUMENTS, "--override", "run.seed=7", f"data.corpus={corpus}"]) == 0
    flag, script = (project / "sbatch").read_text().split("\0")[:2]
    settings = load_settings(Path(script).parent / "config.yaml")
    assert (flag, settings.run.seed, settings.data.corpus) == ("--parsable", 7, corpus)
    assert Path(script).parent.parent == project / "runs" / "tiny-run" / "slurm"
    assert f"\nconfig={script[: -len('job.sh')]}config.yaml\n" in Path(script).read_text()
    assert "#SBATCH --job-name=tiny-run\n" in Path(script).read_text()
    printed = capsys.readouterr().out
    for needed in (
        "77",
        str(project / "runs" / "tiny-run"),
        "launch/runs.py",
        str(project / "runs" / "tiny-run" / "slurm" / "77.log"),
        "scancel --batch --signal=TERM 77",
        "2 nodes, 4 ranks",
    ):
        assert needed in printed


def test_dry_run_prints_the_script_and_leaves_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(project.rglob("*"))
    assert submit_slurm.main([*ARGUMENTS, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny-run\n")
    assert sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--nodes", "3"], "training.global_batch_tokens"),
        (["--ranks-per-node", "1"], "ranks_per_node: 1 with 2 GPUs a node"),
        (["--export", "NAME"], "--export: 'NAME' has no value"),
        (["--export", "A B=1"], "export.A B"),
        (["--export", "HF_TOKEN=hf_x"], "looks like a secret"),
        (["--after", "7;8"], "--after: '7;8'"),
        (["--array", "3-1"], "--array: '3-1'"),
        (["--array", "1", "0-2"], "seed 1 is there twice"),
        (["--config", "config.yaml", "config.yaml"], "would be that of 2 runs"),
        (["--cluster", "absent.yaml"], "absent.yaml: no such file"),
        (["--partition", "a\nb"], "--partition"),
        (["--override", "run.sed=1"], "run.sed"),
    ],
)
def test_what_cannot_run_is_refused_before_the_queue(
    project: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    assert submit_slurm.main([*ARGUMENTS, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (project / "sbatch").exists()


def test_refusal_of_sbatch_is_reported_in_its_own_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    executable(project / "bin" / "sbatch", "#!/bin/bash\necho 'invalid partition specified' >&2\nexit 1\n")
    assert submit_slurm.main(ARGUMENTS) == 2
    assert "invalid partition specified" in capsys.readouterr().err


def test_ranks_on_cpus_are_counted_by_hand(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--config",
        "config.yaml",
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--ranks-per-node",
        "4",
        "--dry-run",
    ]
    assert submit_slurm.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "WORLD_SIZE=8 LOCAL_WORLD_SIZE=4" in printed
    assert "--gpus" not in printed


def test_sweep_is_one_array_with_a_run_an_element(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "other.yaml").write_text(CONFIG.replace("tiny-run", "other"))
    arguments = ["--config", "config.yaml", "other.yaml", *ARGUMENTS[2:], "--array", "5", "8-9", "--at-once", "2"]
    assert submit_slurm.main([*arguments, "--after", "11", "any:12"]) == 0
    script = Path((project / "sbatch").read_text().split("\0")[1])
    names = [f"{name}-seed{seed}" for name in ("tiny-run", "other") for seed in (5, 8, 9)]
    folders = [project / "runs" / name for name in names]
    assert script.is_relative_to(project / "runs" / "sweeps")
    text = script.read_text()
    assert "#SBATCH --array=0-5%2\n" in text and "#SBATCH --dependency=afterok:11,afterany:12\n" in text
    printed = capsys.readouterr().out
    for index, (folder, name) in enumerate(zip(folders, names, strict=True)):
        (snapshot,) = folder.glob("slurm/*/config.yaml")
        settings = load_settings(snapshot)
        assert (settings.run.name, settings.run.seed) == (name, int(name[-1]))
        (record,) = submission.read_records(folder)
        assert record["job"] == f"77_{index}" and record["log"] == str(script.parent / f"77_{index}.log")
        assert f"{folder}  (77_{index})" in printed
    assert text.index(str(folders[1])) < text.index(str(folders[2]))  # an element's number is its place


def test_second_job_for_a_run_is_refused_unless_it_waits_for_the_first(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_slurm.main(ARGUMENTS) == 0
    executable(project / "bin" / "squeue", "#!/bin/bash\necho '77 RUNNING 0 None'\n")
    (project / "sbatch").unlink()
    assert submit_slurm.main(ARGUMENTS) == 2
    assert "job 77 of this run is in the queue (RUNNING)" in capsys.readouterr().err
    assert not (project / "sbatch").exists()
    assert submit_slurm.main([*ARGUMENTS, "--after", "any:77"]) == 0


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_shipped_cluster_files_are_whole_scripts(project: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    cluster_file = str(ROOT / "configs" / "cluster" / f"{name}.yaml")
    arguments = ["--config", "config.yaml", "--cluster", cluster_file, "--override", "evaluation.via=slurm"]
    assert submit_slurm.main([*arguments, "--nodes", "1", "--partition", "mine"]) == 0
    script = Path((project / "sbatch").read_text().split("\0")[1])
    text, defaults = script.read_text(), load_cluster(Path(cluster_file), {})
    assert "#SBATCH --nodes=1\n" in text and "#SBATCH --partition=mine\n" in text, "the command line goes first"
    assert f"#SBATCH --time={defaults.time}\n" in text
    assert load_settings(script.with_name("config.yaml")).evaluation.sbatch == defaults.evaluation
    checked = subprocess.run([shellcheck(), str(script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    capsys.readouterr()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partitoin: x", "unknown key, with the value 'x'. Did you mean partition?"),
        ("time: 24:00:00", "time: 86400 is not allowed"),  # YAML's number of base 60
        ("sbatch: {wrap: x}", "sbatch.wrap: is not allowed"),
        ("partition: a b", "--partition: 'a b' is not allowed"),
        ("export: {HF_TOKEN: x}", "looks like a secret"),
        ("container: {runtime: docker}", "container.runtime: 'docker' is not allowed"),
        ("evaluation: {output: x}", "sbatch.output: is not allowed"),
    ],
)
def test_fault_of_a_cluster_file_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_cluster(file, {})
    assert message in str(caught.value) and "site.yaml" in str(caught.value)
