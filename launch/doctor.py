"""Proof before a run: `deepspeed launch/doctor.py --config configs/demo.yaml [section.key=value ...]`.

Prints versions, ranks, the speed of the pool's collectives, and whether gradients through the engine are those of one
process. Writes nothing. Exit code 1 if they are not; launch/pretrain.py asks the same before it starts.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from dispersion_pretrain.settings_file import load_settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    try:
        settings = load_settings(Path(arguments.config), arguments.overrides)
        from dispersion_pretrain.doctor import refuse_wrong_gradients
        from dispersion_pretrain.machine import print_machine

        print_machine(settings)
        refuse_wrong_gradients(settings)
    except (ValueError, RuntimeError) as error:
        from dispersion_pretrain.distributed import is_own_error

        if not is_own_error(error):
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    # No destructors: after an error on one rank they would wait for collectives that the others never enter.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
