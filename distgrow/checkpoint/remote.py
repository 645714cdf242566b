"""Checkpoints in object storage (S3, GCS, HDFS), for hosts without a shared folder. Only it imports pyarrow.fs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock

from distgrow.checkpoint.storage import MANIFEST, NAME, Folder, Store, at, persistently
from distgrow.core.errors import ConfigError, RunError
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode

T = TypeVar("T")


class Remote:
    """Keep checkpoints in any file system of pyarrow. Only one run at a time may write to a place."""

    def __init__(self, uri: str, cache: Path, key: str = "launch.storage_path") -> None:
        """Connect to the storage.

        Args:
            uri: The run's own place in the storage.
            cache: A folder on this host for fetched files.
            key: What the user has given the URI as.
        """
        self.where, self._cache, self._key = uri, cache, key
        self._files, self._root = _connect(uri, key)

    def begin(self, name: str) -> str:
        """See Store."""
        self.delete(name)  # what a killed write has left there
        return name

    def write(self, place: str, file: str, data: bytes) -> None:
        """See Store."""

        def write() -> None:
            path = f"{self._root}/checkpoints/{place}/{file}"
            self._files.create_dir(path.rpartition("/")[0], recursive=True)
            with self._files.open_output_stream(path) as stream:
                stream.write(data)

        self._storing(write)

    def commit(self, place: str, name: str, manifest: bytes) -> None:
        """See Store."""
        del name
        self.write(place, MANIFEST, manifest)

    def names(self) -> list[str]:
        """See Store."""
        whole = [path.split("/")[-2] for path in self._list("checkpoints") if path.endswith(f"/{MANIFEST}")]
        return sorted((name for name in whole if NAME.fullmatch(name)), key=at)

    def delete(self, name: str) -> None:
        """See Store."""
        from pyarrow.fs import FileType

        folder = f"{self._root}/checkpoints/{name}"
        if self._exists(f"{folder}/{MANIFEST}"):  # without it, it is no checkpoint any more
            self._storing(lambda: self._files.delete_file(f"{folder}/{MANIFEST}"))
        if self._storing(lambda: self._files.get_file_info(folder)).type != FileType.NotFound:
            self._storing(lambda: self._files.delete_dir(folder))

    def sweep(self) -> None:
        """See Store."""
        whole = set(self.names())
        for name in {
            path.removeprefix(f"{self._root}/checkpoints/").split("/")[0] for path in self._list("checkpoints")
        }:
            if name not in whole:
                self.delete(name)

    def fetch(self, name: str) -> Path:
        """See Store."""
        self._cache.mkdir(parents=True, exist_ok=True)
        here = self._cache / name
        with FileLock(self._cache / ".lock"):
            manifest = self._read(f"{self._root}/checkpoints/{name}/{MANIFEST}")
            if not (here / MANIFEST).is_file() or (here / MANIFEST).read_bytes() != manifest:
                for old in self._cache.iterdir():
                    if old.is_dir():
                        shutil.rmtree(old)
                partial = self._cache / f".partial-{name}"
                self._download(f"checkpoints/{name}", partial)
                partial.rename(here)
        return here

    def push(self, folder: RunFolder) -> None:
        """See Store."""
        for file in (folder.config, folder.metrics):
            if file.is_file():
                data = file.read_bytes()
                self._storing(lambda file=file, data=data: self._upload(file.name, data))
        there = {path.removeprefix(f"{self._root}/") for path in self._list(folder.pretrained.name)}
        for file in sorted(folder.pretrained.glob("*")):  # they never change
            if (name := f"{folder.pretrained.name}/{file.name}") not in there:
                self._storing(lambda name=name, file=file: self._upload(name, file.read_bytes()))

    def pull(self, folder: RunFolder, *, resume: ResumeMode) -> None:
        """See Store."""
        config, metrics = f"{self._root}/{folder.config.name}", f"{self._root}/{folder.metrics.name}"
        if not self._exists(config):
            return
        if resume is ResumeMode.START:
            raise RunError(
                f"launch.storage_path: {self.where} holds a run already and is never overwritten: "
                "continue it with --resume, or choose another run.dir, whose name is the run's there"
            )
        settings = self._read(config)
        if folder.begun() and not _one_run(folder.config.read_bytes(), settings):
            raise RunError(
                f"launch.storage_path: {self.where} holds another run than {folder.path}; "
                "choose another storage_path, or a run.dir of another name"
            )
        here = folder.metrics.stat().st_size if folder.metrics.is_file() else -1
        there = self._storing(lambda: self._files.get_file_info(metrics)).size or 0
        if there > here:
            _put(folder.metrics, self._read(metrics))
        if not folder.begun() or folder.config.read_bytes() != settings:
            _put(folder.config, settings)

    def pull_settings(self, folder: RunFolder) -> None:
        """Copy the config, and what describes a Hugging Face model, to a folder that lacks them, if they are there."""
        if self._exists(f"{self._root}/{folder.config.name}"):
            _put(folder.config, self._read(f"{self._root}/{folder.config.name}"))
            self._download(folder.pretrained.name, folder.pretrained)

    def _upload(self, file: str, data: bytes) -> None:
        self._files.create_dir(f"{self._root}/{file}".rpartition("/")[0], recursive=True)
        with self._files.open_output_stream(f"{self._root}/{file}") as stream:
            stream.write(data)

    def _download(self, below: str, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        for path in self._list(below):
            file = target / path.removeprefix(f"{self._root}/{below}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self._read(path))

    def _read(self, path: str) -> bytes:
        def read() -> bytes:
            with self._files.open_input_stream(path) as stream:
                return stream.read()

        return self._storing(read)

    def _exists(self, path: str) -> bool:
        return self._storing(lambda: self._files.get_file_info(path)).is_file

    def _list(self, below: str) -> list[str]:
        """Return the paths of all files below a folder of this run."""
        from pyarrow.fs import FileSelector

        chosen = FileSelector(f"{self._root}/{below}", allow_not_found=True, recursive=True)
        return [found.path for found in self._storing(lambda: self._files.get_file_info(chosen)) if found.is_file]

    def _storing(self, action: Callable[[], T]) -> T:
        try:
            return persistently(action)
        except OSError as error:
            raise RunError(
                f"{self._key}: {self.where} cannot be used: {error}; look at its address, its access "
                "rights and the network. Checkpoints written before stay good for --resume"
            ) from error


def _one_run(config: bytes, other: bytes) -> bool:
    """Return whether two config.yaml are of one run: another host may have changed its budget or measured its rate."""
    if config == other:
        return True
    try:
        first, second = (_bound(yaml.safe_load(text)) for text in (config, other))
        return first == second
    except (yaml.YAMLError, TypeError):  # one of them is damaged
        return False


def _bound(settings: Any) -> Any:
    """Return the settings without what may change in a run."""
    lr = settings.get("lr")
    open_lr = {**lr, "test": None, "measured": None} if isinstance(lr, dict) else lr
    return {**settings, "budget": None, "lr": open_lr}


def _put(file: Path, content: bytes) -> None:
    """Write a file as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def build_store(folder: RunFolder, storage_path: str | None) -> Store:
    """Return the storage of a run's checkpoints: its folder, or a place of its name below `storage_path`."""
    if storage_path is None:
        return Folder(folder.checkpoints)
    return Remote(below(storage_path, folder.path.resolve().name), cache=folder.path / ".fetched")


def below(uri: str, name: str) -> str:
    """Return the URI of `name` below `uri`, without the options of `uri`."""
    address, mark, options = uri.partition("?")
    return f"{address.rstrip('/')}/{name}{mark}{options}"


def _connect(uri: str, key: str) -> tuple[Any, str]:
    try:
        from pyarrow.fs import FileSystem
    except ImportError as error:
        raise ConfigError(f"{key}={uri} needs pyarrow: pip install 'distgrow[ray]' ({error})") from None
    try:
        files, root = FileSystem.from_uri(uri)
        if not root.strip("/").partition("/")[2]:
            raise ValueError("it names no bucket")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={uri}: {error}; it must be a URI that pyarrow.fs knows: "
            "s3://bucket/folder, gs://bucket/folder, hdfs://host/folder, file:///folder"
        ) from None
    return files, root.rstrip("/")
