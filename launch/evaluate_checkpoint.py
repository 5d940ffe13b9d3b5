#!/usr/bin/env python3
"""Evaluate one checkpoint or model with a suite of lm-eval tasks.

python launch/evaluate_checkpoint.py --model runs/demo@100 --suite configs/eval/offline.yaml
python launch/evaluate_checkpoint.py --watch runs/demo --suite configs/eval/offline.yaml   # as they are committed
python launch/evaluate_checkpoint.py --model FOLDER_OR_HUB_NAME --suite configs/eval/paper.yaml --out DIR --processes 8
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from dispersion_pretrain import evaluation_ranks
from dispersion_pretrain.evaluate import Options, evaluate_model
from dispersion_pretrain.evaluation_jobs import watch
from dispersion_pretrain.suites import format_table


def main(arguments: list[str] | None = None) -> int:
    """Evaluate and print a table; 1 if a task or the whole failed, with one line of explanation each."""
    os.umask(os.umask(0o022) | 0o002)  # what a run leaves is never writable for everyone
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="RUN, RUN@STEP, Hugging Face folder or name on the hub")
    which.add_argument(
        "--watch", type=Path, metavar="RUN", help="every checkpoint of a run, until that of its last step"
    )
    parser.add_argument("--poll", type=_positive, default=30, metavar="SECONDS", help="of --watch; default 30")
    parser.add_argument("--suite", required=True, help="configs/eval/paper.yaml, configs/eval/offline.yaml or your own")
    parser.add_argument("--out", type=Path, help="folder; default for a run: RUN/evaluations/SUITE/step-XXXXXXXX")
    parser.add_argument("--corpus", help="held-out text of the offline suite; default: the run's own corpus")
    parser.add_argument(
        "--datasets", type=Path, metavar="DIR", help="data sets of launch/mirror_datasets.py, not the hub"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: CUDA where there is one")
    parser.add_argument("--processes", type=_positive, default=1, help="that share the examples, a GPU each")
    parser.add_argument("--batch-size", type=_batch_size, default=8, help="a number, or auto; default 8")
    parser.add_argument("--max-length", type=_positive, help="tokens of context; default: of a run, its training's")
    parser.add_argument("--limit", type=_positive, help="examples a task, where the suite has more")
    parser.add_argument("--keep-export", action="store_true", help="keep the Hugging Face folder OUT/model of a run")
    parser.add_argument("--force", action="store_true", help="repeat what was evaluated before")
    named = vars(parser.parse_args(arguments))
    model, suite, out = named.pop("model"), named.pop("suite"), named.pop("out")
    watched, poll_s, processes = named.pop("watch"), named.pop("poll"), named.pop("processes")
    if watched is not None and max(processes, evaluation_ranks.count()) > 1:
        parser.error("--processes: a run is watched by one process. Leave it out, or evaluate with --model.")
    if watched is not None and out is not None:
        parser.error("--out: each checkpoint of a watched run has a folder of its own. Leave it out.")
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        options = Options(**named)
        if processes > 1 and evaluation_ranks.count() == 1:
            return evaluation_ranks.start(processes, main, sys.argv[1:] if arguments is None else arguments)
        if watched is not None:
            return 1 if watch(watched, suite, options, poll_s) else 0
        results = evaluate_model(model, suite, out, options)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if not results:  # the first process tells
        return 0
    if results["results"]:
        print(format_table(results))
    for message in results["errors"].values():
        print(message, file=sys.stderr)
    return 1 if results["errors"] else 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed. 1 or more is. Raise it.")
    return number


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


if __name__ == "__main__":
    sys.exit(main())
