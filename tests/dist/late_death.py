"""Ranks of which one dies before it joins the group, once: the next attempt must not find what the first one left."""

import os
import sys
import time

from distgrow.distributed.world import joined

if __name__ == "__main__":
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1":
        time.sleep(2)  # the other has asked for its group by now
        os._exit(1)
    with joined("cpu", timeout_s=20) as world:
        assert world.sum([1.0]) == [2.0]
        assert world.gather(world.rank) == [0, 1]
    sys.stdout.flush()
    os._exit(0)
