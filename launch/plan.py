#!/usr/bin/env python3
"""Plan a run without a GPU: memory, step time, communication, checkpoints, days and GPU-hours.

python launch/plan.py --config configs/pretrain/qwen3_0.6b.yaml --nodes 80 --gpus-per-node 8 --gpu h100

Memory is that of the training module, traced on shapes; time rests on assumptions that the plan prints and that options
such as --mfu 0.4 replace.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dispersion_pretrain import exit_codes
from dispersion_pretrain.plan_machine import ASSUMED, Machine, load_machine
from dispersion_pretrain.settings_file import load_settings


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="GPUs of a node (default: 8)")
    parser.add_argument(
        "--gpu",
        required=True,
        metavar="NAME|FILE",
        help="h100, h200, a100, or a YAML file like those in configs/machines",
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the scaling as .png or .svg")
    assumptions = parser.add_argument_group("assumptions, in place of the machine's")
    for name in ASSUMED:
        text = str(Machine.model_fields[name].description)
        if name == "overlaps":
            assumptions.add_argument("--overlaps", action=argparse.BooleanOptionalAction, help=text)
        else:
            assumptions.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=text)
    options = parser.parse_intermixed_args(arguments)
    for name in ("nodes", "gpus_per_node"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(options, name)} is not allowed. At least 1 is needed.")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; 1 with an explanation where settings, machine and numbers do not fit together."""
    options = parse_arguments(arguments)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for devices and warn that there is none
    try:
        settings = load_settings(options.config, options.overrides)
        changes = {name: getattr(options, name) for name in ASSUMED if getattr(options, name) is not None}
        machine = load_machine(options.gpu, changes)
        from dispersion_pretrain.plan import Planner  # takes seconds: only for arguments that can be right
        from dispersion_pretrain.plan_text import describe

        planner = Planner(settings, machine, nodes=options.nodes, gpus_per_node=options.gpus_per_node)
        print(describe(planner))
        if options.picture is not None:
            from dispersion_pretrain.plan_picture import draw_scaling

            draw_scaling(planner, options.picture)
            print(f"\npicture: {options.picture}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
