"""The CPU image, really built, and a dry run and five steps of training in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import container_image
from small_run import small_settings, write_corpus

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "dispersion-pretrain:test"
USER = 10001
STEPS = 5

pytestmark = [pytest.mark.container, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def image() -> str:
    container_image.install_tools()
    container_image.make_base()
    container_image.build(ROOT, IMAGE)
    return IMAGE


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, str]]:
    """A corpus and a configuration to read, and a folder for runs that the image's user may write."""
    folder = tmp_path_factory.mktemp("container")
    for above in (folder, *folder.parents):
        if above.owner() == folder.owner() and above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o055)
    data, runs = folder / "data", folder / "runs"
    write_corpus(data / "corpus", ["A line of text to learn from, again and again. " * 60])
    settings = small_settings(Path("/data/corpus")).model_dump(mode="json")
    length = settings["data"]["sequence_length"]
    settings["run"] |= {"name": "five"}
    settings["zero"]["stage"] = 2
    settings["training"] |= {"global_batch_tokens": 4 * length, "max_tokens": 4 * length * STEPS}
    settings["dispersion"] = {"pool_sequences": 4, "tokens_per_sequence": 8}
    (data / "five.yaml").write_text(yaml.safe_dump(settings))
    runs.mkdir()
    os.chown(runs, USER, USER)
    yield {data: "/data:ro", runs: "/runs"}
    shutil.rmtree(folder, ignore_errors=True)


def test_a_dry_run_in_the_image(image: str, mounts: dict[Path, str]) -> None:
    command = ["python", "launch/pretrain.py", "--config", "/data/five.yaml", "--dry-run", "--ranks", "2"]
    done = container_image.run(image, command, mounts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks x 2 micro-batch x 1 accumulation" in done.stdout


def test_five_steps_in_the_image(image: str, mounts: dict[Path, str]) -> None:
    command = ["torchrun", "--nproc_per_node", "2", "launch/pretrain.py", "--config", "/data/five.yaml"]
    done = container_image.run(image, command, mounts)
    assert done.returncode == 0, done.stdout + done.stderr
    (runs,) = (folder for folder, place in mounts.items() if place == "/runs")
    records = [json.loads(line) for line in (runs / "five" / "metrics.jsonl").read_text().splitlines()]
    assert max(record["step"] for record in records) == STEPS
    (checkpoint,) = (runs / "five" / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == STEPS
    assert checkpoint.stat().st_uid == USER


def test_nobody_is_root_in_the_image(image: str) -> None:
    done = container_image.run(image, ["sh", "-c", "id -u; touch /etc/x 2>&1 || echo refused"], {})
    assert done.stdout.splitlines()[0] == str(USER)
    assert done.stdout.splitlines()[-1] == "refused"
