"""What heartbeats cost: a mark of the loop, and a tick of the watchdog's thread (one in 5 s)."""

from __future__ import annotations

import tempfile
import timeit
from pathlib import Path

from dispersion_pretrain import heartbeat
from dispersion_pretrain.watchdog import Watchdog


def main() -> None:
    count = 200_000
    of_mark_s = min(timeit.repeat(lambda: heartbeat.mark("forward pass"), number=count, repeat=5)) / count
    print(f"mark             {1e9 * of_mark_s:8.0f} ns")
    count = 50_000

    def inside() -> None:
        with heartbeat.inside("the pool's all-gather"):
            pass

    of_part_s = min(timeit.repeat(inside, number=count, repeat=5)) / count
    print(f"mark of a part   {1e9 * of_part_s:8.0f} ns")
    with tempfile.TemporaryDirectory() as folder:
        watchdog = Watchdog(1800.0, rank=0, world_size=2)
        watchdog.publish(Path(folder), first_step=0)
        of_tick_s = min(timeit.repeat(watchdog._tick, number=20, repeat=5)) / 20
        watchdog.end(0)
    print(f"tick             {1e6 * of_tick_s:8.0f} us")


if __name__ == "__main__":
    main()
