"""The same model, data, batches and growth by hand, by others' trainers and by distgrow: time, and what goes wrong.

    python benchmarks/peers.py [--quick] [--markdown] [--peer bare distgrow …]

Every peer is a file of peer_loops/, written as its users would, and trains in two processes of one thread each. Timed
rounds take turns. What goes wrong is told by hooks on the model and on torch's optimizers: which samples each update
was made of, whether its gradient is their mean, and the learning rate, also after a kill and a resume.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from paired import Report, Spread, arguments, keep, show, spread, tell
from peer_checks import Check, Resumption, Update, read
from peer_loops.work import Work, checked, timed

HERE = Path(__file__).parent
WORLD, DIES_AFTER, TIMEOUT_S = 2, 60, 300
#: Peer, in the tables; the package that it needs.
PEERS = {
    "bare": ("bare DDP", None),
    "accelerate": ("Accelerate", "accelerate"),
    "lightning": ("Lightning", "lightning"),
    "ray": ("Ray Train", "ray"),
    "deepspeed": ("DeepSpeed's engine", "deepspeed"),
    "reference": ("published code's way", None),
    "distgrow": ("distgrow", None),
}
QUICK = ("bare", "reference", "distgrow")


class PeerFailed(Exception):
    """A peer's training ended with an error; the message is the end of what it said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A peer's rounds: seconds per 10⁴ samples at each batch, seconds lost at a transition, all over distgrow's."""

    peer: str
    stages: dict[str, Spread]
    transition: Spread
    ratio: Spread  #: the peer's seconds for the whole training over distgrow's, round by round


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a peer does wrong, and what its user has to write."""

    peer: str
    lines: int
    check: Check
    resumption: Resumption | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A peer that takes no part."""

    peer: str
    reason: str


# ── running them ────────────────────────────────────────────────────────────────────────────────────────────────


