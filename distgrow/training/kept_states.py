"""KeptStates: states of the engine that a run goes back to within a test; on disk, as checkpoints' files are."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distgrow.core.errors import RunError
from distgrow.distributed.world import World
from distgrow.engine.protocol import Engine
from distgrow.run.folder import RunFolder, storing

#: In the run's folder.
SCRATCH = ".branches"


class KeptStates:
    """Keep states by name, and go back to them. Every method is collective: every rank must call."""

    def __init__(self, engine: Engine, place: Path, world: World) -> None:
        self._engine, self._place, self._world = engine, place, world

    def keep(self, name: str) -> None:
        """Write the engine's state.

        Raises:
            RunError: Ranks do not see each other's files.
        """
        files, place = self._engine.snapshot(), self._place / name

        def write() -> None:
            with storing(place):
                for file, data in files.items():
                    (place / file).parent.mkdir(parents=True, exist_ok=True)
                    (place / file).write_bytes(data)

        self._world.on_all_ranks(write)
        every = [file for names in self._world.gather(list(files)) for file in names]
        self._world.on_all_ranks(lambda: self._check_seen(place, every))

    def _check_seen(self, place: Path, files: list[str]) -> None:
        if missing := [file for file in files if not (place / file).is_file()]:
            raise RunError(
                f"rank {self._world.rank} does not see {place / missing[0]}, which another rank has written: growth by "
                "branches goes back to states in run.dir; choose one that every host sees, or another growth.kind"
            )

    def go_back(self, name: str) -> None:
        """Give the engine a state that was kept."""
        self._engine.load(self._place / name)


@contextmanager
def kept_states(engine: Engine, folder: RunFolder, world: World) -> Iterator[KeptStates]:
    """Let states be kept inside the context. Collective: every rank must call."""
    place = folder.path / SCRATCH
    world.on_rank0(lambda: shutil.rmtree(place, ignore_errors=True))  # of a test that was cut off
    yield KeptStates(engine, place, world)
    world.sum([0.0])  # every rank has read them
    world.on_rank0(lambda: shutil.rmtree(place, ignore_errors=True))
