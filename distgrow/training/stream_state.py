"""The training set as a run draws it: opened, checked over the ranks, and, of a stream, its state in checkpoints."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from distgrow.core.counted import counted
from distgrow.core.errors import ConfigError, RunError
from distgrow.core.sampling import SamplingSpec
from distgrow.data.iterable import IterableStream, State, digests
from distgrow.data.loader import Loader
from distgrow.data.stream import Stream, open_stream
from distgrow.distributed.world import World
from distgrow.engine.state import read, written
from distgrow.tasks.task import Task
from distgrow.training.spec import RunSpec

_FILE = "stream.pt"
#: Rows that ranks compare before a run.
_COMPARED = 4


def opened_stream(task: Task, run: RunSpec, world: World, sampling: SamplingSpec | None = None) -> Stream:
    """Return the training set along the positions of the run. Say what a resume of a stream costs.

    Collective: every rank must call.

    Raises:
        ConfigError: Ranks have different streams, or loader processes would read one several times.
    """
    recall = run.loader.prefetch + 2
    stream = open_stream(task.train, seed=run.seed, collate=task.collate, recall=recall, sampling=sampling)
    if not isinstance(stream, IterableStream):
        return stream
    if run.loader.workers > 1:
        raise ConfigError(
            f"run.loader.workers={run.loader.workers}: each loader process would read the whole training stream; give "
            "1, or 0 to read it in the training process"
        )
    if world.size > 1:
        _check_equal(task, run, world)
    if not stream.by_state and world.rank == 0:
        Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(
            "note: the training stream has no state_dict and load_state_dict: a resume reads the present pass again up "
            "to where the run stood"
        )
    return stream


def _check_equal(task: Task, run: RunSpec, world: World) -> None:
    """Check that the first rows are the same on every rank.

    Raises:
        ConfigError: They are not.
    """
    trial = IterableStream(task.train, seed=run.seed, collate=digests)
    rows = world.gather(world.on_all_ranks(lambda: trial.__getitems__(range(_COMPARED))))
    for rank, other in enumerate(rows):
        if other != rows[0]:
            raise ConfigError(
                f"rank {rank} reads another training stream than rank 0: its first rows differ. Give every rank the "
                "whole stream, without split_by_node or a seed of the rank: each takes its own rows of it"
            )


class StreamState:
    """What checkpoints hold of the training set: of a stream its state, of a map-style data set nothing."""

    def __init__(self, stream: Stream, loader: Loader, world: World) -> None:
        self._stream, self._loader, self._world = stream, loader, world

    def files(self) -> dict[str, bytes]:
        """Return the state of the first rank, who stands furthest back. Collective: every rank must call.

        Raises:
            RunError: A pass was longer on one rank than on another.
            ConfigError: The state cannot be read back.
        """
        if not isinstance(self._stream, IterableStream):
            return {}
        state = self._loader.state() or self._stream.state()
        _check_passes(self._world.gather(list(state["passes"])))
        if self._world.rank > 0:
            return {}
        try:
            return {_FILE: written(state)}
        except ConfigError as error:
            raise ConfigError(str(error).replace("model, loss or optimizer", "the training stream")) from None

    def restore(self, checkpoint: Path) -> None:
        """Let a stream go on from a checkpoint. Without its state there, it is read from its beginning."""
        if isinstance(self._stream, IterableStream) and (checkpoint / _FILE).is_file():
            state: State = read(checkpoint / _FILE, torch.device("cpu"))
            self._stream.restore(state)


def _check_passes(passes: Sequence[Sequence[int]]) -> None:
    """Check that the passes that ranks have finished have the same lengths.

    Raises:
        RunError: They have not.
    """
    for rank, lengths in enumerate(passes):
        for number, (here, first) in enumerate(zip(lengths, passes[0], strict=False)):
            if here != first:
                raise RunError(
                    f"pass {number} of the training stream had {counted(first, 'row')} on rank 0 and {here} on rank "
                    f"{rank}: from there on their rows were not those of one batch; let every rank read the same stream"
                )
