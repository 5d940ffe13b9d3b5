"""The same command on another number of ranks or ZeRO stage goes on, says what changed, and proves its first step."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.jobs import TINY_MODEL, Job, finish, pretrain_command, trajectory, write_config
from spawn import run_ranks

STEPS, EVERY = 24, 4
NO_DROPOUT = {**TINY_MODEL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def config_of(folder: Path, corpus: Path, **sections: dict[str, Any]) -> Path:
    return write_config(
        folder, corpus, model={"config": NO_DROPOUT}, training={"max_tokens": STEPS * 512, "micro_batch": None},
        checkpoint={"every_steps": EVERY, "keep_last": 20}, validation={"every_steps": STEPS},
        run={"doctor": False}, **sections,
    )  # fmt: skip


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chain_of_world_sizes_and_stages(corpus: Path, tmp_path: Path) -> None:
    undisturbed = config_of(tmp_path / "undisturbed", corpus)
    finish(pretrain_command(undisturbed, "zero.stage=2", launcher="warm"), tmp_path / "undisturbed" / "log")
    config, run = config_of(tmp_path, corpus), tmp_path / "run"

    def run_to(step: int, *arguments: str, ranks: int, launcher: str) -> str:
        """Kill it once the checkpoint of `step` is committed and the step after it known; it becomes the newest."""
        job = Job(pretrain_command(config, *arguments, ranks=ranks, launcher=launcher), tmp_path / f"log{step}")
        committed = run / "checkpoints" / f"step-{step:08d}" / "COMMITTED"
        known = run / "certificates" / f"step-{step:08d}.json"
        job.wait_for(lambda: committed.exists() and known.exists(), 300)
        job.kill()
        for later in range(step + EVERY, STEPS + 1, EVERY):
            shutil.rmtree(run / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
        return job.output()

    run_to(4, "zero.stage=2", ranks=2, launcher="deepspeed")
    on_one_rank = pretrain_command(config, "zero.stage=3", ranks=1, launcher="warm")

    # Killed while it reads what two ranks had written: nothing is left behind, and it starts again.
    before = sorted((run / "checkpoints").rglob("*"))
    job = Job(on_one_rank, tmp_path / "log_killed")
    job.wait_for(lambda: "resume: step 4 " in job.output())
    job.kill()
    assert sorted((run / "checkpoints").rglob("*")) == before

    # A certificate with another figure ends the run before anything is saved.
    path = run / "certificates" / "step-00000004.json"
    whole = path.read_text()
    edit_json(path, lambda content: content["figures"].update({"grad_norm": content["figures"]["grad_norm"] * 1.01}))
    output = finish(on_one_rank, tmp_path / "log_refused", expected=1)
    assert f"error: {path}: step 5: grad_norm is" in output and "on_mismatch=warn" in output, output
    assert sorted((run / "checkpoints").rglob("*")) == before
    path.write_text(whole)

    outputs = {
        "2 -> 1": run_to(12, "zero.stage=3", ranks=1, launcher="warm"),
        "1 -> 4": run_to(16, "zero.stage=1", ranks=4, launcher="torchrun"),
        "4 -> 2": finish(pretrain_command(config, "zero.stage=2", launcher="warm"), tmp_path / "log_end"),
    }
    for (change, output), stages in zip(outputs.items(), ("2 -> 3", "3 -> 1", "1 -> 2"), strict=True):
        assert f"resume: world size {change}\n" in output and f"resume: zero.stage {stages}\n" in output, output
        assert re.search(rf"resume: (within \de-\d|exact) \(world size {change}, micro-batch", output), output

    expected, found = trajectory(tmp_path / "undisturbed" / "run"), trajectory(run)
    assert sorted(found) == sorted(expected) == list(range(STEPS + 1))
    worst = 0.0
    for step in range(1, STEPS + 1):
        for key in ("loss/total", "loss/cross_entropy", "loss/dispersion", "grad_norm"):
            worst = max(worst, abs(found[step][key] / expected[step][key] - 1))
    print(f"2 -> 1 -> 4 -> 2: largest relative difference {worst:.1e}")
    assert worst < 1e-4


# ---- the certificate, in one process


def flip_manifest(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the certificate in a manifest, and the marker with it."""
    edit_json(folder / "manifest.json", lambda manifest: change(manifest["extra"]["certificate"]))
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "COMMITTED").write_text(digest)


