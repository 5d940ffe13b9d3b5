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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from dispersion_pretrain import checkpoint, evaluation_ranks, export, heartbeat, held_out, lm_tasks, provenance, suites
from dispersion_pretrain.config import Settings
from dispersion_pretrain.corpus import read_manifest
from dispersion_pretrain.model import refuse_own_code, short
from dispersion_pretrain.settings_file import load_settings
from dispersion_pretrain.suites import Suite, SuiteTask, load_suite

FORMAT_VERSION = 1
RESULTS, FAILURE, PENDING = "results.json", "failed.json", "pending"
EXAMPLES, PARTIAL = "examples.json", "partial.json"


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Raises:
        ValueError: `device` is none of this machine.
    """

    corpus: str | None = None  # of held-out text; None: that of the run
    device: str | None = None  # None: CUDA where there is one, else the CPU
    batch_size: int | str = 8  # or "auto"
    limit: int | None = None  # examples a task, where the suite has more
    max_length: int | None = None  # tokens of context; None: those of a run from scratch, else the model's own
    force: bool = False  # repeat what is there
    keep_export: bool = False
    datasets: Path | None = None  # a mirror of the data sets; None: the hub or its cache

    def __post_init__(self) -> None:
        """Check before anything is loaded."""
        if self.device is not None:
            evaluation_ranks.check_device(self.device)


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

    @property
    def cache(self) -> str | None:
        return self.settings.data.cache if self.settings and self.options.corpus is None else None

    @property
    def trained_length(self) -> int | None:
        """Of a run from scratch: positions beyond it were never seen."""
        return self.settings.data.sequence_length if self.settings and self.settings.model.config is not None else None

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
            **({} if self.options.max_length is None else {"max_length": self.options.max_length}),
        }

    def _model_identity(self) -> str:
        if self.checkpoint is not None:
            return export.checkpoint_hash(self.checkpoint)
        if not Path(self.model).is_dir():
            return self.model
        files = sorted(path for path in Path(self.model).iterdir() if path.is_file())
        described = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(described).encode()).hexdigest()


@dataclass(frozen=True)
class _Work:
    """What every rank needs to know to take part."""

    model: str  # as named
    folder: str  # what transformers loads
    tasks: list[SuiteTask]
    corpus: str | None
    cache: str | None
    trained_length: int | None
    options: Options


def evaluation_folder(run_folder: Path, suite_name: str, step: int) -> Path:
    """Where the results of a run's checkpoint lie."""
    return run_folder / "evaluations" / suite_name / f"step-{step:08d}"


def evaluate_model(model: str, suite: str | Path, out: Path | None, options: Options) -> dict[str, Any]:
    """Run a suite on a model, write results.json and return its content; whole earlier results are returned unchanged.

    The scores of a run go into its TensorBoard files too. Tasks that fail are in `errors` while the others go on; a
    repetition runs only those that are missing. A second evaluation into the same folder waits for the first.
    Collective: all ranks, where a launcher started several; those other than 0 return nothing.

    Args:
        model: RUN_FOLDER (newest good checkpoint), RUN_FOLDER@STEP, a Hugging Face folder, or a name on the hub.
        suite: YAML file.
        out: folder of the results; None: that of the run's step.

    Raises:
        ValueError: the suite, the model or `out` is not what it must be.
        RuntimeError: the checkpoint is damaged, or its export is not the model that was trained.
    """
    if evaluation_ranks.count() > 1:
        evaluation_ranks.join(options.device)
    with evaluation_ranks.one_leads() as tell:
        if evaluation_ranks.rank() > 0:
            work = tell(None)
            if work is not None:
                list(_work_through(work, {}))
            return {}
        job = _plan(model, load_suite(suite), out, options)
        job.folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(job.folder):
            (job.folder / FAILURE).unlink(missing_ok=True)
            write_pending(job.folder, os.getpid())
            try:
                return _evaluate(job, tell, chosen_folder=out is not None)
            except Exception as error:
                write_json(job.folder / FAILURE, {"time": time.time(), "error": f"{type(error).__name__}: {error}"})
                raise
            finally:
                (job.folder / PENDING).unlink(missing_ok=True)


