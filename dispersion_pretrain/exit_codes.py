"""Exit codes of the main job, and what they mean to whoever started it. Slurm's script acts on them.

torchrun turns each of them into 1 and names the rank's own code in its summary; the deepspeed launcher and srun pass
them on.
"""

from __future__ import annotations

DONE = 0  # the last step is made and saved
FAILED = 1  # an error, told on stderr; the same command may fail the same way
REQUEUE = 85  # stopped by a signal or by run.max_time, state saved: start me again
HANG = 86  # no progress, or a rank is gone: ended without a save; start me again, the newest checkpoint is good
CRASH_LOOP = 87  # the last two starts failed at one step: do not start me again before something has changed
KILLED = 128  # plus a signal's number: it came twice, and nothing was saved