def resumes_on_rank(config: str, folder: str) -> dict[str, tuple[str, str]]:
    """Run to the end; then resume from step 4 again and again, each time with another thing changed."""
    from dispersion_pretrain.settings_file import load_settings
    from dispersion_pretrain.train import run
    from dispersion_pretrain.watchdog import Watchdog

    watchdog = Watchdog(None, rank=0, world_size=1)

    def resume(name: str, *overrides: str, edit: Callable[[Path], object] = lambda run_folder: None) -> None:
        case = Path(folder) / name
        shutil.copytree(Path(folder) / "whole", case)
        shutil.rmtree(case / "checkpoints" / "step-00000008")
        edit(case)
        error, printed = "", io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                run(load_settings(Path(config), [*overrides, f"run.folder={case}"]), watchdog)
            except RuntimeError as caught:
                error = str(caught)
        found[name] = (printed.getvalue(), error)

    def figure(name: str, by: float) -> Callable[[Path], None]:
        def edit(case: Path) -> None:
            path = case / "certificates" / "step-00000004.json"
            edit_json(path, lambda record: record["figures"].update({name: record["figures"][name] * (1 + by)}))

        return edit

    def promised(key: str, value: Any) -> Callable[[Path], None]:
        return lambda case: flip_manifest(case / "checkpoints" / "step-00000004", lambda all: all.update({key: value}))

    def replaced(text: str) -> Callable[[Path], object]:
        return lambda case: (case / "certificates" / "step-00000004.json").write_text(text)

    def last_digits_of_another_cpu(case: Path) -> None:
        promised("layout", {"micro-batch": 4, "device": "another CPU"})(case)
        figure("grad_norm", 1e-6)(case)

    found: dict[str, tuple[str, str]] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        run(load_settings(Path(config), [f"run.folder={folder}/whole"]), watchdog)
    resume("unchanged")
    for name in ("loss/total", "loss/cross_entropy", "loss/dispersion", "grad_norm"):
        resume(name.replace("/", "_"), edit=figure(name, 1e-15 if name != "grad_norm" else 1e-7))
    resume("samples", edit=promised("samples", "0"))
    resume("random_state", edit=promised("random_state", ["0"]))
    resume("warned", "checkpoint.on_mismatch=warn", edit=figure("grad_norm", 0.1))
    resume("another_checkpoint", edit=promised("identity", "0"))
    resume("garbled", edit=replaced("{"))
    resume("missing", edit=lambda case: shutil.rmtree(case / "certificates"))
    resume(
        "on_purpose", "dispersion.coefficient=0.2", "optimizer.weight_decay=10.0", "optimizer.gradient_clipping=0.01"
    )
    resume("another_cpu", edit=last_digits_of_another_cpu)
    resume("layout", "training.micro_batch=8", "zero.stage=3")
    resume("layout_apart", "training.micro_batch=8", edit=figure("loss/total", 2e-4))
    return found


@pytest.fixture(scope="module", params=[0.0, 0.1], ids=["plain", "dropout"])
def resumed(
    request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[str, str]], bool]:
    folder = tmp_path_factory.mktemp("resumed")
    model = {**NO_DROPOUT, "resid_pdrop": request.param}
    config = write_config(
        folder, corpus, model={"config": model}, training={"max_tokens": 8 * 512, "micro_batch": 4},
        run={"doctor": False}, validation=None, checkpoint={"every_steps": 4, "keep_last": 20},
    )  # fmt: skip
    (found,) = run_ranks(resumes_on_rank, 1, str(config), str(folder), timeout_s=280)
    return folder, found, request.param > 0


Resumed = tuple[Path, dict[str, tuple[str, str]], bool]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_field_of_the_certificate_is_compared(resumed: Resumed) -> None:
    folder, found, _ = resumed
    assert found["unchanged"][1] == "" and "resume: exact\n" in found["unchanged"][0], found["unchanged"]
    assert trajectory(folder / "unchanged") == trajectory(folder / "whole")
    for name in ("loss/total", "loss/cross_entropy", "loss/dispersion", "grad_norm"):
        error = found[name.replace("/", "_")][1]
        assert f"step 5: {name} is" in error and error.count(" and was ") == 1, error
    assert "the hash of the next 4 steps' samples is" in found["samples"][1]
    assert "the hash of rank 0's random state is" in found["random_state"][1]
    for name in ("grad_norm", "samples"):
        assert not (folder / name / "checkpoints" / "step-00000008").exists(), "a mismatch ends a run before it saves"
    assert found["warned"][1] == "" and (folder / "warned" / "checkpoints" / "step-00000008").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_cannot_be_compared_is_said(resumed: Resumed) -> None:
    folder, found, has_dropout = resumed
    for name in ("another_checkpoint", "garbled", "missing"):
        printed, error = found[name]
        assert error == "" and "resume: data and random state exact; the next step was not known\n" in printed, printed
        record = json.loads((folder / name / "certificates" / "step-00000004.json").read_text())
        assert record["figures"]["grad_norm"] == trajectory(folder / "whole")[5]["grad_norm"], "then it is known"
        assert record["random_numbers"] is has_dropout
    printed, error = found["on_purpose"]
    assert (
        "resume: dispersion.coefficient 0.1 -> 0.2\n" in printed and "losses are not compared" in printed and not error
    )
    printed, error = found["another_cpu"]
    device = re.search(r"device another CPU -> [^\n]+\)", printed)
    assert not error and device is not None, (error, printed)
    if has_dropout:
        assert f"dropout draws other numbers ({device.group()}" in printed
    else:
        assert f"resume: within 1e-6 ({device.group()}" in printed
    printed, error = found["layout"]
    assert "resume: micro-batch 4 -> 8\n" in printed and "resume: zero.stage 2 -> 3\n" in printed and not error
    if has_dropout:
        assert "dropout draws other numbers (micro-batch 4 -> 8)" in printed
    else:
        assert re.search(r"resume: (within \de-\d|exact) \(micro-batch 4 -> 8, zero.stage 2 -> 3\)\n", printed), printed
        assert "loss/total is" in found["layout_apart"][1] and "at most 0.0001" in found["layout_apart"][1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_changed_optimizer_settings_act(resumed: Resumed) -> None:
    folder = resumed[0]
    whole, changed = trajectory(folder / "whole"), trajectory(folder / "on_purpose")
    assert changed[5]["loss/cross_entropy"] == whole[5]["loss/cross_entropy"]
    assert abs(changed[6]["loss/cross_entropy"] - whole[6]["loss/cross_entropy"]) > 1e-3, "the update was another"
