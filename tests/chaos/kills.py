"""Kills of a run, at random moments and before the writes of its saves, and the table of what came of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from chaos.survival import NUM_STEPS, RANKS, SAVE_EVERY, Kill, Outcome, Survivor

_VICTIMS = ["one rank", "all ranks", "launcher"]
_COUNTED_SAVE = 10 * SAVE_EVERY  # a save in the middle of a run: it removes an older checkpoint as well


def random_kills(number: int, run_s: float, dice: random.Random) -> list[Kill]:
    """So many, in turns at a moment uniform over the seconds of a whole run, and in the midst of training.

    The first kind meets starts and ends as well, and on a busy machine, where starts take long, hardly anything else.
    The second counts the steps of a start, and is anywhere within the next.
    """
    kills = []
    for one in range(number):
        who = _VICTIMS[one % len(_VICTIMS)]
        if one % 2 == 0:
            kills.append(Kill(who, after_s=dice.uniform(0, run_s)))
        else:
            kills.append(
                Kill(who, after_steps=dice.randint(1, NUM_STEPS // 4), delay_s=dice.uniform(0, run_s / NUM_STEPS))
            )
    return kills


def writes_of_a_save(run: Survivor) -> list[Kill]:
    """A kill before each write of each rank."""
    found = []
    for rank in range(RANKS):
        (save,) = [line for line in run.lines(f"points_{rank}.jsonl") if line["step"] == _COUNTED_SAVE]
        assert save["tier"] == "shared"
        for point, name in enumerate(save["writes"]):
            found.append(Kill(("one rank", "job")[point % 2], rank=rank, point=point, name=name))
    return found


def survive(
    kills: Iterable[Kill], folder: Path, texts: Path, undisturbed: Survivor, dice: random.Random
) -> list[Outcome]:
    """Do all kills, in as many runs over the corpus `texts` as they need, and check each run in the end."""
    outcomes: list[Outcome] = []
    waiting, number = list(kills), 0
    while waiting:
        run = Survivor(folder / f"run-{number:02d}", texts)
        while waiting and not run.is_done():
            began = time.monotonic()
            outcome = run.suffer(waiting[0], dice)
            if outcome is None:
                assert waiting[0].point is None or run.starts > 1, f"a whole run never came to it: {waiting[0]}"
                if run.starts == 1:  # the machine is faster now than when the undisturbed run was timed
                    waiting[0] = replace(waiting[0], after_s=(waiting[0].after_s or 0.0) / 2)
                break
            outcomes.append(outcome)
            waiting.pop(0)
            print(f"{len(outcomes)}: {describe(outcome, run)}, {time.monotonic() - began:.0f} s", flush=True)
        run.finish()
        run.check(undisturbed)
        outcomes[len(outcomes) - len(run.outcomes) :] = run.measured()
        print(f"run {number}: {len(run.outcomes)} kills, {run.starts} starts, as undisturbed", flush=True)
        number += 1
    return outcomes


def describe(outcome: Outcome, run: Survivor) -> str:
    kill = outcome.kill
    moment = f"after {time.monotonic() - outcome.start:.0f} s"
    if kill.point is not None:
        moment = f"before write {kill.point} of rank {kill.rank}, {kill.name}"
    return f"killed {outcome.victim} {moment}, at step {run.last_step()}"


def _moment_of(kill: Kill) -> str:
    if kill.point is not None:
        return "before a write of a save"
    return "in the midst of training" if kill.after_steps else "at a random second"


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'kill':42} {'kills':>5} {'lost steps':>16} {'refused':>7} {'start to first update, s':>26}")
    print(f"{'':42} {'':>5} {'median':>10} {'max':>5} {'':>7} {'median':>20} {'max':>5}")
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(f"{outcome.victim}, {_moment_of(outcome.kill)}", []).append(outcome)
    rows["all"] = outcomes
    for kind, group in rows.items():
        lost = [outcome.lost_steps for outcome in group]
        seconds = [outcome.first_step_s for outcome in group if outcome.first_step_s is not None]
        waited = f"{statistics.median(seconds):20.1f} {max(seconds):5.1f}" if seconds else f"{'-':>20} {'-':>5}"
        print(
            f"{kind:42} {len(group):5} {statistics.median(lost):10.0f} {max(lost):5} "
            f"{sum(outcome.refused for outcome in group):7} {waited}"
        )
