"""Who writes token shards, sample maps or an index dies anywhere: a file is there whole, or not.

The places are read from the registry: one that is new and not covered here fails a test.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loader_workers.index
import loader_workers.token_shard
from loader_workers.sample_map import read_sample_map
from loader_workers.token_shard import open_token_shard
from protos.dataset_index import DatasetIndex
from protos.failpoints import VARIABLE, places
from tests.fakes_consumer import ROOT

pytestmark = pytest.mark.slow

PREFIX = "import os; from pathlib import Path; from protos.failpoints import arm; import sys; "
OUT = "arm(os.environ); out = Path(sys.argv[1]); "

SCRIPTS: dict[str, str] = {
    "token_shard": "import numpy as np; from loader_workers.convert import Documents; "
    "from loader_workers.token_shard import write_token_shard; "
    + OUT
    + "write_token_shard(out, Documents(offsets=np.array([0, 3, 7], np.uint64), "
    "tokens=np.arange(1, 8, dtype=np.uint16), unreadable=()))",
    "sample_map": "from loader_workers.sample_map import Place, write_sample_map; "
    + OUT
    + "write_sample_map(out, [Place(ending='txt', offset=512, size=7, digest=bytes(16))])",
    "index": "from loader_workers.index import write_index; "
    "from protos.dataset_index import DatasetIndex, ShardRef; "
    + OUT
    + "write_index(DatasetIndex([ShardRef(domain='web', url='web.tar', num_bytes=9, num_samples=1,"
    " text_bytes=1, sha256='0' * 64)]), out)",
}


def _read(kind: str, path: Path) -> object:
    """Read a file whole, however that is done."""
    if kind == "token_shard":
        return open_token_shard(path, verify=True).tokens.tolist()
    if kind == "sample_map":
        found = read_sample_map(path)
        assert found is not None
        return found
    return DatasetIndex.from_parquet(path.read_bytes(), source=str(path)).domains


def _write(kind: str, path: Path, place: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, VARIABLE: f"{place}:1:kill" if place else ""}
    return subprocess.run(
        [sys.executable, "-c", PREFIX + SCRIPTS[kind], str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _places() -> list[str]:
    assert loader_workers.index
    return sorted(name for name in places() if re.match(r"token_shard|sample_map|index", name))


def test_all_places_that_are_not_the_controllers_are_killed_at() -> None:
    controllers = r"ledger|plans|reply|policy|test"
    others = {name for name in places() if not re.match(controllers, name)}
    assert others == set(_places())
    assert {name.split(".")[0] for name in _places()} == SCRIPTS.keys()


@pytest.mark.fault_row(23, "SIGKILL around every durable write of data")
@pytest.mark.parametrize("place", _places())
def test_a_file_is_there_whole_or_not_at_all(
    tmp_path: Path, place: str, record_injections: Callable[..., None]
) -> None:
    kind = place.split(".")[0]
    path = tmp_path / "file"
    killed = _write(kind, path, place)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert f"failpoint {place} hit: kill" in killed.stderr
    if path.exists():
        _read(kind, path)
    assert path.exists() == place.endswith(".after")
    again = _write(kind, path)
    assert again.returncode == 0, again.stderr
    _read(kind, path)
    record_injections(1)
