"""The command line: verbs that read a config and hand it on; errors become one message and an exit code."""

import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distgrow.config.load import load
from distgrow.config.run import Run
from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError, TrainingFailed
from distgrow.critical_batch.branches import Scaling
from distgrow.distributed.environment import launched, place
from distgrow.launch.local import leave
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode
from distgrow.tasks.user import search

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Training whose batch size and learning rate grow by a schedule, with every gradient evaluation counted.",
)

Config = Annotated[str, typer.Argument(help="A YAML config; configs/ holds examples.")]
#: What the file system answers to a path that no file can have.
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP)

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of its keys: a.b=c …")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distgrow {version('distgrow')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Let modules in the working directory be found by every verb."""
    search(Path.cwd())


def _load(config: str, overrides: list[str] | None) -> Run:
    """Read a config. From here on, modules beside it and in the working directory are found."""
    search(Path(config).absolute().parent, Path.cwd())
    return load(config, overrides or (), tell=_tell)


def _tell(line: str) -> None:
    if place()[0] == 0:
        typer.echo(f"distgrow: {line}", err=True)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that run.dir holds.")] = False,
    auto_resume: Annotated[bool, typer.Option("--auto-resume", help="The same, or begin if there is none.")] = False,
    rebudget: Annotated[
        bool, typer.Option("--rebudget", help="Resume with another budget even if that changes growth or lr.")
    ] = False,
    asked: Annotated[int | None, typer.Option(hidden=True, help="For ranks that others may follow.")] = None,
) -> None:
    """Train, in this process, in the group that torchrun made, or through Ray (launch.kind=ray)."""
    from distgrow.planning.check import check

    if resume and auto_resume:
        raise ConfigError("--resume and --auto-resume were both given; --auto-resume alone also begins a run")
    run = _load(config, overrides)
    mode = ResumeMode.EITHER if auto_resume else ResumeMode.CONTINUE if resume else ResumeMode.START
    mode.check_rebudget(rebudget)
    if launched():
        _in_group(run.fit, resume=mode, rebudget=rebudget, asked=asked)
    check(run, stands_at=lambda: run.stands_at(resume=mode))
    folder = run.folder(resume=mode)
    run = run.kept_in(str(folder.path))
    command = ["train", config, *(overrides or ()), _quoted(folder), "--auto-resume"]
    command += ["--rebudget"] * rebudget
    raise typer.Exit(_saved_on_ctrl_c(run.launch.train)(run, resume=mode, rebudget=rebudget, command=command))


def _quoted(folder: RunFolder) -> str:
    """Return the override that keeps the run in `folder`, whose number may have been found out."""
    return f"run.dir={json.dumps(str(folder.path))}"


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    world: Annotated[int | None, typer.Option(help="Ranks throughout; default: launch.workers.", min=1)] = None,
    like: Annotated[str | None, typer.Option(help="A run folder whose pace to take; default: launch.pace.")] = None,
    rows: Annotated[int, typer.Option(help="Stages to print, at most.", min=2)] = 40,
    price: Annotated[float | None, typer.Option(help="Of a worker for an hour; shows what the run costs.")] = None,
) -> None:
    """Show every stage before anything runs; exit code 2 if the plan cannot be carried out."""
    from distgrow.planning.cost import as_objective, pace_and_scale
    from distgrow.planning.cost_table import checked_price
    from distgrow.planning.remarks import groups
    from distgrow.planning.table import show

    run = _load(config, overrides)
    pace, scale = pace_and_scale(run, like)
    possible = show(run, world, rows, pace, scale, checked_price(price, pace))
    found = [] if like is None or pace is None else as_objective(run, run.controller(world), pace, like)
    for line in [*found, *groups(run)]:
        typer.echo(line)
    if not possible:
        raise typer.Exit(2)


@app.command()
def verify(config: Config, overrides: Overrides = None) -> None:
    """Run one update over several factorisations of its batch; print the largest difference of the parameters."""
    from distgrow.verify import verify as show

    if not show(_load(config, overrides)):
        raise typer.Exit(1)


@app.command("probe-batch")
def probe_batch(
    checkpoint: Annotated[str, typer.Argument(help="RUN/checkpoints/step-…, or RUN for its newest.")],
    samples: Annotated[int | None, typer.Option(help="Of each branch; default: 500 batches or less.", min=1)] = None,
    up_to: Annotated[int | None, typer.Option(help="Largest k of 1, 2, 4 …; default: 16, or what fits.", min=2)] = None,
    rule: Annotated[Scaling, typer.Option(help="LR against k; auto: linear for SGD, else sqrt.")] = "auto",
    tolerance: Annotated[float, typer.Option(help="Loss that counts as no worse.", min=0.0)] = 0.01,
    out: Annotated[str | None, typer.Option(help="Folder for the results; default: the run's.")] = None,
) -> None:
    """Branch a checkpoint with k times the batch; print the largest that is no worse. The run is not touched."""
    from distgrow.critical_batch.branches import ProbeOptions
    from distgrow.critical_batch.probe import probe_batch as measure

    if not math.isfinite(tolerance):
        raise ConfigError(f"--tolerance={tolerance}: must be a number of at least 0, in units of the loss")
    options = ProbeOptions(samples=samples, up_to=up_to, rule=rule, tolerance=tolerance, out=out)
    _everywhere(measure, checkpoint, options)


