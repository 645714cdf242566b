"""One peer's training, in this process and its siblings: what peers.py starts, by torchrun or, for Ray, by itself."""

import argparse
import os
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from peer_loops.work import Work, checked, timed

from distgrow.launch.local import leave


def work_of(options: argparse.Namespace) -> Work:
    """The work that is asked for."""
    kind, _, epochs = options.kind.partition("-")
    if kind == "timed":
        return timed(options.folder, int(epochs))
    return checked(options.folder, resume=options.resume, stop_after=options.stop_after)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", required=True, help="checked, or timed-EPOCHS with the epochs of a stage")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop-after", type=int, default=0)
    parser.add_argument("--world", type=int, default=2, help="of Ray's workers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loop = import_module(f"peer_loops.{options.peer}_loop")
    if "RANK" in os.environ:
        loop.train(work_of(options))
        leave()
    loop.train(partial(work_of, options), options.folder, options.world)


if __name__ == "__main__":
    main()
