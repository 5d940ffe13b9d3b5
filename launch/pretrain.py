"""The main job: `deepspeed launch/pretrain.py --config configs/demo.yaml [section.key=value ...]`.

The same command again goes on from the newest good checkpoint. torchrun starts the same script.
Exit codes: dispersion_pretrain/exit_codes.py.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from dispersion_pretrain import exit_codes
from dispersion_pretrain.config import Settings
from dispersion_pretrain.settings_file import dump_settings, load_settings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="checkpoint to go on from (default: the newest good one)",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the figures of the run and stop; no weights, no GPU",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="--dry-run: number of processes to plan for (default: WORLD_SIZE, or 1)"
    )
    parser.add_argument(
        "--no-corpus", action="store_true", help="--dry-run: check all but the corpora, which are not on this machine"
    )
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; LOCAL_RANK says the same
    arguments = parser.parse_intermixed_args()
    if arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"--ranks: {arguments.ranks} is not allowed. At least 1 process is needed.")
    if arguments.no_corpus and not arguments.dry_run:
        parser.error("--no-corpus: given without --dry-run. A run needs its corpora. Leave it out.")
    return arguments


def main() -> int:
    os.umask(os.umask(0o022) | 0o002)  # what a run leaves is never writable for everyone
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # DeepSpeed calls collectives by names that newer torch versions deprecate: one such line a rank helps nobody.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        settings = load_settings(Path(arguments.config), arguments.overrides)
        if arguments.print_config:
            if is_first:
                print(dump_settings(settings), end="")
            return 0
        if arguments.dry_run:
            from dispersion_pretrain.assembly import Plan

            ranks = arguments.ranks or int(os.environ.get("WORLD_SIZE", "1"))
            plan = Plan.make(settings, ranks, read_corpora=not arguments.no_corpus)
            if is_first:
                print(plan.describe(settings))
            return 0
    except (ValueError, RuntimeError) as error:
        tell(error)
        return exit_codes.FAILED
    return train(settings, arguments.resume)


def train(settings: Settings, resume: str) -> int:
    """Run to the end of training or of this start, watched; return the exit code."""
    from dispersion_pretrain.batch_finder import settle_micro_batch
    from dispersion_pretrain.crash_loop import CrashLoopError
    from dispersion_pretrain.doctor import refuse_wrong_gradients
    from dispersion_pretrain.train import run
    from dispersion_pretrain.watchdog import Watchdog

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watchdog = Watchdog(settings.faults.hang_s, rank=rank, world_size=world_size)
    code, reason = exit_codes.FAILED, ""
    try:
        settings = settle_micro_batch(settings)
        if settings.run.doctor:
            refuse_wrong_gradients(settings)
        code = run(settings, watchdog, resume=resume)
    except BaseException as error:  # also what no one expects: the ranks that are left must learn of the end
        tell(error)
        reason = f"{type(error).__name__}: {str(error)[:500]}"
        if isinstance(error, CrashLoopError):
            code = exit_codes.CRASH_LOOP
    watchdog.end(code, reason)
    return code


def tell(error: BaseException) -> None:
    """Print an error of this package as its message, any other with its traceback."""
    from dispersion_pretrain.distributed import is_own_error

    if not (isinstance(error, ValueError | RuntimeError) and is_own_error(error)):
        traceback.print_exception(error)
        return
    rank = os.environ.get("RANK", "0")
    print(f"error: {error}" if rank == "0" else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    # No destructors: after an error on one rank they would wait for collectives that the others never enter.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
