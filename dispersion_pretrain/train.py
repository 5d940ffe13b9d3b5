"""The training loop: the step first, then the run around it, from top to bottom."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from dispersion_pretrain import distributed, exit_codes, heartbeat, metrics
from dispersion_pretrain.assembly import RunParts, assemble
from dispersion_pretrain.baselines import count_resets
from dispersion_pretrain.certificate import Certificate
from dispersion_pretrain.condensation import TEXT_TOKENS, CosineAccumulator
from dispersion_pretrain.config import CondensationSettings, Settings, ValidationSettings
from dispersion_pretrain.crash_loop import refuse_crash_loop
from dispersion_pretrain.data import Batch
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.evaluation_jobs import finish_submissions, start_evaluation_job
from dispersion_pretrain.faults import NUM_SUMS, StepHealth, Verdict, add_sums, examine
from dispersion_pretrain.launcher import Launcher
from dispersion_pretrain.objective import EvaluationOutputs, LossTerms, StepContext
from dispersion_pretrain.profiling import StepProfiler
from dispersion_pretrain.replicas import check_replicas
from dispersion_pretrain.resume import open_saves, prepare_run_folder, resume_run, roll_back_run, save_run
from dispersion_pretrain.run_lock import only_start
from dispersion_pretrain.saving import Saved, Saves
from dispersion_pretrain.stopping import Stopping
from dispersion_pretrain.watchdog import Watchdog


class TrainEngine(Protocol):
    """What the train step needs of an engine."""

    def __call__(self, *arguments: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self) -> None: ...
    def skip_step(self) -> None: ...
    def gradient_accumulation_steps(self) -> int: ...
    def gradient_square(self) -> Tensor: ...
    def non_finite_gradients(self) -> list[str]: ...


def train_step(
    engine: TrainEngine,
    batches: Iterator[Batch],
    context: StepContext,
    totals: metrics.StepTotals,
    device: torch.device,
    wants_stop: Callable[[], bool] = lambda: False,
) -> StepHealth:
    """One optimizer step: every micro-batch forward and backward, one look at the numbers, one update at the end.

    Args:
        wants_stop: whether this rank wishes to stop after the step; asked at the look.

    Returns:
        What the look found. Where a loss or gradient is not finite on some rank, no rank makes an update, and the step
        does not enter `totals`.

    Collective: the engine's, the dispersion term's, and one reduction before the update.
    """
    micro_steps = engine.gradient_accumulation_steps()
    sums, done = torch.zeros(NUM_SUMS + len(context.layers), dtype=torch.float64, device=device), []
    heartbeat.begin_step(context.step)
    for micro_step in range(micro_steps):
        heartbeat.now.micro_step = micro_step
        heartbeat.mark("reading data")
        batch = next(batches)
        heartbeat.mark("forward pass")
        terms: LossTerms = engine(
            batch.input_ids.to(device, non_blocking=True), batch.sample_index.to(device, non_blocking=True), context
        )
        heartbeat.mark("backward pass")
        engine.backward(terms.total)  # the engine divides by the accumulation count
        done.append(terms._replace(total=terms.total.detach()))
        add_sums(sums, done[-1])
        if micro_step < micro_steps - 1:
            engine.step()
    heartbeat.mark("check for numbers that are not finite")
    health = examine(sums, engine.gradient_square(), context, engine.non_finite_gradients, wants_stop())
    if health.broken:
        engine.skip_step()
        return health
    heartbeat.mark("update")
    engine.step()
    for terms in done:
        add_terms(totals, terms)
    return health


def add_terms(totals: metrics.StepTotals, terms: LossTerms) -> None:
    """Add one micro-step to the sums on the device; per-layer vectors go by their place among the chosen layers."""
    totals.add("total", terms.total)
    totals.add("cross_entropy", terms.cross_entropy)
    totals.add("dispersion", terms.dispersion)
    totals.add("distillation", terms.distillation)
    for name, vector in (("cosine", terms.mean_cosine), ("clamped", terms.clamped_share)):
        if vector.numel():
            totals.add([f"{name}/{place}" for place in range(vector.numel())], vector)


def run(settings: Settings, watchdog: Watchdog, *, resume: str = "auto") -> int:
    """Train from the newest good checkpoint (or as `resume` says) to the last step.

    Args:
        resume: "auto", "none" (step 0; refused where the run has checkpoints) or the folder of a checkpoint.

    Returns:
        `exit_codes.DONE` at the end of the run, `REQUEUE` when a signal or the time limit stopped it, state saved.

    Collective: world.

    Raises:
        ValueError: settings, corpus and model do not fit together.
        RuntimeError: a damaged checkpoint or corpus, a resume that cannot be exact, numbers that are not finite
            (as `faults` says), ranks whose weights differ, another start at work in the run folder.
        CrashLoopError: the last two starts failed at one step.
    """
    launcher = Launcher()
    heartbeat.mark("joining the other ranks", heartbeat.LONG)
    device = start_distributed(settings.faults.hang_s)
    stop = Stopping(settings.run.max_time, leave_at_once=watchdog.leave_at_once, is_orphan=launcher.is_gone)
    heartbeat.mark("waiting for an earlier start to end", heartbeat.LONG)
    with only_start(settings.run_folder, launcher.is_gone):
        return run_alone(settings, watchdog, stop, device, resume)


def run_alone(settings: Settings, watchdog: Watchdog, stop: Stopping, device: torch.device, resume: str) -> int:
    """`run`, once the ranks have joined and no other start is at work in the run folder. Collective: world."""
    refuse_crash_loop(settings, resume=resume)
    heartbeat.mark("assembling the run", heartbeat.LONG)
    parts = assemble(settings, device)
    certificate, saves = Certificate(parts), open_saves(settings)
    stop.expect_save(parts.size.parameters, parts.layout.world_size)
    heartbeat.mark("loading a checkpoint", heartbeat.LONG)
    step = resume_run(parts, certificate, resume, saves.local)
    prepare_run_folder(parts, step)
    watchdog.publish(settings.run_folder, step)
    writer = open_writer(parts, step)
    batches, meter = parts.batches(step), ThroughputMeter(step)
    last_save_step, last_save_time, stall_s = step, time.monotonic(), 0.0
    watched = settings.profiling if distributed.is_main() else None
    profiler = StepProfiler(watched, settings.run_folder, device, parts.watched_modules())
    if step == 0:
        with meter.pause():
            measure(parts, writer, step, everything=True)

    while step < settings.num_steps:
        profiler.reach(step)
        parts.engine.set_learning_rate(parts.learning_rate(step))
        parts.forget_embeddings(step)
        context = parts.context(step)
        certificate.begin_step()
        health = train_step(parts.engine, batches, context, parts.totals, device, stop.requested)
        if parts.gradient_cap is not None:
            parts.gradient_cap.end_step(context.coefficient)
        step += 1
        certificate.end_step(step)  # of the first step after a save or a resume
        try:
            verdict = parts.faults.judge(step, health)
        except RuntimeError:
            saves.finish()  # all ranks raise alike, and the save under way is the one to start again from
            raise
        if verdict.rolls_back:
            heartbeat.mark("going back to a checkpoint", heartbeat.LONG)
            saves.finish()
            batches.close()
            writer.close()
            step, verdict = roll_back_run(parts, step, verdict, saves.local)
            writer, batches, meter = open_writer(parts, step), parts.batches(step), ThroughputMeter(step)
            last_save_step = step
            tell(parts, writer, step, verdict)
            continue
        tell(parts, writer, step, verdict)
        ending = health.stopping or step == settings.num_steps

        logging = ending or step % settings.logging.every_steps == 0
        saving = step > last_save_step and (ending or save_due(settings, step, last_save_time))
        heartbeat.mark("logging")
        if logging:
            log(parts, writer, step, context.coefficient, meter.values(step, parts, batches.wait_s))
        tier = saves.shared if saving else saves.local if local_save_due(settings, step) else None
        with meter.pause():
            check_replicas(parts, writer, step, context.coefficient)
            measure(parts, writer, step, everything=step == settings.num_steps)
        if tier is not None:
            heartbeat.mark("saving a checkpoint", heartbeat.LONG)
            with meter.pause():
                stall_s = save_run(parts, certificate, saves, tier, step)
                writer.write(step, parts.tokens(step), {"checkpoint_s": stall_s})
        if saving:
            last_save_step, last_save_time = step, time.monotonic()
        if ending:
            heartbeat.mark("waiting for the save to be committed", heartbeat.LONG)
            saves.finish()
        for saved in saves.poll():
            if saved.error is None:
                stop.saved(stall_s + saved.write_s)
            report_save(parts, writer, saves, saved)
        if health.stopping:
            break

    heartbeat.mark("ending")
    profiler.close()
    batches.close()
    writer.close()
    finish_submissions()
    saves.require_saved()
    if step == settings.num_steps:
        return exit_codes.DONE
    if distributed.is_main():
        print(f"stopped by {stop.reason}: step {step}, state saved; the same command goes on from there", flush=True)
    return exit_codes.REQUEUE


def open_writer(parts: RunParts, step: int) -> metrics.MetricsWriter:
    """The writer of what happens after `step` steps; TensorBoard drops what it had of later ones."""
    return metrics.MetricsWriter(
        parts.settings.run_folder,
        max_tokens=parts.tokens(parts.settings.num_steps),
        is_main=distributed.is_main(),
        progress=True,
        first_step=step + 1,
    )


def tell(parts: RunParts, writer: metrics.MetricsWriter, step: int, verdict: Verdict) -> None:
    """Print and record what a verdict says, if anything; on rank 0."""
    if verdict.message and distributed.is_main():
        print(verdict.message, flush=True)
    if verdict.figures:
        writer.write(step, parts.tokens(step), verdict.figures)


def log(parts: RunParts, writer: metrics.MetricsWriter, step: int, coefficient: float, speed: dict[str, float]) -> None:
    """Write the means of the steps since the last record. Collective: world, one reduction."""
    means = parts.totals.reduce()
    if not means:
        return  # every step since the last record was skipped
    values = {
        "loss/total": means["total"],
        "loss/cross_entropy": means["cross_entropy"],
        "grad_norm": parts.engine.gradient_norm(),
        "learning_rate": parts.learning_rate(step - 1),
        **speed,
    }
    if coefficient:
        values["loss/dispersion"] = means["dispersion"]
        values["dispersion/coefficient"] = coefficient
        values["dispersion/cosine"] = sum(means[f"cosine/{i}"] for i in range(len(parts.layers))) / len(parts.layers)
        for place, layer in enumerate(parts.layers):
            values[f"dispersion/cosine/layer_{layer:02d}"] = means[f"cosine/{place}"]
            values[f"dispersion/clamped_share/layer_{layer:02d}"] = means[f"clamped/{place}"]
        if parts.gradient_cap is not None:
            values["dispersion/gradient_ratio"] = parts.gradient_cap.ratio
    if parts.settings.distillation is not None:
        values["loss/distillation"] = means["distillation"]
    forgetting = parts.settings.active_forgetting
    if forgetting is not None:
        values["active_forgetting/resets"] = count_resets(forgetting, step, parts.settings.num_steps)
    writer.write(step, parts.tokens(step), values)


def measure(parts: RunParts, writer: metrics.MetricsWriter, step: int, *, everything: bool = False) -> None:
    """Validation loss and condensation, where due or if `everything`; no gradient, no random number.

    Collective: world.
    """
    settings = parts.settings
    validation = settings.validation if everything or _due(settings.validation, step) else None
    condensation = settings.condensation if everything or _due(settings.condensation, step) else None
    if validation is None and condensation is None:
        return
    parts.engine.train(False)
    sums = torch.zeros(2, dtype=torch.float64, device=parts.device)
    accumulator: CosineAccumulator | None = None
    num_sequences = max(validation.sequences if validation else 0, condensation.num_texts if condensation else 0)
    for batch in parts.validation_batches(num_sequences):
        heartbeat.mark("validation")
        with torch.no_grad():
            outputs: EvaluationOutputs = parts.engine(batch.input_ids.to(parts.device))
        if validation is not None:
            counted = (batch.valid & (batch.sample_index < validation.sequences)).to(parts.device)
            sums += torch.stack(
                [outputs.cross_entropy_sums[counted].sum(), counted.sum() * (batch.input_ids.shape[1] - 1)]
            )
        if condensation is not None:
            states = [state[:, :TEXT_TOKENS] for state in outputs.hidden_states]
            accumulator = accumulator or CosineAccumulator(len(states), states[0].shape[1], parts.device)
            texts = (batch.valid & (batch.sample_index < condensation.num_texts)).to(parts.device)
            accumulator.add(states, texts)
    parts.engine.train(True)
    values: dict[str, float] = {}
    if validation is not None:
        total, count = distributed.all_reduce_sum(sums).tolist()
        values |= {
            "validation/cross_entropy": total / count,
            "validation/perplexity": math.exp(min(total / count, 700.0)),
        }
    if condensation is not None and accumulator is not None:
        accumulator.reduce()
        result = accumulator.result(step=step, tokens=parts.tokens(step))
        values |= result.scalars()
        if distributed.is_main():
            from dispersion_pretrain.condensation_pictures import training_pictures  # only the rank that draws pays

            result.save(settings.run_folder / "condensation" / f"step-{step:08d}.npz")
            writer.write_pictures(step, training_pictures(result))
    writer.write(step, parts.tokens(step), values)


def _due(section: ValidationSettings | CondensationSettings | None, step: int) -> bool:
    return section is not None and step > 0 and step % section.every_steps == 0


def save_due(settings: Settings, step: int, last_save_time: float) -> bool:
    """Whether a checkpoint is due by steps or minutes.

    Collective: world, where minutes count, since the clocks of ranks differ.
    """
    every = settings.checkpoint
    if every.every_steps is not None and step % every.every_steps == 0:
        return True
    if every.every_minutes is None:
        return False
    return distributed.any_rank(time.monotonic() - last_save_time >= 60 * every.every_minutes)


def local_save_due(settings: Settings, step: int) -> bool:
    """Whether a checkpoint on the nodes' own disks is due."""
    every = settings.checkpoint.local_every_steps
    return every is not None and step % every == 0


