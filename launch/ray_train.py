"""A distgrow run as a script for Ray: `ray submit cluster.yaml launch/ray_train.py -- CONFIG a.b=c …` on a cluster of
your own, `ray job submit --working-dir . -- python launch/ray_train.py CONFIG a.b=c …` anywhere; options of
`distgrow train` (--resume, --auto-resume) may stand anywhere.

Without a config it trains configs/digits.yaml. It runs on the cluster that it is submitted to. The number of ranks is
launch.workers; run.dir must be on storage that every host sees (NFS, EFS …) when the workers are on several hosts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout that was shipped, installed or not

from distgrow.cli import main


def arguments(given: list[str]) -> list[str]:
    """The command line of `distgrow train` with Ray as its launcher."""
    options, words = [word for word in given if word.startswith("-")], [word for word in given if word[:1] != "-"]
    named = bool(words) and "=" not in words[0]
    config, overrides = (words[0], words[1:]) if named else ("configs/digits.yaml", words)
    return ["distgrow", "train", *options, config, "launch.kind=ray", "launch.address=auto", *overrides]


if __name__ == "__main__":
    sys.argv = arguments(sys.argv[1:])
    main()
