"""Runs whose hosts share no folder keep their checkpoints in S3 (another implementation of it, over HTTP)."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Commands, deadly, events, ledger, parameters, wounded

pytest.importorskip("pyarrow", reason="needs the extra 'ray'")
pytest.importorskip("moto", reason="needs the extra 'dev'")

from distgrow.checkpoint import writer
from distgrow.checkpoint.remote import Remote
from distgrow.core.errors import ConfigError, RunError
from distgrow.core.progress import Progress
from distgrow.run.folder import RunFolder
from distgrow.run.resume_mode import ResumeMode

pytestmark = pytest.mark.fault

KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of an empty bucket."""
    from pyarrow.fs import FileSystem

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    before = {key: os.environ.get(key) for key in KEYS}
    os.environ.update(KEYS)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        options = f"scheme=http&endpoint_override=127.0.0.1:{port}&allow_bucket_creation=true"
        files, _ = FileSystem.from_uri(f"s3://bucket?{options}")
        files.create_dir("bucket")
        yield f"s3://bucket/runs?{options}"
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        server.kill()
        server.wait()


def stored(folder: Path, bucket: str, name: str) -> Path:
    """What S3 holds of a run, as a run's folder."""
    from pyarrow.fs import FileSystem, LocalFileSystem, copy_files

    files, root = FileSystem.from_uri(bucket)
    copy_files(f"{root}/{name}", str(folder), source_filesystem=files, destination_filesystem=LocalFileSystem())
    return folder


def test_a_run_whose_folder_is_lost_is_known_from_s3(distgrow: Commands, bucket: str) -> None:
    kept = (f"launch.storage_path={bucket}", "run.checkpoint={every_steps: 9, keep: 2}", "budget={samples: 700}")
    assert distgrow.train("run", *kept).code == 0
    assert not list((distgrow.folder / "run/checkpoints").iterdir())
    shutil.rmtree(distgrow.folder / "run")  # its host is gone
    (distgrow.folder / "found").mkdir()
    found = stored(distgrow.folder / "found", bucket, "run")
    assert len(list((found / "checkpoints").iterdir())) == 2
    assert events(found, "end")[0]["samples"] == 700
    other = distgrow.train("run", *kept, "lr.base=0.3", resume=True)
    assert other.code == 2
    assert "lr.base: 0.05 in the folder, 0.3 now" in other.err
    assert distgrow.train("run", *kept).code == 2  # nor is it begun anew
    assert distgrow.train("run", *kept, resume=True).code == 0
    assert len(events(distgrow.folder / "run", "end")) == 2


@pytest.mark.slow
def test_killed_and_resumed_on_another_host_it_ends_bit_identical(distgrow: Commands, bucket: str) -> None:
    kept = (f"launch.storage_path={bucket}", "run.checkpoint={every_steps: 9, keep: 2}", "launch.workers=2")
    task = deadly("in forward", distgrow.folder / "mark", after=30)
    assert wounded(distgrow).train("killed", *task, *kept).code == 1
    shutil.rmtree(distgrow.folder / "killed")
    resumed = distgrow.train("killed", *task, *kept, resume=True)
    assert resumed.code == 0, resumed.err
    assert distgrow.train("undisturbed", *task, "launch.workers=2").code == 0
    (distgrow.folder / "found").mkdir()
    found = stored(distgrow.folder / "found", bucket, "killed")
    assert (parameters(found) == parameters(distgrow.folder / "undisturbed")).all()
    assert {**ledger(found), "replayed": 0} == ledger(distgrow.folder / "undisturbed")


def remote(bucket: str, tmp_path: Path, name: str) -> Remote:
    address, _, options = bucket.partition("?")
    return Remote(f"{address}/{name}?{options}", cache=tmp_path / "cache")


def write(store: Remote, step: int, content: bytes, *, whole: bool = True) -> str:
    """A checkpoint by hand; not `whole`: its writer was killed before the manifest."""
    import hashlib
    import json

    name = f"step-{step:08d}"
    place = store.begin(name)
    files = {"engine.pt": content, "progress.json": json.dumps(Progress(step=step).to_dict()).encode()}
    for file, data in files.items():
        store.write(place, file, data)
    if whole:
        manifest = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
        store.commit(place, name, json.dumps(manifest).encode())
    return name


def test_what_a_killed_write_left_is_no_checkpoint_and_is_swept(bucket: str, tmp_path: Path) -> None:
    store = remote(bucket, tmp_path, "swept")
    write(store, 1, b"one")
    write(store, 2, b"two", whole=False)
    assert store.names() == ["step-00000001"]
    name, progress, damaged = writer.newest(store)
    assert (name, progress.step, damaged) == ("step-00000001", 1, [])
    assert (store.fetch(name) / "engine.pt").read_bytes() == b"one"
    writer.clean(store, keep=1, current=name)
    write(store, 2, b"other")
    assert writer.newest(store)[1].step == 2
    assert (store.fetch("step-00000002") / "engine.pt").read_bytes() == b"other"


def test_a_damaged_object_is_named_and_the_one_before_is_used(bucket: str, tmp_path: Path) -> None:
    store = remote(bucket, tmp_path, "damaged")
    write(store, 1, b"one")
    store.write(write(store, 2, b"two"), "engine.pt", b"twO")
    name, _, damaged = writer.newest(store)
    assert name == "step-00000001"
    assert damaged == ["step-00000002: engine.pt does not match its digest"]


def test_the_newest_are_kept_and_nothing_is_left_of_the_others(bucket: str, tmp_path: Path) -> None:
    store = remote(bucket, tmp_path, "kept")
    for step in (1, 2, 3):
        writer.clean(store, keep=2, current=write(store, step, b"x"))
    assert store.names() == ["step-00000002", "step-00000003"]
    assert not [path for path in store._list("checkpoints") if "step-00000001" in path]


def test_a_server_that_does_not_answer_is_a_message_that_names_the_place(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distgrow.checkpoint.storage.ATTEMPTS", 1)
    nowhere = "s3://bucket/runs/run?scheme=http&endpoint_override=127.0.0.1:1"
    with pytest.raises(RunError, match="launch.storage_path: s3://bucket/runs/run.*cannot be used"):
        Remote(nowhere, cache=tmp_path).pull(RunFolder(tmp_path / "run"), resume=ResumeMode.EITHER)


@pytest.mark.parametrize("uri", ["ftp://somewhere/x", "no uri", "s3://"])
def test_what_is_no_uri_of_pyarrows_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it must be a URI that pyarrow.fs knows: s3://bucket/folder"):
        Remote(uri, cache=tmp_path)