def _plan(model: str, suite: Suite, out: Path | None, options: Options) -> _Job:
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file. The name of a folder is needed. Choose another.")
    parts = export.split_run(model)
    if parts is None:
        before, _, word = model.rpartition("@")
        if export.split_run(before) is not None:
            raise ValueError(
                f"--model: {word!r} in {model} is no step. RUN@STEP with a whole number is allowed. Correct it."
            )
        if out is None:
            raise ValueError(f"--out: is missing, and {model} is no run with a folder for results. Give --out.")
        return _Job(model, suite, None, None, None, out, options)
    run, step = parts
    if step is None:
        step = export.locate(model).info.step
    folder = out or evaluation_folder(run, suite.name, step)
    if step not in checkpoint.committed_steps(run) and not folder.exists():  # else results, or a job to say why not
        export.locate(model)  # says which steps there are
    settings = load_settings(run / "config.yaml")
    return _Job(model, suite, run, step, settings, folder, options)


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: another evaluation works here, waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _evaluate(job: _Job, tell: Callable[[Any], Any], *, chosen_folder: bool) -> dict[str, Any]:
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
    errors: dict[str, str] = {}
    with _model_folder(job) as folder:
        work = _Work(job.model, folder, missing, job.corpus, job.cache, job.trained_length, job.options)
        for task, found, of_task, error in _work_through(tell(work), details):
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


def _work_through(
    work: _Work, details: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str | None]]:
    """Run tasks and yield what `lm_tasks.run_tasks` does, after the tasks that cannot be loaded. Collective: all ranks.

    `details` tells how the model was set up.
    """
    with tempfile.TemporaryDirectory(prefix="evaluation-") as scratch:
        text = held_out.Text(work.corpus, work.cache, Path(scratch))
        loaded, errors = lm_tasks.load_tasks(work.tasks, text, work.options.datasets)
        errors = evaluation_ranks.union(errors)
        yield from ((task, {}, {}, error) for task, error in errors.items())
        able = {task: objects for task, objects in loaded.items() if task not in errors}
        if able:
            lm = _language_model(work, details)
            yield from lm_tasks.run_tasks(lm, work.tasks, able, work.options.limit)


def _language_model(work: _Work, details: dict[str, Any]) -> Any:
    """Return lm-eval's view of the model.

    Raises:
        ValueError: it cannot be loaded, or its tokenizer has tokens that it has no embedding for.
    """
    from lm_eval.models.huggingface import HFLM

    try:
        tokenizer = AutoTokenizer.from_pretrained(work.folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(work.folder, dtype="auto", trust_remote_code=False)
    except Exception as error:  # whatever one of transformers' many classes makes of a folder's files
        refuse_own_code(f"--model: {work.model!r}", error)
        raise ValueError(
            f"--model: {work.model!r} cannot be loaded ({short(error)}). A run, a Hugging Face "
            "folder with a tokenizer, or a name where the hub can be reached is allowed. Correct it."
        ) from None
    largest, rows = max(tokenizer.get_vocab().values(), default=-1), int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if largest >= rows:
        raise ValueError(
            f"--model: the tokenizer of {work.model!r} has ids up to {largest}, its embedding {rows} rows. A tokenizer "
            "whose every token has a row is needed. Put the one that the model was trained with beside it."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    wanted = work.options.max_length
    if wanted is not None and positions is not None and wanted > positions:
        raise ValueError(
            f"--max-length: {wanted}, but {work.model!r} has {positions} positions. At most that many are allowed. "
            "Lower it."
        )
    device = evaluation_ranks.device(work.options.device)
    lm = HFLM(
        pretrained=model.eval().to(device),
        tokenizer=tokenizer,
        batch_size=work.options.batch_size,
        max_length=wanted or work.trained_length,
    )
    evaluation_ranks.divide_examples(lm)
    details |= {
        "device": device.type,
        "processes": evaluation_ranks.count(),
        "precision": str(model.dtype).removeprefix("torch."),
        "max_length": lm.max_length,
    }
    return lm


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
