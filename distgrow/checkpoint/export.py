"""Export: a run's weights out of its checkpoints, into a file for other programs or into a model."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distgrow.checkpoint import pretrained, safetensors_file
from distgrow.checkpoint.exported_run import Source, checkpoint, opened
from distgrow.core.errors import ConfigError, RunError
from distgrow.engine.deepspeed import shard_weights
from distgrow.engine.deepspeed.shard_files import listed, restricted
from distgrow.engine.fsdp import HEAD
from distgrow.engine.state import serialised

FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Weights:
    """Hold the state of a model, and the checkpoint that it is from."""

    state: Mapping[str, Any]
    checkpoint: Path  #: only its name counts if the run is in object storage
    damaged: tuple[str, ...] = ()  #: what is wrong with newer checkpoints
    place: str = ""  #: the checkpoint's path or URI, for messages


def export(
    run: str | Path, target: str | Path, *, best: bool = False, average: bool = False, step: int | None = None
) -> tuple[Path, Weights]:
    """Write a run's weights to a file, which appears as a whole or not at all; return the file and what is in it.

    Args:
        run: The run's folder, or its URI in object storage.
        target: NAME.safetensors, NAME.pt, or a folder for model.safetensors. A Hugging Face model saves itself to a
            folder with its config, and with the tokenizer that the run had.
        best: Take the checkpoint that the run kept as its best.
        average: Take the average of the parameters.
        step: Take the checkpoint of this step; default: the newest intact one.

    Raises:
        ConfigError: There is no such checkpoint or average, or it cannot be written so.
    """
    file = _file(target)
    with opened(run) as source:
        weights = _weights(source, best=best, average=average, step=step)
        try:
            if file is None and pretrained.kept(source.folder):
                file = Path(target)
                with appearing(file) as partial:
                    pretrained.write(dict(weights.state), source.folder.pretrained, partial)
                return file, weights
            file = file or Path(target) / FILE
            with appearing(file.parent) as partial:
                if file.suffix == ".pt":
                    (partial / file.name).write_bytes(serialised(dict(weights.state)))
                else:
                    safetensors_file.write(weights.state, partial / file.name, getattr(weights.state, "kind", None))
        except OSError as error:
            raise RunError(f"cannot write {file}: {error.strerror}; give another path, or free its own") from None
    return file, weights


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder, whose files are moved to `folder` once all are written."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{secrets.token_hex(8)}"
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def load_weights(
    model: nn.Module,
    run: str | Path,
    *,
    best: bool = False,
    average: bool = False,
    step: int | None = None,
    strict: bool = True,
) -> None:
    """Load a run's weights into a model; executes no code from the run's files.

    Args:
        model: Takes the weights, on the device that it is on.
        run: The run's folder, or its URI in object storage.
        best: Take the checkpoint that the run kept as its best.
        average: Take the average of the parameters.
        step: Take the checkpoint of this step; default: the newest intact one.
        strict: Refuse names that only one side has.

    Raises:
        ConfigError: There is no such checkpoint or average, or it is of another model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"load_weights(model={type(model).__name__}): give the torch.nn.Module that takes the weights"
        )
    weights = weights_of(run, best=best, average=average, step=step)
    own, state = model.state_dict(), weights.state
    wrong = [
        f"{name} has shape {tuple(state[name].shape)} there, {tuple(own[name].shape)} in the model"
        for name in own
        if isinstance(own[name], Tensor) and name in state and own[name].shape != state[name].shape
    ]
    if strict:
        wrong += _listed("the run lacks", [name for name in own if name not in state])
        wrong += _listed("the model lacks", [name for name in state if name not in own])
    if wrong:
        way_out = "give the run's own model" + (", or strict=False for the names that both have" if strict else "")
        raise ConfigError(f"{weights.place} is of another model: {'; '.join(wrong[:8])}; {way_out}")
    model.load_state_dict(state, strict=strict)


def weights_of(run: str | Path, *, best: bool = False, average: bool = False, step: int | None = None) -> Weights:
    """Return the weights of a run's checkpoint, on the CPU; see `export`."""
    with opened(run) as source:
        weights = _weights(source, best=best, average=average, step=step)
        return replace(weights, state=dict(weights.state))


def _weights(source: Source, *, best: bool, average: bool, step: int | None) -> Weights:
    name, damaged = checkpoint(source, best=best, step=step)
    place = f"{source.store.where.partition('?')[0].rstrip('/')}/{name}"
    model = _state(source.store.fetch(name), average=average)
    if average and not model:
        raise ConfigError(
            f"{place} holds no average of the parameters; leave out --average (in Python average=True), or train with "
            "average: {kind: ema} (in Python average=ema(…))"
        )
    return Weights(model, Path(source.store.where) / name, tuple(damaged), place)


def _state(checkpoint: Path, *, average: bool) -> Mapping[str, Any]:
    """Return the model's state in a checkpoint, or that with averages in it. It is empty if there are none."""
    files = listed(checkpoint) or ()
    if HEAD in files:
        from distgrow.engine.fsdp.weights import Weights as Sharded  # loads torch's DCP

        return Sharded(checkpoint, average=average)
    if "engine.pt" not in files:
        return shard_weights.weights(checkpoint, average=average)
    state = restricted(checkpoint / "engine.pt", ())
    model = {**state["model"], **state.get("evaluated", {})}  # the latter of optimizers with an evaluation mode
    if not average:
        return model
    return _averaged(model, state["average"]) if state.get("average") else {}


def _averaged(model: Mapping[str, Any], average: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the model's state with averages in place of what was averaged.

    A tensor that several names share was averaged by one of them.
    """
    means = {name.removeprefix("model."): mean for name, mean in average.items() if name.startswith("model.")}
    shared = {_place(model[name]): mean for name, mean in means.items() if name in model}
    return {name: shared.get(_place(value), value) for name, value in model.items()}


def _place(value: Any) -> Any:
    """Return what two names of one tensor have in common."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return id(value)
    return (value.data_ptr(), value.dtype, value.shape, value.stride())


def _file(target: str | Path) -> Path | None:
    """Return the file to write. None: `target` is a folder."""
    path = Path(target)
    if "://" in str(target):
        raise ConfigError(f"{target}: weights are written to this machine's files; give a path, and copy it from there")
    if path.is_dir() or not path.suffix or str(target).endswith("/"):
        return None
    if path.suffix not in (".safetensors", ".pt"):
        raise ConfigError(f"{target}: weights are written to NAME.safetensors, NAME.pt or a folder; give one of these")
    return path


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """Return a sentence of a few names, if there are any."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what} {', '.join(names[:5])}{more}"] if names else []
