"""The planner: machines, the trace of a micro-step, layouts, text; the shipped runs and what their headers say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dispersion_pretrain import angular_kernel, metrics
from dispersion_pretrain.config import ModelSettings, Settings
from dispersion_pretrain.engine import zero_options
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import DispersionTerm, StepContext, TrainingModule
from dispersion_pretrain.plan import Estimate, Planner
from dispersion_pretrain.plan_machine import load_machine
from dispersion_pretrain.plan_memory import pool_bytes, shards
from dispersion_pretrain.plan_text import cost, describe
from dispersion_pretrain.plan_time import traffic
from dispersion_pretrain.plan_trace import LiveBytes, Parameter, trace_micro_step
from dispersion_pretrain.plan_work import WorkCounter
from dispersion_pretrain.settings_file import load_settings, parse_settings
from small_run import launch_script

ROOT = Path(__file__).resolve().parents[2]
MACHINES = sorted((ROOT / "configs" / "machines").glob("*.yaml"))
RUNS = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
LENGTH, VOCABULARY, SEQUENCES = 32, 96, 4


def small(model: str = "qwen3", **change: Any) -> Settings:
    """Settings of a model of two layers, changed by `section__key`."""
    sizes: dict[str, dict[str, Any]] = {
        "qwen3": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        },
        "gpt2": {
            "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    }  # fmt: skip
    tree: dict[str, Any] = {
        "model": {"config": {"model_type": model, "vocab_size": VOCABULARY, **sizes[model]}},
        "data": {"corpus": "nowhere", "sequence_length": LENGTH},
        "training": {"global_batch_tokens": 16 * LENGTH, "max_tokens": 1600 * LENGTH},
    }
    for key, value in change.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return parse_settings(tree, "test")


def planner(settings: Settings, *, gpus: int = 8, nodes: int = 1, **change: Any) -> Planner:
    return Planner(settings, load_machine("h100", change), nodes=nodes, gpus_per_node=gpus)


def predicted_and_measured(settings: Settings, sequences: int) -> tuple[float, float]:
    """Most bytes alive in a micro-step, traced on shapes and counted in a real one."""
    hub_config = model_config(settings.model, vocabulary=None, sequence_length=LENGTH)
    term, layers = None, []
    if settings.dispersion is not None:
        layers, pools = [1, 2], sequences // settings.dispersion.pool_sequences
        term = DispersionTerm(settings.dispersion, layers=layers, seed=0, pools_per_rank=pools, pool_group=None)
    module = TrainingModule(build_model(settings.model, hub_config), term).train()
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    counter = LiveBytes([*module.parameters(), *module.buffers()], VOCABULARY)
    context = StepContext(0, sequences * (LENGTH - 1.0), 1, 0.1)
    with counter:
        terms = module(torch.zeros(sequences, LENGTH, dtype=torch.int64), torch.arange(sequences), context)
        terms.total.backward()
    trace = trace_micro_step(settings, hub_config, layers)
    assert trace.num_parameters == sum(parameter.numel() for parameter in module.parameters())
    return max(moment.num_bytes for moment in trace.at(sequences)), counter.take_peak()[0]


class TestMachine:
    @pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
    def test_shipped_ones_have_the_peaks_that_mfu_is_logged_with(self, path: Path) -> None:
        machine = load_machine(path.stem)
        assert machine == load_machine(str(path))
        for precision in ("bf16", "float32"):
            assert machine.peak(precision) == metrics.peak_flops(machine.name, precision)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"memory_gib": None}, r"own\.yaml: memory_gib: is missing.* of one GPU\. Add it"),
            ({"memory_gb": 80}, r"own\.yaml: memory_gb: unknown key, with the value 80\. Did you mean memory_gib\?"),
            ({"mfu": 40}, r"own\.yaml: mfu: 40 is not allowed.*less than or equal to 1.*Correct the value"),
            ({"nvlink_gb_s": float("inf")}, r"nvlink_gb_s"),
        ],
    )
    def test_a_file_of_ones_own_is_checked(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        fields = yaml.safe_load(MACHINES[0].read_text())
        fields = {key: value for key, value in {**fields, **change}.items() if value is not None}
        path = tmp_path / "own.yaml"
        path.write_text(yaml.safe_dump(fields))
        with pytest.raises(ValueError, match=message):
            load_machine(str(path))

    def test_an_unknown_name_and_a_file_without_fields_are_explained(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"gpu: 'b300' is not known .*a100, h100, h200 or a YAML file"):
            load_machine("b300")
        (tmp_path / "list.yaml").write_text("- 1")
        with pytest.raises(ValueError, match=r"list\.yaml: holds list\. A mapping of sections is needed"):
            load_machine(str(tmp_path / "list.yaml"))


class TestTrace:
    @pytest.mark.parametrize("model", ["qwen3", "gpt2"])
    @pytest.mark.parametrize("checkpointing", [False, True, 2], ids=["kept", "recomputed", "every second recomputed"])
    @pytest.mark.parametrize("head", ["pieces", "whole"])
    def test_shapes_alone_take_what_real_tensors_take(self, model: str, checkpointing: bool | int, head: str) -> None:
        settings = small(
            model,
            model__activation_checkpointing=checkpointing,
            model__loss_head=head,
            dispersion__pool_sequences=2,
            dispersion__tokens_per_sequence=8,
        )
        predicted, measured = predicted_and_measured(settings, SEQUENCES)
        assert predicted == pytest.approx(measured, rel=0.05)

    @pytest.mark.parametrize("head", ["pieces", "whole"])
    def test_larger_micro_batches_follow_from_two(self, head: str) -> None:
        settings = small(model__loss_head=head)  # pieces of 256 tokens are whole from 17 sequences on
        for sequences in (1, 17, 40):
            predicted, measured = predicted_and_measured(settings, sequences)
            assert predicted == pytest.approx(measured, rel=0.01)

    def test_whole_pools_of_a_rank_grow_linearly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(angular_kernel, "load", lambda: None)  # shapes alone have no such kernel, nor have GPUs
        settings = small(dispersion__pool_sequences=4, dispersion__tokens_per_sequence=16)
        for sequences in (4, 8, 40):
            predicted, measured = predicted_and_measured(settings, sequences)
            assert predicted == pytest.approx(measured, rel=0.05)

    def test_it_leaves_no_trace(self) -> None:
        settings = small()
        hub_config = model_config(settings.model, vocabulary=None, sequence_length=LENGTH)
        attention, state = torch.nn.functional.scaled_dot_product_attention, torch.get_rng_state()
        trace_micro_step(settings, hub_config, [])
        assert torch.nn.functional.scaled_dot_product_attention is attention
        assert torch.equal(torch.get_rng_state(), state)


class TestWork:
    def test_operations_by_hand(self) -> None:
        left, right, small = torch.randn(8, 4), torch.randn(4, 16), torch.randn(3, 5)
        with WorkCounter() as counter:
            left @ right  # 8 x 16 numbers of 4 products each
            small + 1  # read and written
            small.t()  # no kernel
            torch.nn.functional.embedding(torch.tensor([1]), left)  # a row is read, not the table
        work = counter.work
        assert work == (2 * 8 * 16 * 4, 2 * 60 + 2 * 16, 3)
        query = torch.empty(2, 3, 8, 4)  # 6 heads of 8 x 8 scores, half of them masked
        counter.attention(query, query, query, backward=False)
        assert counter.work.product_flops - work.product_flops == 2 * (2 * 6 * 8 * 8 * 4) / 2

    @pytest.mark.parametrize("model", ["qwen3", "gpt2"])
    def test_products_are_those_of_real_tensors(self, model: str) -> None:
        settings = small(model, model__attention="eager", model__activation_checkpointing=True)
        hub_config = model_config(settings.model, vocabulary=None, sequence_length=LENGTH)
        module = TrainingModule(build_model(settings.model, hub_config), None).train()
        with FlopCounterMode(display=False) as counter:
            context = StepContext(0, SEQUENCES * (LENGTH - 1.0), 1, 0.0)
            ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)
            module(ids, torch.arange(SEQUENCES), context).total.backward()
        work = trace_micro_step(settings, hub_config, []).work(SEQUENCES)
        assert work.product_flops == counter.get_total_flops()

    def test_a_narrow_model_reaches_less_of_the_peak(self) -> None:
        def utilisation(width: int) -> float:
            fields = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": width, "n_layer": 2, "n_head": 2}
            wide = small().model_copy(update={"model": ModelSettings(config={**fields, "n_positions": 64})})
            return planner(wide, launch_us=0.0).chosen.mfu

        assert utilisation(512) > 1.5 * utilisation(128)


class TestMemory:
    def test_shards_by_hand(self) -> None:
        parameters = (Parameter("a", (10, 3)), Parameter("b", (7,)), Parameter("c", (5, 6)))
        assert shards(parameters, 0, 4, 9) == (whole := shards(parameters, 0, 1, 9))
        assert (whole.whole, whole.own, whole.working) == (67, 67, 67)
        flat = shards(parameters, 2, 4, 9)  # 60 -> 64 and 7 -> 8, in units of 2 x 4
        assert (flat.own, flat.working) == (18, 72)
        each = shards(parameters, 3, 4, 9)  # 8 + 2 + 8, and the 7 whole besides
        assert (each.own, each.working) == (18, 25)
        assert shards(parameters, 3, 1, 9).working == 67

    def test_the_pool_by_hand(self) -> None:
        settings = small(model__precision="bf16", dispersion__pool_sequences=8, dispersion__tokens_per_sequence=4)
        layout = BatchLayout.derive(settings, 8)  # 2 sequences a rank
        assert pool_bytes(settings, layout, layers=2, width=32) == 2 * (6 * 4) * 32 * (2 + 4)
        assert pool_bytes(settings, BatchLayout.derive(settings, 1), layers=2, width=32) == 0

    def test_offloading_moves_states_to_the_host(self) -> None:
        kept = planner(small(zero__stage=3, model__precision="bf16")).chosen.memory
        settings = small(
            zero__stage=3, zero__offload_optimizer=True, zero__offload_parameters=True, model__precision="bf16"
        )
        moved = planner(settings).chosen.memory
        assert moved.masters == moved.moments == moved.peak.gradients == 0
        assert moved.host - kept.host > kept.masters + kept.moments
        assert moved.total < kept.total


class TestTraffic:
    """Bytes a rank sends, of 100 parameters on 4 ranks: 75 are others'."""

    @pytest.mark.parametrize(
        ("stage", "options", "reduction", "parameters"),
        [
            (0, {}, 2, 0),
            (1, {}, 2, 1),
            (2, {}, 2 * 2, 1),
            (2, {"use_multi_rank_bucket_allreduce": False}, 2, 1),
            (3, {}, 2, 2),
            (3, {"stage3_max_reuse_distance": 0}, 2, 4),
        ],
    )
    def test_zero(self, stage: int, options: dict[str, Any], reduction: int, parameters: int) -> None:
        settings = small(zero__stage=stage, zero__overrides={"zero_optimization": options}, training__micro_batch=2)
        layout = BatchLayout.derive(settings, 4)
        assert layout.accumulation == 2
        part = shards((Parameter("a", (100,)),), stage, 4, 0)
        sent = traffic(settings, layout, part, layers=0, width=32)
        assert (sent.reduction, sent.parameters, sent.pool) == (reduction * 4 * 75, parameters * 4 * 75, 0)

    @pytest.mark.parametrize(
        ("stage", "micro_batch", "times"), [(0, 16, 0), (1, 16, 1), (1, 4, 1), (2, 16, 1), (2, 4, 4)]
    )
    def test_gradients_are_copied_as_often_as_they_are_reduced(self, stage: int, micro_batch: int, times: int) -> None:
        settings = small(zero__stage=stage, training__micro_batch=micro_batch)
        slow, fast = (
            planner(settings, gpus=1, memory_gb_s=1.0, traffic_efficiency=share).chosen for share in (0.5, 1.0)
        )
        numbers = slow.memory.parameters / 2  # in bf16, of which each is read and written thrice
        assert slow.time.update - fast.time.update == pytest.approx(times * 6 * 2 * numbers * 1e-9)