@app.command("range-test")
def range_test(
    config: Config,
    overrides: Overrides = None,
    updates: Annotated[int, typer.Option(help="Updates of each run.")] = 200,
    out: Annotated[str | None, typer.Option(help="Folder for the results; default: where run.dir lies.")] = None,
    workers: Annotated[int | None, typer.Option(help="Propose a schedule for so many workers.", min=1)] = None,
    micro: Annotated[int | None, typer.Option(help="Rows that each of them computes at once.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Propose a schedule of so many updates.", min=1)] = None,
    save: Annotated[str | None, typer.Option(help="A new file for the keys of the proposal, YAML.")] = None,
) -> None:
    """Find the largest stable learning rate at b₀ by short runs at lr.base times powers of 2; propose a schedule."""
    from distgrow.critical_batch.proposal import Wish
    from distgrow.critical_batch.range_test import range_test as test

    _everywhere(test, _load(config, overrides), updates, out, Wish.of(workers, micro, steps), save)


@app.command("fit-batch")
def fit_batch(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, each at one batch.")],
    target: Annotated[float, typer.Option(help="The value of the metric that all runs are to reach.")],
    metric: Annotated[str, typer.Option(help="A metric of the test set that falls.")] = "loss",
    out: Annotated[str | None, typer.Option(help="Folder for a figure; default: none.")] = None,
) -> None:
    """Fit the critical batch to runs at several batches: where a target costs the fewest gradient evaluations."""
    from distgrow.critical_batch.sweep import fit_batch as fit

    fit(runs, metric, target, None if out is None else Path(out))


@app.command("what-if")
def what_if(
    runs: Annotated[list[str], typer.Argument(help="The folder of a run; or of several, which one law is fitted to.")],
    policy: Annotated[list[str] | None, typer.Option(help="A name, YAML, or a config; may be repeated.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Beside --policy, also all of the default.")] = False,
    metric: Annotated[str | None, typer.Option(help="A test metric that falls; default: the training loss.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Predict what other schedules would have come to with the budget of the first run; nothing is trained."""
    from distgrow.planning.what_if.show import show

    show(runs, policy or (), everything=everything, metric=metric, as_json=as_json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="The run's folder, or its URI in object storage.")],
    target: Annotated[str, typer.Argument(help="NAME.safetensors, NAME.pt, or a folder.")],
    best: Annotated[bool, typer.Option("--best", help="The checkpoint that run.keep has kept.")] = False,
    average: Annotated[bool, typer.Option("--average", help="The average of the parameters.")] = False,
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step; default: the newest.")] = None,
) -> None:
    """Write a run's weights to a file that other programs read. The run is not touched."""
    from distgrow.checkpoint.export import export as write

    file, weights = write(run, target, best=best, average=average, step=step)
    for damage in weights.damaged:
        _tell(f"damaged and not used: {damage}")
    typer.echo(f"{file}: {counted(len(weights.state), 'tensor')} of {weights.place}")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders.")],
    out: Annotated[str | None, typer.Option(help="Folder for the plots; default: the first run's.")] = None,
    update_s: Annotated[float | None, typer.Option(help="Seconds of an update at any batch, to compare by.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Show the runs live, in a browser; write nothing.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to serve at; default: 127.0.0.1, this machine.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve at; default: 8000.", min=0, max=65535)] = None,
) -> None:
    """Plot runs against SFO, steps and seconds: PNG files and one report.html, or a page that follows running jobs."""
    from distgrow.planning.forecast import foresee

    if update_s is not None and not 0 < update_s < math.inf:
        raise ConfigError(f"--update-s={update_s:g} must be a number of seconds above 0")
    if serve:
        from distgrow.report import live

        if out is not None:
            raise ConfigError(f"--out={out}: --serve writes no files; leave one of the two out")
        live.serve(runs, host or "127.0.0.1", 8000 if port is None else port, foresee, update_s)
        leave()  # a thread that is drawing would abort an interpreter that is finalised
    if host is not None or port is not None:
        raise ConfigError("--host and --port are for --serve; give that too, or leave them out")
    from distgrow.planning.what_if.outlook import foresee_more
    from distgrow.report.write import write

    return typer.echo(write(runs, out, foresee_more, update_s))


def _everywhere(action: Callable[..., Any], *words: Any) -> None:
    """Run an action here, or on every rank of the group that torchrun made."""
    if launched():
        _in_group(action, *words)
    action(*words)


def _in_group(action: Callable[..., Any], *words: Any, **settings: Any) -> NoReturn:
    """Run one rank of a group to the end of its process. If it fails, torchrun gets the reason."""
    from torch.distributed.elastic.multiprocessing.errors import record

    record(_saved_on_ctrl_c(action))(*words, **settings)
    leave()


def _saved_on_ctrl_c(action: Callable[..., Any]) -> Callable[..., Any]:
    """Return the action, after which Ctrl-C leaves the program with exit code 130 and what `action` says of it."""

    def guarded(*words: Any, **settings: Any) -> Any:
        try:
            return action(*words, **settings)
        except KeyboardInterrupt as stopped:
            _end(130, f"distgrow: {stopped}" if str(stopped) and place()[0] == 0 else "")

    return guarded


def main() -> NoReturn:
    """Run the command line: exit code 0 done, 1 a run failed, 2 a bad config or command."""
    try:
        app()
    except ConfigError as error:
        _end(2, f"distgrow: {error}")
    except TrainingFailed as error:
        _end(1, f"distgrow: {error}")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_PATH:
            _end(2, f"distgrow: {error.filename}: {error.strerror}; give another path")
        traceback.print_exc()  # an error of the user's own code, or of this package
        _end(1, "")  # at once, before peers report that they lost this rank
    sys.exit(0)


def _end(code: int, message: str) -> NoReturn:
    """End this process with one message, without waiting for peers or threads that may hang.

    Rank 0 prints the message at once. Other ranks wait, so that the group ends before each of them prints it too.
    """
    if message:
        time.sleep(0 if place()[0] == 0 else 2)
        typer.echo(message, err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
