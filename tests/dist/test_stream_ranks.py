"""Files, mixtures and streams on two ranks, resumed on one: the rows of an uninterrupted run on one."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import in_ranks


def found(folder: Path, *, resume: bool) -> dict[str, list[list[int]]]:
    return json.loads((folder / f"found-{resume}.json").read_text())


def test_two_ranks_and_a_resume_on_one_train_on_the_rows_of_one_rank(tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    for folder in (alone, two):
        folder.mkdir()
        for k in range(3):
            table = pa.table({"id": range(20 * k, 20 * k + 20), "x": [[i / 50, 0.1, 0.0] for i in range(20)]})
            table = table.set_column(1, "x", table["x"].cast(pa.list_(pa.float32())))
            pq.write_table(table, folder / f"{k}.parquet", row_group_size=7)
    in_ranks("streamed.py", str(alone), "begin", workers=1)
    in_ranks("streamed.py", str(two), "begin", workers=2)
    whole, shared = found(alone, resume=False), found(two, resume=False)
    for name in ("files", "mixture", "stream"):
        assert sorted(sum(shared[name], [])) == whole[name][0], name
        assert len(whole[name][0]) == 200
        for checkpoint in sorted((two / name / "checkpoints").glob("step-*"))[3:]:
            shutil.rmtree(checkpoint)
            shutil.rmtree(alone / name / "checkpoints" / checkpoint.name)
    assert "rank 1 reads another training stream than rank 0" in shared["other rows"]
    assert "pass 0 of the training stream had 30 rows on rank 0 and 31 on rank 1" in shared["other length"]
    in_ranks("streamed.py", str(two), "resume", workers=1)
    in_ranks("streamed.py", str(alone), "resume", workers=1)
    assert found(two, resume=True) == found(alone, resume=True)
    assert 0 < len(found(two, resume=True)["stream"][0]) < 200
