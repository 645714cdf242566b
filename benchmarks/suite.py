"""Runs all benchmarks, one after the other, and puts their tables into benchmarks/README.md.

    python benchmarks/suite.py [--quick] [--only NAME …] [--into FILE] [--list]

Each benchmark has a section between markers; what is written outside of them stays as it is. A benchmark that fails or
takes too long leaves its section as it was, marked as stale, and the others run all the same; the exit code is then 1.
--quick is a smoke run whose numbers mean nothing: it writes runs/bench-quick/tables.md and never the README. What each
benchmark printed is kept in runs/bench (runs/bench-quick).
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from suite_sections import Run, finished, section_of, source, stale

HERE = Path(__file__).parent
README = HERE / "README.md"
HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A script, how it is run, and where its tables belong."""

    name: str  #: of its section
    script: str  #: seen from the folder that the suite runs in
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] = ("--quick",)  #: instead of `options`
    limit_s: float = HOUR
    quick_limit_s: float = 600
    needs: str | None = None  #: what it cannot run without: a path
    on_gpu: bool = False  #: whether it cannot run without a GPU, but for its smoke run
    writes_itself: bool = False  #: whether its `--readme` writes the section
    images: tuple[tuple[str, str], ...] = ()  #: (caption, file) of what it draws, beside the README

    def command(self, *, quick: bool) -> list[str]:
        """Return the command without the interpreter."""
        return [self.script, *(self.quick if quick else self.options)]

    def lacks(self, root: Path, *, quick: bool) -> str | None:
        """Return what it needs and does not find, in words."""
        if self.on_gpu and not quick and not torch.cuda.is_available():
            return "there is no GPU that torch sees"
        missing = [path for path in (self.script, self.needs) if path is not None and not (root / path).exists()]
        return f"there is no {missing[0]}" if missing else None