def start(peer: str, work: Work, kind: str) -> None:
    """Train in processes of its own, to the end or to the update after which it dies. PeerFailed for other ends."""
    words = [str(HERE / "peer_run.py"), peer, str(work.folder), "--kind", kind, f"--stop-after={work.stop_after}"]
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    finished = subprocess.run(
        [sys.executable, *([] if peer == "ray" else group), *words, *["--resume"] * work.resume],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if finished.returncode and not work.stop_after:
        raise PeerFailed(finished.stderr.strip()[-400:])


def absent(names: Iterable[str]) -> dict[str, str]:
    """Return why some of the peers cannot take part."""
    missing = {name: package for name in names if (package := PEERS[name][1]) and not find_spec(package)}
    return {name: f"not installed: pip install -e '.[bench]', or {package}" for name, package in missing.items()}


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Hold one timed training."""

    stages: dict[int, float]  #: batch → seconds per 10⁴ samples
    transition: float  #: seconds, the median over transitions
    seconds: float  #: from the first update's end to the last's


def time_once(peer: str, epochs: int) -> Round:
    """Train once and watch the updates."""
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        work = timed(Path(folder), epochs)
        start(peer, work, f"timed-{epochs}")
        return timing(work, read(work, WORLD)[0])


def timing(work: Work, done: Sequence[Update]) -> Round:
    """A stage's seconds are those between its first and last update; what the first took beyond the median is lost."""
    stages: dict[int, float] = {}
    lost: list[float] = []
    before: Update | None = None
    for batch, group in groupby(_staged(work, done), key=lambda pair: pair[0]):
        own = [update for _, update in group]
        steps = [later.moment - earlier.moment for earlier, later in zip(own, own[1:], strict=False)]
        stages[batch] = (own[-1].moment - own[0].moment) / sum(update.rows for update in own[1:]) * 1e4
        if before is not None:
            lost.append(own[0].moment - before.moment - statistics.median(steps))
        before = own[-1]
    return Round(stages=stages, transition=statistics.median(lost), seconds=done[-1].moment - done[0].moment)


def _staged(work: Work, done: Sequence[Update]) -> Iterator[tuple[int, Update]]:
    before = 0
    for update in done:
        yield work.batch_of(min(work.epochs - 1, before // len(work.data))), update
        before += update.rows


def time_all(peers: Sequence[str], rounds: int, epochs: int) -> list[Timing]:
    """All peers in turn, `rounds` times."""
    found: dict[str, list[Round]] = {peer: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            found[peer].append(time_once(peer, epochs))
            tell(f"{peer}: {found[peer][-1].seconds:.2f} s")
    return [_timing(peer, own, found["distgrow"]) for peer, own in found.items()]


def _timing(peer: str, own: Sequence[Round], ours: Sequence[Round]) -> Timing:
    return Timing(
        peer=peer,
        stages={str(batch): spread([round.stages[batch] for round in own]) for batch in own[0].stages},
        transition=spread([round.transition for round in own]),
        ratio=spread([mine.seconds / other.seconds for mine, other in zip(own, ours, strict=True)]),
    )


# ── correctness ─────────────────────────────────────────────────────────────────────────────────────────────────


def judge(peer: str, *, resuming: bool) -> Verdict:
    """One whole training, and one that dies and is resumed."""
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        work = checked(Path(folder))
        start(peer, work, "checked")
        whole, beside = read(work, WORLD)
    resumption = resume(peer, whole) if resuming else None
    tell(f"{peer}: {len(whole)} updates checked")
    return Verdict(peer=peer, lines=lines_of(peer), check=Check.of(work, whole, beside), resumption=resumption)


def resume(peer: str, whole: Sequence[Update]) -> Resumption:
    """Die after DIES_AFTER updates, resume."""
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        work = checked(Path(folder), stop_after=DIES_AFTER)
        start(peer, work, "checked")
        died = len(read(work, WORLD)[0])
        if died < DIES_AFTER - 1:  # of the last, a rank may not have written its line
            raise PeerFailed(f"{peer} ended after {died} updates, before it was to die")
        start(peer, checked(Path(folder), resume=True), "checked")
        return Resumption.of(work, whole, read(work, WORLD)[0], died)


def lines_of(peer: str) -> int:
    """Lines of code in a peer's file, imports included; comments, docstrings and empty lines not."""
    source = (HERE / "peer_loops" / f"{peer}_loop.py").read_text(encoding="utf-8")
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in empty]
    return len({line for t in tokens if not t.string.startswith('"""') for line in range(t.start[0], t.end[0] + 1)})


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────


def time_report(rows: Sequence[Timing], others: Sequence[Absent]) -> Report:
    """Return the table of seconds."""
    batches = list(rows[0].stages) if rows else []
    columns = ["peer", *(f"b = {batch}" for batch in batches), "lost at a transition (s)", "time ÷ distgrow's"]
    table = [[PEERS[row.peer][0], *map(str, row.stages.values()), str(row.transition), str(row.ratio)] for row in rows]
    table += [[PEERS[row.peer][0], row.reason, *[""] * (len(columns) - 2)] for row in others]
    return Report(title="Seconds per 10⁴ samples: median (quartiles)", columns=columns, rows=table)


def check_report(rows: Sequence[Verdict], others: Sequence[Absent]) -> Report:
    """Return the table of what goes wrong."""
    columns = [
        "peer", "lines", "evaluations beside", "other batches", "wrong gradients", "samples not once an epoch",
        "after a resume: wrong η", "samples not once an epoch", "updates made again",
    ]  # fmt: skip
    table = [[PEERS[row.peer][0], *verdict_cells(row)] for row in rows]
    table += [[PEERS[row.peer][0], row.reason, *[""] * (len(columns) - 2)] for row in others]
    return Report(title="What is written and what goes wrong", columns=columns, rows=table)


def verdict_cells(row: Verdict) -> list[str]:
    """Return a row of that table without the peer's name."""
    check, resumed = row.check, row.resumption
    again = [resumed.rates, resumed.seen, str(resumed.lost)] if resumed else ["not run"] * 3
    beside = f"{check.beside / check.evaluations:.0%}"
    return [str(row.lines), beside, check.batches, check.gradients, check.seen, *again]


def main() -> None:
    """Measure, keep, show."""
    parser = arguments(__doc__, f"a minute: {', '.join(QUICK)} alone, no resume, two short rounds")
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), default=list(PEERS), help="which; distgrow always")
    parser.add_argument("--rounds", type=int, default=5, help="timed trainings of each")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give at least 1")
    names = [name for name in PEERS if name in options.peer or name == "distgrow"]
    reasons = absent(names)
    if options.quick:
        reasons |= {name: "left out by --quick" for name in names if name not in QUICK}
    others = [Absent(peer=name, reason=reason) for name, reason in reasons.items()]
    there = [name for name in names if name not in reasons]
    verdicts = [judge(name, resuming=not options.quick) for name in there]
    timings = time_all(there, *((2, 1) if options.quick else (options.rounds, 4)))
    if options.jsonl:
        keep(options.jsonl, [*verdicts, *timings, *others])
    show([time_report(timings, others), check_report(verdicts, others)], markdown=options.markdown)


if __name__ == "__main__":
    main()
