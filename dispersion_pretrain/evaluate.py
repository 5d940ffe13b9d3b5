"""Benchmark scores of one checkpoint, in a process of its own: never inside the training process.

The folder of an evaluation holds results.json (whole or absent) and examples.json beside it (the values of each
example), partial.json (tasks that are done while others are not), failed.json (why there is no result), pending (who
works on it), log.txt, job.sh and job.id (of a job that training started) and lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dispersion_pretrain import checkpoint, export, heartbeat, held_out, lm_tasks, provenance, suites
from dispersion_pretrain.config import Settings
from dispersion_pretrain.corpus import read_manifest
from dispersion_pretrain.settings_file import load_settings
from dispersion_pretrain.suites import Suite, load_suite

FORMAT_VERSION = 1
RESULTS, FAILURE, PENDING = "results.json", "failed.json", "pending"
EXAMPLES, PARTIAL = "examples.json", "partial.json"


@dataclass(frozen=True)
class Options:
    """How to evaluate."""

    corpus: str | None = None  # of held-out text; None: that of the run
    device: str | None = None  # None: CUDA where there is one, else the CPU
    batch_size: int | str = 8  # or "auto"
    limit: int | None = None  # examples a task, where the suite has more
    force: bool = False  # repeat what is there
    keep_export: bool = False


@dataclass(frozen=True)
class _Job:
    model: str
    suite: Suite
    run: Path | None
    step: int | None
    settings: Settings | None  # of the run
    folder: Path
    options: Options

    @property
    def checkpoint(self) -> Path | None:
        return None if self.run is None or self.step is None else checkpoint.step_folder(self.run, self.step)

    @property
    def corpus(self) -> str | None:
        return self.options.corpus or (self.settings.data.sources[0].path if self.settings else None)

    def identity(self, earlier: dict[str, Any] | None) -> dict[str, Any]:
        """What decides the scores. A checkpoint that was removed since is the one of the `earlier` results."""
        held_out = any(task.held_out for task in self.suite.tasks)
        if earlier is not None and self.checkpoint is not None and not self.checkpoint.exists():
            model = earlier["settings"]["identity"]["model"]
        else:
            model = self._model_identity()
        return {
            "model": model,
            "suite": self.suite.model_dump(mode="json"),
            "limit": self.options.limit,
            "corpus_sha256": read_manifest(self.corpus).sha256 if held_out and self.corpus else None,
            "lm_eval": metadata.version("lm_eval"),
        }

    def _model_identity(self) -> str:
        if self.checkpoint is not None:
            return export.checkpoint_hash(self.checkpoint)
        if not Path(self.model).is_dir():
            return self.model
        files = sorted(path for path in Path(self.model).iterdir() if path.is_file())
        described = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(described).encode()).hexdigest()


def evaluation_folder(run_folder: Path, suite_name: str, step: int) -> Path:
    """Where the results of a run's checkpoint lie."""
    return run_folder / "evaluations" / suite_name / f"step-{step:08d}"


def evaluate_model(model: str, suite: str | Path, out: Path | None, options: Options) -> dict[str, Any]:
    """Run a suite on a model, write results.json and return its content; whole earlier results are returned unchanged.

    The scores of a run go into its TensorBoard files too. Tasks that fail are in `errors` while the others go on; a
    repetition runs only those that are missing. A second evaluation into the same folder waits for the first.

    Args:
        model: RUN_FOLDER (newest good checkpoint), RUN_FOLDER@STEP, a Hugging Face folder, or a name on the hub.
        suite: YAML file.
        out: folder of the results; None: that of the run's step.

    Raises:
        ValueError: the suite, the model or `out` is not what it must be.
        RuntimeError: the checkpoint is damaged, or its export is not the model that was trained.
    """
    job = _plan(model, load_suite(suite), out, options)
    job.folder.mkdir(parents=True, exist_ok=True)
    with _exclusive(job.folder):
        (job.folder / FAILURE).unlink(missing_ok=True)
        write_pending(job.folder, os.getpid())
        try:
            return _evaluate(job, chosen_folder=out is not None)
        except Exception as error:
            write_json(job.folder / FAILURE, {"time": time.time(), "error": f"{type(error).__name__}: {error}"})
            raise
        finally:
            (job.folder / PENDING).unlink(missing_ok=True)


