"""Ranks of which one dies before it joins the group, once: the next attempt must not find what the first one left."""

import os
import sys
import time

from distgrow.distributed.world import joined

if __name__ == "__main__":
    dies = os.environ["RANK"] == sys.argv[1] or os.environ.get("DIES") == "1"
    if dies and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        time.sleep(2)  # the other has asked for its group by now
        os._exit(1)
    for _ in range(2):
        with joined("cpu", timeout_s=20) as world:
            assert world.sum([1.0]) == [2.0]
            assert world.gather(world.rank) == [0, 1]
    os._exit(0)
