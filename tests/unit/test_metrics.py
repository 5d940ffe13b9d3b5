"""dispersion_pretrain.metrics: sums, files, terminal lines, speed and memory."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dispersion_pretrain import metrics

# ---- sums


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files by name; of one process and second they differ in a count, and 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def test_totals_are_weighted_means_and_start_anew() -> None:
    totals = metrics.StepTotals()
    totals.add("loss/cross_entropy", torch.tensor(30.0, requires_grad=True), torch.tensor(10))
    totals.add("loss/cross_entropy", torch.tensor(2.0), torch.tensor(6))
    totals.add("grad_norm", torch.tensor(1.0))
    totals.add("grad_norm", torch.tensor(4.0))
    totals.add(["cosine/layer_01", "cosine/layer_02"], torch.tensor([0.5, 1.0]), 2)
    totals.add("never", torch.tensor(0.0), 0)
    means = totals.reduce()
    assert math.isnan(means.pop("never"))
    assert means == {
        "loss/cross_entropy": 2.0,
        "grad_norm": 2.5,
        "cosine/layer_01": 0.25,
        "cosine/layer_02": 0.5,
    }
    assert totals.reduce() == {}
    totals.add("grad_norm", torch.tensor(7.0))
    assert totals.reduce() == {"grad_norm": 7.0}


def test_totals_do_not_change_with_the_tensors_that_were_added() -> None:
    totals = metrics.StepTotals()
    value, count = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    totals.add("a", value, count)
    value.fill_(100)
    count.fill_(50)
    assert totals.reduce() == {"a": 1.0}


def test_totals_take_in_others_and_leave_them_as_they_are() -> None:
    totals, other = metrics.StepTotals(), metrics.StepTotals()
    totals.add("a", torch.tensor(1.0))
    other.add("a", torch.tensor(3.0))
    other.add(["b", "c"], torch.tensor([4.0, 6.0]), 2)
    totals.merge(other)
    totals.add(["b", "c"], torch.tensor([2.0, 0.0]), 1)
    assert totals.reduce() == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert other.reduce() == {"a": 3.0, "b": 2.0, "c": 3.0}


def test_totals_count_tokens_beyond_float32() -> None:
    totals = metrics.StepTotals()
    totals.add("a", torch.tensor(2.0**24), 1)
    totals.add("a", torch.tensor(1.0), 0)
    assert totals.reduce() == {"a": 2.0**24 + 1}


def test_totals_refuse_a_vector_of_another_length() -> None:
    with pytest.raises(ValueError, match="a, b: 3 values for 2 names"):
        metrics.StepTotals().add(["a", "b"], torch.ones(3))


# ---- files

TRAINING = {
    "loss/total": 6.25,
    "loss/cross_entropy": 6.5,
    "loss/dispersion": -0.25,
    "dispersion/cosine": 0.5,
    "dispersion/cosine/layer_01": 0.4,
    "learning_rate": 3e-4,
    "grad_norm": 1.5,
    "tokens_per_s": 2000.0,
}


def open_writer(folder: Path, **overrides: Any) -> metrics.MetricsWriter:
    settings: dict[str, Any] = {"max_tokens": 10_000, "is_main": True, "progress": False} | overrides
    return metrics.MetricsWriter(folder, **settings)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_records_go_to_jsonl_and_tensorboard(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(1, 100, TRAINING)
        writer.write(1, 100, {"validation/cross_entropy": 7.0})
        writer.write(2, 200, TRAINING | {"loss/total": 6.0})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # there before the close
        assert scalars(tmp_path, "loss/total") == [(1, 6.25), (2, 6.0)]
    records = [json.loads(line) for line in lines]
    assert [(record["step"], record["tokens"]) for record in records] == [(1, 100), (1, 100), (2, 200)]
    assert all(isinstance(record["time"], float) for record in records)
    first, second = metrics.read_metrics(tmp_path)
    assert first["validation/cross_entropy"] == 7.0 and first["loss/total"] == 6.25
    assert second["loss/total"] == 6.0 and "validation/cross_entropy" not in second


def test_pictures_go_to_tensorboard_on_rank_0_only(tmp_path: Path) -> None:
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with open_writer(tmp_path) as writer:
        writer.write_pictures(7, {"condensation/heatmap": picture})
    with open_writer(tmp_path / "other", is_main=False) as writer:
        writer.write_pictures(7, {"condensation/heatmap": picture})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("condensation/heatmap")
    assert (event.step, event.height, event.width) == (7, 4, 6)
    with Image.open(io.BytesIO(event.encoded_image_string)) as decoded:
        np.testing.assert_array_equal(np.asarray(decoded), picture)
    assert not (tmp_path / "other").exists()


def test_a_resume_appends_and_the_last_value_of_a_step_counts(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, 100 * step, {"loss/total": float(step)})
    with open_writer(tmp_path, first_step=3) as writer:
        writer.write(3, 300, {"loss/total": 30.0})
    assert [record["loss/total"] for record in metrics.read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    assert scalars(tmp_path, "loss/total") == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("kept", [1, 10, -2])
def test_a_line_torn_by_a_kill_is_cut_and_readers_skip_it(tmp_path: Path, kept: int) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(1, 100, TRAINING)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b'"step": 1', b'"step": 2')[:kept])
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [1]
    with open_writer(tmp_path) as writer:
        assert path.read_bytes() == whole
        writer.write(3, 300, TRAINING)
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [1, 3]


def test_readers_skip_what_is_no_record(tmp_path: Path) -> None:
    lines = ['{"step": 1, "a": 1.0}', "\0\0\0", "[1, 2]", '{"a": 5.0}', '{"step": 2, "a": 2.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [record["a"] for record in metrics.read_metrics(tmp_path)] == [1.0, 2.0]
    assert metrics.read_metrics(tmp_path / "nowhere") == []


def test_values_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(1, 100, {"a": math.nan, "b": math.inf, "c": 1.0})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["a"] is None and record["b"] is None and record["c"] == 1.0
    assert math.isnan(metrics.read_metrics(tmp_path)[0]["a"])


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_writer(tmp_path / "run", is_main=False, progress=True) as writer:
        writer.write(1, 100, TRAINING)
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_a_full_disk_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(path: Path, record: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with open_writer(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "append_line", no_space)
            writer.write(1, 100, TRAINING)
            writer.write(2, 200, TRAINING)
        writer.write(3, 300, TRAINING)
    assert sum("No space left" in message for message in caplog.messages) == 1
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [1, 2, 3], "written when there is room"


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(1, 100, TRAINING)
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "open", _open_that_writes_half, raising=False)
            writer.write(2, 200, TRAINING)
        writer.write(3, 300, TRAINING)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends so
def test_tensorboard_goes_on_after_its_files_could_not_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    with open_writer(tmp_path) as writer:
        writer.write(1, 100, TRAINING)
        shutil.rmtree(folder)
        folder.touch()
        for step in (2, 3):
            writer.write(step, 100 * step, TRAINING)
        folder.unlink()
        writer.write(4, 400, TRAINING)
    assert [step for step, _ in scalars(tmp_path, "loss/total")] == [4]
    assert [record["step"] for record in metrics.read_metrics(tmp_path)] == [1, 2, 3, 4]


class _HalfFile(io.FileIO):
    def write(self, content: Any) -> int:
        return super().write(bytes(content)[: len(content) // 2])


def _open_that_writes_half(path: Path, mode: str, buffering: int = -1) -> Any:
    return _HalfFile(path, "a") if mode == "ab" else open(path, mode, buffering)


def test_each_start_is_a_line(tmp_path: Path) -> None:
    metrics.append_start(tmp_path / "run", {"world_size": 2, "resumed_from_step": None})
    path = tmp_path / "run" / "starts.jsonl"
    path.write_bytes(path.read_bytes() + b'{"half')
    metrics.append_start(tmp_path / "run", {"world_size": 1, "versions": {"x": math.nan}})
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["world_size"] == 2 and first["resumed_from_step"] is None and first["time"] > 0
    assert second["versions"] == {"x": None}


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "very-secret-value")
    metrics.append_start(tmp_path, {"world_size": 1})
    with open_writer(tmp_path) as writer:
        writer.write(1, 100, TRAINING)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    assert not any(b"very-secret-value" in path.read_bytes() for path in written)


# ---- terminal


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_writer(tmp_path, progress=True) as writer:
        writer.write(1, 2_000, TRAINING)
        writer.write(1, 2_000, {"validation/cross_entropy": 7.0, "condensation/cosine/layer_00": 0.5})
        writer.write(2, 10_000, {"loss/total": 6.0})
    first, validation, last = capsys.readouterr().out.splitlines()
    assert first == (
        "step 1 | tokens 2,000 | loss 6.2500 | dispersion -0.2500 | cosine 0.5000 | lr 3.00e-04"
        " | grad norm 1.500 | tokens/s 2,000 | ETA 0:00:04"
    )
    assert validation == "step 1 | validation/cross_entropy 7.0000"
    assert last == "step 2 | tokens 10,000 | loss 6.0000 | ETA 0:00:00"


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "120"}.items():
        monkeypatch.setenv(name, value)
    with open_writer(tmp_path, progress=True) as writer:
        writer.write(7, 2_500, TRAINING)
        writer.write(7, 2_500, {"validation/cross_entropy": 7.0})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "loss 6.2500 | 2,000 tokens/s | ETA 0:00:04" in text
    assert "25%" in text and "step 7" in text
    assert "validation/cross_entropy 7.0000" in text


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0:00:00"), (61, "0:01:01"), (90_061, "1d 1:01:01"), (math.nan, "-")]
)
def test_duration(seconds: float, shown: str) -> None:
    assert metrics.format_duration(seconds) == shown


# ---- speed and memory


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835.5e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA A40", 149.7e12, 37.4e12),
        ("NVIDIA A10G", 70e12, 31.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("Tesla V100-PCIE-16GB", None, 14e12),
        ("Tesla T4", None, 8.1e12),
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("NVIDIA RTX A4000", None, None),
        ("cpu", None, None),
        ("", None, None),
    ],
)
def test_peaks(name: str, bf16: float | None, float32: float | None) -> None:
    assert metrics.peak_flops(name, "bf16") == bf16
    assert metrics.peak_flops(name, "float32") == float32


def test_every_peak_is_tested() -> None:
    tested = test_peaks.pytestmark[0].args[1]  # type: ignore[attr-defined]
    for pattern, *_ in metrics._PEAKS:
        assert any(re.search(pattern, name) for name, *_ in tested), pattern


def test_model_flops() -> None:
    # GPT-2 small at 1,024 positions: 6 x 124,439,808 + 12 x 12 x 768 x 1,024
    assert metrics.model_flops_per_token(124_439_808, 12, 768, 1024) == 746_638_848 + 113_246_208


def test_memory_is_that_of_this_process() -> None:
    before = metrics.memory_gib()
    assert 0.05 < before < 64
    if not torch.cuda.is_available():
        block = bytearray(os.urandom(1 << 20)) * 200
        assert 0.15 < metrics.memory_gib() - before < 0.25
        del block
