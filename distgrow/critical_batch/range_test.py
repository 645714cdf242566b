"""`distgrow range-test`: the largest learning rate that is stable at b₀, by short runs from the first weights."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from distgrow.config.run import Run
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError
from distgrow.core.progress import finite
from distgrow.core.rate_test import LEAST_UPDATES, UPDATES, margin
from distgrow.critical_batch.proposal import Proposal, Rates, Wish, probed_batch, propose
from distgrow.data.seeding import seed_generators
from distgrow.distributed.world import joined
from distgrow.engine.ability import Can
from distgrow.report.plots import COLOURS
from distgrow.run.folder import RunFolder, storing
from distgrow.run.targets import check_folder, check_new_file, key_of, write_new_file
from distgrow.training.first_rate import first_rate
from distgrow.training.rate_test import RateResult, RateResults, find_rates


def range_test(
    run: Run,
    updates: int = UPDATES,
    out: str | None = None,
    wish: Wish | None = None,
    save: str | None = None,
) -> None:
    """Try learning rates; print a table and a proposal, write JSON and a figure. Collective: every rank must call.

    Args:
        run: The config. Of its growth only b₀ is used, of its learning rate lr.base, or lr.test.start if that is auto.
        updates: Updates of each run, at constant b₀ and η.
        out: Folder for the results. None: the one in which run.dir lies.
        wish: What a schedule is proposed for. None: none is.
        save: A file for its keys, as YAML. It must not be there.

    Raises:
        ConfigError: Such runs cannot be made, or their results not be written.
    """
    if Can.REPEAT not in run.engine.can:
        raise ConfigError(
            f"range-test: with engine.kind={run.engine.kind} delays differ from run to run; give engine.kind=torch"
        )
    if updates < LEAST_UPDATES:
        raise ConfigError(f"--updates={updates}: too few to tell whether a run diverges; give at least {LEAST_UPDATES}")
    if wish is not None:
        wish.check(run)
    elif save is not None:
        raise ConfigError(f"--save={save}: there is nothing to save; give --workers or --steps too")
    folder = _results(run, out).parent
    with joined(run.engine.device, run.launch.timeout_s, alone=run.engine.needs_group) as world:
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=world.rank > 0)
        world.on_rank0(lambda: _check_targets(run, out, save))
        seed_generators(run.run.seed)
        task = world.on_all_ranks(lambda: run.task.build(run.model))
        settings = run.in_samples(task.tokens)
        tell = partial(_tell, console)
        results = find_rates(settings, first_rate(run), updates, task, RunFolder(folder), world, tell)
        if world.rank == 0:
            proposal = None if wish is None else proposed(run, wish, results)
            _report(results, run, updates, out, {} if proposal is None or wish is None else proposal.config(wish))
            if proposal is not None and wish is not None:
                show(proposal, wish, save)


def _results(run: Run, out: str | None) -> Path:
    """Return the JSON file of the results; the figure is beside it."""
    folder = Path(out) if out is not None else Path(run.run.dir).absolute().parent
    return folder / f"range-test-{Path(run.run.dir).name}.json"


def _check_targets(run: Run, out: str | None, save: str | None) -> None:
    """Check that the results can be written, and that `save` replaces no file. RunError if not."""
    file = _results(run, out)
    check_folder(file.parent, key_of(out))
    if save is None:
        return
    if Path(save).absolute() in (file.absolute(), file.with_suffix(".png").absolute()):
        raise ConfigError(f"--save={save} is where the results are written: choose another file")
    check_new_file(Path(save), "--save")


def proposed(run: Run, wish: Wish, results: RateResults) -> Proposal | None:
    """Return what is proposed; None if no rate is stable."""
    if results.proposed is None or results.largest is None:
        return None
    rates = Rates(batch=run.growth.start, proposed=results.proposed, largest=max(results.proposed, results.largest / 2))
    return propose(run, wish, rates, probed_batch(Path(run.run.dir)))


def show(proposal: Proposal, wish: Wish, save: str | None) -> None:
    """Print a proposal and its keys, and save them."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(proposal.line())
    console.print(proposal.text(wish), end="")
    if save is not None:
        write_new_file(Path(save), proposal.text(wish), "--save")
        console.print(f"wrote {save}: put these keys into the config in place of its own")


def _tell(console: Console, result: RateResult) -> None:
    console.print(result.line())


def _report(results: RateResults, run: Run, updates: int, out: str | None, proposal: Mapping[str, Any]) -> None:
    """Print the table and what follows from it; write JSON and the figure."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("lr", "training loss", ""):
        table.add_column(name, justify="right")
    for result in results.tried:
        told = f"{result.loss:.4f}" if math.isfinite(result.loss) else "diverged"
        table.add_row(f"{result.lr:.4g}", told, "" if results.stable(result) else "unstable")
    console.print(table, soft_wrap=False)
    for line in sentences(results, run.growth.start):
        console.print(line)
    file = _results(run, out)
    folder, name = file.parent, file.stem
    values: dict[str, Any] = {
        "start": run.growth.start,
        "updates": updates,
        "first_loss": finite(results.first.loss),
        "largest_stable_lr": results.largest,
        "proposed_lr": results.proposed,
        "evaluations": results.evaluations,
        **({"proposal": proposal} if proposal else {}),
        "runs": [{key: finite(value) for key, value in asdict(result).items()} for result in results.tried],
    }
    with storing(folder, key_of(out)):
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        figure(results, name).savefig(folder / f"{name}.png")
    console.print(f"{counted(values['evaluations'], 'gradient evaluation')}; wrote {file} and {name}.png")


def sentences(results: RateResults, start: int) -> list[str]:
    """Return what the runs show of the learning rate at b₀ = `start`."""
    largest, proposed, tried = results.largest, results.proposed, results.tried
    if largest is None or proposed is None:
        return [f"no learning rate down to {min(result.lr for result in tried):.4g} is stable: check loss and data"]
    edge = "" if any(result.lr > largest for result in tried) else ", the largest that was tried: the edge is above it"
    lines = [f"largest stable lr at batch {start}: {largest:.4g}{edge}"]
    part = largest / proposed
    why = (
        f"{part:.3g} times below, as a long run may fail at it"
        if part == margin(results.updates)
        else "of the least loss"
    )
    return [*lines, f"proposed: lr.base={proposed:.4g}, {why}"]


def figure(results: RateResults, title: str) -> Figure:
    """Draw the last loss against the learning rate; what diverged is a cross at the loss of the first weights."""
    start, largest = results.first.loss, results.largest
    drawn = Figure(figsize=(5.0, 3.6), dpi=200, layout="constrained")
    drawn.suptitle(title, parse_math=False)
    axes = drawn.subplots()
    kept, lost = ([r for r in results.tried if results.stable(r) is wanted] for wanted in (True, False))
    axes.plot([r.lr for r in kept], [r.loss for r in kept], marker="o", color=COLOURS[0], label="stable")
    axes.plot([r.lr for r in lost], [start] * len(lost), "x", color=COLOURS[1], label="unstable")
    axes.axhline(start, color="0.35", linestyle="--", linewidth=0.6)
    if largest is not None:
        axes.axvline(largest, color="0.35", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([result.lr for result in results.tried])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss at the end")
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(fontsize="small", frameon=False)
    return drawn