@pytest.mark.parametrize(
    ("parameters", "expected"), [(1_000, 1_000), (124_000_000, 124_000_000), (8 * 10**9, 5 * 10**8)]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_is_no_larger_than_the_model(stage: int, parameters: int, expected: int) -> None:
    settings = small(zero__stage=stage)
    assert zero_options(settings, BatchLayout.derive(settings, 1), parameters).reduce_bucket_size == expected
    chosen = small(zero__stage=stage, zero__overrides={"zero_optimization": {"reduce_bucket_size": 777}})
    assert zero_options(chosen, BatchLayout.derive(chosen, 1), parameters).reduce_bucket_size == 777


class TestPlanner:
    def test_the_largest_micro_batch_is_the_largest_that_fits(self) -> None:
        settings = small(zero__overrides={"zero_optimization": {"reduce_bucket_size": 1000}})
        plan = planner(settings, gpus=1, memory_gib=1.0, reserved_gib=0.0, margin=0.0)
        sizes = {grid.layout.micro_batch: plan.device_bytes(grid.memory) for grid in plan.grids()}
        assert list(sizes) == [1, 2, 4, 8, 16]
        for expected, limit in [(4, sizes[8] - 1), (8, sizes[8]), (None, sizes[1] - 1)]:
            plan.machine = load_machine("h100", {"memory_gib": limit / 2**30, "reserved_gib": 0.0, "margin": 0.0})
            assert plan.largest_that_fits() == expected
        assert "No legal micro-batch fits" in describe(plan)

    def test_a_micro_batch_that_a_run_will_find_is_the_largest_that_fits(self) -> None:
        room: dict[str, Any] = {"gpus": 1, "memory_gib": 1.0, "reserved_gib": 0.0, "margin": 0.0}
        changes: dict[str, Any] = {"zero__overrides": {"zero_optimization": {"reduce_bucket_size": 1000}}}
        plan = planner(small(**changes), **room)
        sizes = {grid.layout.micro_batch: plan.device_bytes(grid.memory) for grid in plan.grids()}
        room["memory_gib"] = (sizes[8] - 1) / 2**30
        found = planner(small(**changes, training__micro_batch="auto"), **room)
        assert (found.plan.layout.micro_batch, found.plan.layout.accumulation) == (4, 4)
        assert found.chosen.fits and found.largest_that_fits() == 4

    def test_scaling_says_why_a_number_of_gpus_is_left_out(self) -> None:
        rows = dict(planner(small()).scaling())
        assert isinstance(rows[8], Estimate) and isinstance(rows[16], Estimate)
        assert rows[32] == "16 sequences a step do not divide"
        speeds = [row.tokens_per_s for row in rows.values() if isinstance(row, Estimate)]
        assert len(speeds) == 2

    def test_parts_of_a_step_add_up_to_days(self) -> None:
        settings = small(training__max_tokens=1600 * LENGTH, checkpoint__every_steps=10)
        chosen = planner(settings).chosen
        assert chosen.days * 86400 == pytest.approx(100 * chosen.time.total)
        assert chosen.gpu_hours == pytest.approx(chosen.days * 24 * 8)
        assert chosen.time.checkpoint == pytest.approx(chosen.checkpoint.stall_s / 10)
        assert chosen.tokens_per_s == pytest.approx(16 * LENGTH / chosen.time.total)

    def test_assumptions_are_printed_and_act(self) -> None:
        slow, fast = planner(small(), mfu=0.2), planner(small(), mfu=0.4)
        assert "mfu 0.2," in describe(slow)
        assert slow.chosen.time.compute == pytest.approx(2 * fast.chosen.time.compute)
        slow, fast = (planner(small(dispersion__tokens_per_sequence=16), mfu=mfu) for mfu in (0.2, 0.4))
        assert "product_efficiency" not in describe(slow)  # and so nothing may rest on it
        assert slow.chosen.time.term > fast.chosen.time.term


class TestScript:
    def test_prints_tables_and_draws(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config, picture = tmp_path / "run.yaml", tmp_path / "scaling.svg"
        config.write_text(yaml.safe_dump(small().model_dump(mode="json")))
        arguments = ["--config", str(config), "--nodes", "1", "--gpus-per-node", "4", "--gpu", "a100"]
        assert launch_script("plan").main([*arguments, "--mfu", "0.5", "--picture", str(picture)]) == 0
        printed = capsys.readouterr().out
        for expected in ("NVIDIA A100", "mfu 0.5", "stage 3", "Largest micro-batch", "GPU-hours", "Checkpoint:"):
            assert expected in printed
        assert "Parts of a step" in picture.read_text()
        assert launch_script("plan").main([*arguments, "training.micro_batch=3"]) == 1
        assert "training.micro_batch: a micro-batch of 3 does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_run_costs_what_its_header_says(path: Path) -> None:
    header = re.search(r"^# By launch/plan.py --nodes (\d+) --gpu (\w+): (.*)\.$", path.read_text(), re.MULTILINE)
    assert header is not None, "the header names nodes, GPU and cost"
    nodes, gpu, says = int(header[1]), header[2], header[3]
    plan = Planner(load_settings(path), load_machine(gpu), nodes=nodes, gpus_per_node=8)
    assert cost(plan) == says
    assert plan.chosen.fits


def test_a_pair_of_shipped_runs_differs_in_the_dispersion_section_only() -> None:
    pairs = [(path, path.with_stem(f"{path.stem}_baseline")) for path in RUNS]
    pairs = [(path, baseline) for path, baseline in pairs if baseline in RUNS]
    assert len(pairs) == 2
    for path, baseline in pairs:
        with_term, without = (load_settings(name).model_dump() for name in (path, baseline))
        different = {section for section in with_term if with_term[section] != without[section]}
        assert different == {"run", "dispersion"}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_run_passes_a_dry_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = int(re.findall(r"--nodes (\d+)", path.read_text())[0])
    command = ["pretrain.py", "--config", str(path), "--dry-run", "--ranks", str(8 * nodes), "--no-corpus"]
    monkeypatch.setattr(sys, "argv", command)
    assert launch_script("pretrain").main() == 0
    assert f"= {8 * nodes} ranks x " in capsys.readouterr().out


def test_a_dry_run_needs_no_corpus_if_it_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain = launch_script("pretrain")
    command = ["pretrain.py", "--config", str(RUNS[0]), "--dry-run", "--ranks", "8"]
    monkeypatch.setattr(sys, "argv", command)
    assert pretrain.main() == 1
    assert "corpus.json: cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--no-corpus"])
    assert pretrain.main() == 0
    assert "/shared/fineweb-edu: not read" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--config", str(RUNS[0]), "--no-corpus"])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "--no-corpus: given without --dry-run" in capsys.readouterr().err