def report_save(parts: RunParts, writer: metrics.MetricsWriter, saves: Saves, saved: Saved) -> None:
    """Write what became of a save, and start the evaluation that waited for the commit."""
    settings, step = parts.settings, saved.step
    if saved.error is not None:
        writer.write(step, parts.tokens(step), {"checkpoint/failed": 1.0})
        return
    writer.write(step, parts.tokens(step), {"checkpoint/write_s": saved.write_s})
    job = settings.evaluation
    if job.every and step % job.every == 0 and saved.tier is saves.shared and distributed.is_main():
        start_evaluation_job(settings.run_folder, step, job.suite, device=job.device, via=job.via, sbatch=job.sbatch)


class ThroughputMeter:
    """Time and tokens between two log records; what is spent in `with meter.pause()` does not count."""

    def __init__(self, step: int) -> None:
        self._start(step, time.monotonic(), 0.0)

    def _start(self, step: int, now: float, waited_s: float) -> None:
        self._step, self._time, self._waited_s, self._paused_s = step, now, waited_s, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out what happens inside."""
        start = time.monotonic()
        yield
        self._paused_s += time.monotonic() - start

    def values(self, step: int, parts: RunParts, waited_s: float) -> dict[str, float]:
        """Speed since the last call: tokens_per_s, step_time_s, data_wait_share, memory_gib, and mfu where known."""
        now = time.monotonic()
        seconds = max(1e-9, now - self._time - self._paused_s)
        tokens_per_s = parts.tokens(step - self._step) / seconds
        values = {
            "tokens_per_s": tokens_per_s,
            "step_time_s": seconds / max(1, step - self._step),
            "data_wait_share": (waited_s - self._waited_s) / seconds,
            "memory_gib": metrics.memory_gib(),
        }
        if parts.peak_flops is not None:
            values["mfu"] = tokens_per_s * parts.flops_per_token / (parts.peak_flops * distributed.world_size())
        self._start(step, now, waited_s)
        return values
