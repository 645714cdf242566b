"""Files of an FSDP checkpoint: torch's DCP writes them into memory, and reads them without executing code.

DCP's `.metadata` is a pickle. Here it is read by an unpickler that builds DCP's own records and nothing else. What is
no tensor, which DCP would unpickle freely, is in a file of its own that torch's restricted unpickler reads.
"""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distgrow.core.errors import RunError
from distgrow.engine.fsdp import FOLDER

_METADATA = ".metadata"
#: What DCP's metadata is made of: records without behaviour.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "complex64", "complex128",
    },
}  # fmt: skip


def write(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files that this rank keeps of tensors and DTensors, by name. Collective: every rank must call."""
    writer = _MemoryWriter()
    with _quiet():
        save(dict(tensors), storage_writer=writer)
    return {f"{FOLDER}/{name}": data for name, data in writer.files.items()}


class Reader(FileSystemReader):
    """Read the files of a checkpoint; executes no code from them."""

    def __init__(self, folder: Path) -> None:
        """Read what the files hold.

        Raises:
            RunError: They hold more than tensors.
        """
        super().__init__(str(folder / FOLDER))
        self._known = metadata(folder / FOLDER / _METADATA)

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return what is known of each tensor, by name."""
        return dict(self._known.state_dict_metadata)  # pyright: ignore[reportReturnType]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See FileSystemReader."""
        del args, kwargs
        return self._known

    def into(self, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
        """Fill tensors and DTensors, in place.

        Args:
            tensors: They have the names of those that were written.
            alone: Whether this process reads without others; if not, every rank must call.
        """
        with _quiet():
            load(dict(tensors), storage_reader=self, no_dist=alone)


class _MemoryWriter(FileSystemWriter):
    """Keep the files that DCP writes."""

    def __init__(self) -> None:
        super().__init__("", sync_files=False)
        self.files: dict[str, bytes] = {}
        self.path, self.fs = "", _Memory(self.files)  # pyright: ignore[reportAttributeAccessIssue]


class _Memory:
    """A file system as FileSystemWriter uses it, whose files are bytes."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: str, mode: str) -> Iterator[io.BytesIO]:
        """Write a file."""
        assert mode == "wb"
        with _Stream(self._files, path) as stream:
            yield stream

    def concat_path(self, path: str, suffix: str) -> str:
        """Return the name of a file: there is one folder."""
        del path
        return suffix

    def rename(self, path: str, new_path: str) -> None:
        """Give a file another name."""
        self._files[new_path] = self._files.pop(path)

    def init_path(self, path: Any) -> str:
        """Return the folder."""
        return str(path)

    def mkdir(self, path: str) -> None:
        """Do nothing: there is one folder."""

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return path in self._files

    def rm_file(self, path: str) -> None:
        """Delete a file."""
        del self._files[path]


class _Stream(io.BytesIO):
    """A file that is kept once it is closed."""

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        super().__init__()
        self._files, self._name = files, name

    def close(self) -> None:
        """Keep what was written."""
        if not self.closed:
            self._files[self._name] = self.getvalue()
        super().close()


def _memory_format(owner: Any, name: str) -> Any:
    """Return the member of torch's memory formats with this name, as getattr would; of anything else nothing.

    Raises:
        UnpicklingError: It is of something else.
    """
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it takes {name} of {owner!r}")
    return _MEM_FORMAT_ENCODING[name]


class _Unpickler(pickle.Unpickler):
    """Build records of `_RECORDS` and plain values alone."""

    def find_class(self, module: str, name: str) -> Any:
        """See pickle.Unpickler."""
        if (module, name) == ("builtins", "getattr"):
            return _memory_format  # by which Python up to 3.11.3 finds the member of an enumeration
        if name not in _RECORDS.get(module, ()):
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def metadata(file: Path) -> Metadata:
    """Read DCP's metadata; executes no code from it.

    Raises:
        RunError: It holds more than records of tensors, or points out of its folder.
    """
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes())).load()
        if not isinstance(found, Metadata):
            raise TypeError(f"it holds a {type(found).__name__}")
        for name, each in found.state_dict_metadata.items():
            if not isinstance(each, TensorStorageMetadata):
                raise TypeError(f"{name} is no tensor")
        for info in (found.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                raise ValueError(f"a tensor is in {info.relative_path}")
    except Exception as error:  # whatever the unpickler meets in a file that is none
        raise RunError(f"{file} is not a checkpoint that can be loaded without executing code: {error}") from None
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