def _plan(model: str, suite: Suite, out: Path | None, options: Options) -> _Job:
    parts = export.split_run(model)
    if parts is None:
        if out is None:
            raise ValueError(f"--out: is missing, and {model} is no run with a folder for results. Give --out.")
        return _Job(model, suite, None, None, None, out, options)
    run, step = parts
    if step is None:
        step = export.locate(model).info.step
    settings = load_settings(run / "config.yaml")
    return _Job(model, suite, run, step, settings, out or evaluation_folder(run, suite.name, step), options)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another evaluation works here, waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _evaluate(job: _Job, *, chosen_folder: bool) -> dict[str, Any]:
    started = time.time()
    earlier = read_json(job.folder / RESULTS)
    identity = job.identity(earlier)
    scores = _reusable_scores(job, earlier, identity, chosen_folder=chosen_folder)
    if earlier is not None and all(task.task in scores for task in job.suite.tasks):
        print(f"{job.folder / RESULTS}: is there already; --force repeats it", flush=True)
        return earlier
    examples = (read_json(job.folder / EXAMPLES) or {"tasks": {}})["tasks"]
    examples = {task: values for task, values in examples.items() if task in scores}
    partial = read_json(job.folder / PARTIAL)
    if partial is not None and partial["identity"] == identity and not job.options.force:
        scores, examples = scores | partial["results"], examples | partial["examples"]
    missing = [task for task in job.suite.tasks if task.task not in scores]
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="evaluation-") as scratch:
        cache = job.settings.data.cache if job.settings and job.options.corpus is None else None
        loaded, errors = lm_tasks.load_tasks(missing, held_out.Text(job.corpus, cache, Path(scratch)))
        if loaded:
            with _language_model(job) as (lm, details):
                for task, found, of_task, error in lm_tasks.run_tasks(lm, missing, loaded, job.options.limit):
                    if error is not None:
                        errors[task] = error
                        continue
                    scores[task], examples[task] = found, of_task
                    done = {"identity": identity, "results": scores, "examples": examples}
                    write_json(job.folder / PARTIAL, done)  # what a kill leaves is not run again
    results = _describe(job, identity, scores, errors, details) | {"time_s": time.time() - started}
    if job.run is not None and job.step is not None:
        _write_tensorboard(job.run, job.step, results)
    write_json(job.folder / EXAMPLES, {"format_version": FORMAT_VERSION, "tasks": examples})
    write_json(job.folder / RESULTS, results)
    (job.folder / PARTIAL).unlink(missing_ok=True)
    return results


def _describe(
    job: _Job,
    identity: dict[str, Any],
    scores: dict[str, dict[str, Any]],
    errors: dict[str, str],
    details: dict[str, Any],
) -> dict[str, Any]:
    manifest = read_json(job.checkpoint / checkpoint.MANIFEST) if job.checkpoint else None
    return {
        "format_version": FORMAT_VERSION,
        "model": job.model,
        "run": None if job.run is None else str(job.run),
        "step": job.step,
        "tokens": None if manifest is None else manifest["tokens"],
        "suite": job.suite.name,
        "results": {task.task: scores[task.task] for task in job.suite.tasks if task.task in scores},
        "averages": suites.averages(job.suite, scores),
        "errors": errors,
        "versions": provenance.versions() | {name: metadata.version(name) for name in ("lm_eval", "datasets")},
        "settings": {"identity": identity, "corpus": job.corpus, "batch_size": job.options.batch_size, **details},
    }


def _reusable_scores(
    job: _Job, earlier: dict[str, Any] | None, identity: dict[str, Any], *, chosen_folder: bool
) -> dict[str, dict[str, Any]]:
    """Return the scores of earlier results that hold for this job too."""
    if earlier is None or job.options.force:
        return {}
    before = earlier["settings"]["identity"]
    if before == identity:
        return dict(earlier["results"])
    if chosen_folder and before["model"] != identity["model"]:
        raise ValueError(
            f"--out: {job.folder} holds the results of {earlier['model']}. A folder of its own for each model is "
            "needed. Choose another, or --force to replace them."
        )
    return {}


@contextlib.contextmanager
def _language_model(job: _Job) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield lm-eval's view of the model and how it was set up."""
    from lm_eval.models.huggingface import HFLM

    with _model_folder(job) as folder:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model: {job.model!r} cannot be loaded ({str(error).splitlines()[0][:300]}). A run, a Hugging Face "
                "folder with a tokenizer, or a name where the hub can be reached is allowed. Correct it."
            ) from None
        device = job.options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        # From scratch, positions beyond the length of the training were never seen.
        trained = job.settings.data.sequence_length if job.settings and job.settings.model.config is not None else None
        lm = HFLM(
            pretrained=model.eval().to(device),
            tokenizer=tokenizer,
            batch_size=job.options.batch_size,
            max_length=trained,
        )
        yield lm, {"device": device, "precision": str(model.dtype).removeprefix("torch."), "max_length": lm.max_length}


@contextlib.contextmanager
def _model_folder(job: _Job) -> Iterator[str]:
    """Yield what transformers loads; the export of a run's checkpoint stays for as long as it is needed."""
    if job.run is None:
        yield job.model
        return
    source = export.locate(f"{job.run}@{job.step}")
    folder = job.folder / "model"
    record = export.read_record(folder)
    if record is not None and record["manifest_sha256"] != source.manifest_sha256:
        shutil.rmtree(folder)  # a killed evaluation of an earlier checkpoint left it
    try:
        yield str(export.export_checkpoint(source, folder))
    finally:
        if not job.options.keep_export and export.read_record(folder) is not None:
            shutil.rmtree(folder)


def _write_tensorboard(run: Path, step: int, results: dict[str, Any]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard" / "evaluation")) as writer:
        for task, metric, value, _, _ in suites.flat_scores(results):
            writer.add_scalar(f"evaluation/{task}/{metric}", value, step)


def write_pending(folder: Path, pid: int) -> None:
    """Say which process works on an evaluation or hands it to Slurm, and in which job of Slurm's it runs, if in one."""
    record = {"pid": pid, "started": heartbeat.process_start(pid), "host": socket.gethostname(), "time": time.time()}
    write_json(folder / PENDING, record | {"job": os.environ.get("SLURM_JOB_ID")})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=None if path.name in (EXAMPLES, PARTIAL) else 1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's object; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
