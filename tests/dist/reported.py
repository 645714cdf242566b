"""Report updates to Weights & Biases, offline, as a resumed run does, and be killed unless UPDATES = ALL.

`python tests/dist/reported.py FOLDER UPDATES ALL`
"""

import os
import signal
import sys
import time
from pathlib import Path

from distgrow.tracking.spec import Opening, Point, WandB

FIGURES = [f"figure_{number}" for number in range(25)]  # rows as long as those of a run


def main() -> None:
    """Open the run, send the updates that it lacks, up to UPDATES."""
    folder, updates, all_ = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    service = WandB(mode="offline", project="tests").open(Opening(folder=folder, settings={}, id="abc"))
    for step in range(updates):
        for kind in ("step", "eval") if step % 10 == 9 else ("step",):
            if step > service.seen.get(kind, -1):
                figures = dict.fromkeys(FIGURES, float(step))
                service.publish([Point(kind=kind, step=step, time_s=time.time(), figures=figures)])
    if updates < all_:
        os.kill(os.getpid(), signal.SIGKILL)
    service.finish("done")


if __name__ == "__main__":
    main()