PLANNING = "What deciding an update costs, by ranks, updates so far, samples and stages"
BYTES = "Bytes that a rank sends per sample, by batch, of the CNN's gradients"
STALENESS = "Evaluations by (τ + 1)·b, and updates by τ + 1, to a target loss, beside the curve of the theory"
IMAGES = "data/cifar10"
SUITE = (
    Benchmark(name="overhead", script="benchmarks/overhead.py"),
    Benchmark(
        name="overhead-own",
        script="benchmarks/overhead.py",
        options=("--optimizer", "Adadelta"),
        quick=("--optimizer", "Adadelta", "--quick"),
    ),
    Benchmark(
        name="overhead-deepspeed",
        script="benchmarks/overhead.py",
        options=("--engine", "deepspeed"),
        quick=("--engine", "deepspeed", "--quick"),
    ),
    Benchmark(name="fsdp", script="benchmarks/fsdp.py"),
    Benchmark(
        name="gpu", script="benchmarks/gpu.py", options=("--device", "cuda"), quick=("--device", "cpu", "--quick"),
        on_gpu=True, limit_s=HOUR / 4,
    ),
    Benchmark(
        name="loader", script="benchmarks/loader.py", options=("--path", IMAGES), quick=("--path", IMAGES, "--quick"),
        needs=IMAGES,
    ),
    Benchmark(name="files", script="benchmarks/files.py"),
    Benchmark(name="layerwise", script="benchmarks/layerwise.py"),
    Benchmark(name="items", script="benchmarks/items.py"),
    Benchmark(name="pruning", script="benchmarks/pruning.py"),
    Benchmark(name="recovery", script="benchmarks/recovery.py"),
    Benchmark(name="measuring", script="benchmarks/measuring.py"),
    Benchmark(name="tracked", script="benchmarks/tracked.py"),
    Benchmark(name="samplings", script="benchmarks/samplings.py"),
    Benchmark(
        name="experts", script="benchmarks/experts.py", options=("--plots", "benchmarks/plots"),
        images=(("What is left of the variance, by active experts and rules", "plots/experts.png"),),
    ),
    Benchmark(name="arbiter", script="benchmarks/arbiter.py"),
    Benchmark(name="certified", script="benchmarks/certified.py"),
    Benchmark(
        name="staleness",
        script="benchmarks/staleness.py",
        options=("--plots", "benchmarks/plots"),
        images=((STALENESS, "plots/staleness.png"),),
    ),
    Benchmark(name="overlap", script="benchmarks/overlap.py"),
    Benchmark(name="adam-noise", script="benchmarks/adam_noise.py"),
    Benchmark(name="extrapolation", script="benchmarks/extrapolation.py"),
    Benchmark(name="what-if", script="benchmarks/what_if.py"),
    Benchmark(
        name="scale",
        script="benchmarks/scale.py",
        options=("--plots", "benchmarks/plots"),
        images=((PLANNING, "plots/scale-planning.png"), (BYTES, "plots/scale-bytes.png")),
    ),
    Benchmark(name="peers", script="benchmarks/peers.py"),
    Benchmark(
        name="sfo-quadratic", script="benchmarks/sfo.py", options=("--task", "quadratic", "--seeds", "3"),
        quick=("--task", "quadratic", "--smoke"), limit_s=2 * HOUR, writes_itself=True,
    ),
    Benchmark(
        name="sfo-digits", script="benchmarks/sfo.py", options=("--task", "digits", "--seeds", "3"),
        quick=("--task", "digits", "--smoke"), limit_s=4 * HOUR, writes_itself=True,
    ),
    Benchmark(
        name="scale-quadratic", script="benchmarks/scale_time.py", options=("--task", "quadratic"),
        quick=("--task", "quadratic", "--smoke"), writes_itself=True,
    ),
    Benchmark(
        name="scale-digits", script="benchmarks/scale_time.py", options=("--task", "digits"),
        quick=("--task", "digits", "--smoke"), writes_itself=True,
    ),
    *(
        Benchmark(
            name=f"objective-{task}", script="benchmarks/scale_time.py", options=("--task", task, "--objective"),
            quick=("--task", task, "--objective", size), writes_itself=True,
        )
        for task, size in (("quadratic", "--quick"), ("digits", "--smoke"))  # a smoke run of one reaches no target
    ),
    Benchmark(
        name="sfo-cifar10", script="benchmarks/sfo.py", needs=IMAGES, limit_s=24 * HOUR, writes_itself=True,
        options=("--task", "cifar10", "--seeds", "3", "--subset", "3000", "--epochs", "24"),
        quick=("--task", "cifar10", "--quick", "--policy", "constant", "auto"),
    ),
    Benchmark(
        name="sfo-text", script="benchmarks/sfo.py", options=("--task", "text", "--seeds", "3"),
        quick=("--task", "text", "--smoke"), limit_s=24 * HOUR, writes_itself=True,
    ),
    *(
        Benchmark(
            name=f"front-{task}", script="benchmarks/front.py", options=("--task", task), needs=needs,
            quick=("--task", task, "--quick"), limit_s=hours * HOUR, writes_itself=True,
        )
        for task, hours, needs in (
            ("digits", 2, None), ("digits-mlp", 2, None), ("cifar", 48, IMAGES), ("text", 48, None),
            ("text-muon", 48, None), ("held-teacher", 2, None), ("held-packages", 2, None),
        )
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """How benchmarks are run, and where their tables and what else they print go."""

    into: Path  #: Markdown
    logs: Path
    quick: bool
    root: Path = HERE.parent  #: the folder that they run in

    def run(self, benchmarks: Sequence[Benchmark]) -> list[str]:
        """Run all of them. Return a line for each that failed."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self.into.parent.mkdir(parents=True, exist_ok=True)
        commit, failures = source(self.root), list[str]()
        for benchmark in benchmarks:
            run = Run(command=" ".join(["python", *benchmark.command(quick=self.quick)]), commit=commit)
            if missing := benchmark.lacks(self.root, quick=self.quick):
                tell(f"{benchmark.name}: left out: {missing}")
                stale(self.into, benchmark.name, f"left it out: {missing}", run)
                continue
            tell(f"{benchmark.name}: {run.command}")
            began = time.monotonic()
            failure = self.renew(benchmark, run)
            tell(f"{benchmark.name}: {failure or 'done'} ({time.monotonic() - began:.0f} s)")
            if failure is not None:
                stale(self.into, benchmark.name, f"failed: {failure}", run)
                failures.append(f"{benchmark.name}: {failure}")
        return failures

    def renew(self, benchmark: Benchmark, run: Run) -> str | None:
        """Run one and replace its section. Return why it failed, or None."""
        name, before = benchmark.name, changed_at(self.into)
        how = ["--readme", str(self.into)] if benchmark.writes_itself else ["--markdown"]
        limit_s = benchmark.quick_limit_s if self.quick else benchmark.limit_s
        output, log = self.logs / f"{name}.md", self.logs / f"{name}.log"
        command = [sys.executable, *benchmark.command(quick=self.quick), *how]
        if (failure := performed(command, self.root, output, log, limit_s)) is not None:
            return failure
        if not benchmark.writes_itself:
            text = output.read_text(encoding="utf-8")
            if not any(line.startswith("|") for line in text.splitlines()):
                return "it ended well but has printed no table"
            finished(self.into, name, run, text, () if self.quick else benchmark.images)
        elif changed_at(self.into) == before or section_of(self.into, name) is None:
            return "it ended well but has written nothing"
        return None


def changed_at(path: Path) -> int | None:
    """Return when a file was last written, or None if there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def performed(command: Sequence[str], root: Path, output: Path, log: Path, limit_s: float) -> str | None:
    """Run a command to its end, what it prints into files; why it failed, where it did.

    It gets a session of its own, so that what it has started ends with it.
    """
    with output.open("w") as out, log.open("w") as errors:
        process = subprocess.Popen(command, cwd=root, stdout=out, stderr=errors, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"it took longer than {limit_s:g} s"
        finally:
            if process.poll() is None:
                end(process)
    if code == 0:
        return None
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {said[-1][:200] if said else 'it said nothing'}"


def end(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGTERM to its session, which launchers pass on, then SIGKILL to what is left of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)


def tell(line: str) -> None:
    """Progress, for who watches."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run, and exit with 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: minutes, with numbers that mean nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="which benchmarks; default: all")
    parser.add_argument("--into", type=Path, help="the Markdown file; default: the README, --quick: runs/bench-quick")
    parser.add_argument("--list", action="store_true", help="tell the benchmarks' names and commands, run nothing")
    options = parser.parse_args()
    if unknown := set(options.only) - {benchmark.name for benchmark in SUITE}:
        known = ", ".join(benchmark.name for benchmark in SUITE)
        parser.error(f"--only {' '.join(sorted(unknown))}: choose from {known}")
    chosen = [benchmark for benchmark in SUITE if not options.only or benchmark.name in options.only]
    if options.list:
        for benchmark in chosen:
            print(f"{benchmark.name}: python {' '.join(benchmark.command(quick=options.quick))}")
        return
    logs = HERE.parent / "runs" / ("bench-quick" if options.quick else "bench")
    into = (options.into or (logs / "tables.md" if options.quick else README)).resolve()
    if into.is_dir():
        parser.error(f"--into {options.into} is a folder; name a Markdown file")
    if options.quick and into == README.resolve():
        parser.error(f"--quick --into {options.into}: quick numbers mean nothing and stay out of it; name another file")
    failures = Suite(into=into, logs=logs, quick=options.quick).run(chosen)
    tell("\n".join([f"tables: {into}", *(f"failed: {failure}" for failure in failures)]))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
