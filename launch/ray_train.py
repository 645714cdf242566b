"""A distgrow run as a script for Ray.

On a cluster of your own: `ray submit cluster.yaml launch/ray_train.py -- CONFIG a.b=c …`.
On any cluster: `ray job submit --working-dir . -- python launch/ray_train.py CONFIG a.b=c … run.dir=/shared/runs/mine`.

Options of `distgrow train` (--resume, --auto-resume) may stand anywhere. Without a config it trains
configs/digits.yaml. It runs on the cluster that it is submitted to. The number of ranks is launch.workers. A submitted
job needs an absolute run.dir, and if its workers are on several hosts, on storage that every host sees (NFS, EFS …).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout that was shipped, installed or not

from distgrow.cli import main


def arguments(given: list[str]) -> list[str]:
    """Return the command line of `distgrow train` that uses Ray as its launcher."""
    options, words = [word for word in given if word.startswith("-")], [word for word in given if word[:1] != "-"]
    named = bool(words) and "=" not in words[0]
    config, overrides = (words[0], words[1:]) if named else ("configs/digits.yaml", words)
    return ["distgrow", "train", *options, config, "launch.kind=ray", "launch.address=auto", *overrides]


if __name__ == "__main__":
    sys.argv = arguments(sys.argv[1:])
    main()
