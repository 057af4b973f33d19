"""What a trainer sees of the package, and what importing it does not drag in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import trainer_client

_ROOT = Path(trainer_client.__file__).parent.parent


def _python(script: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.append({str(_ROOT)!r})\n"
    script.write_text(code + "import trainer_client\n" + script.read_text())
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False
    )


def test_the_public_names_are_these() -> None:
    assert trainer_client.__all__ == [
        "AccessRefused",
        "Batch",
        "ConfigError",
        "ControllerUnreachable",
        "DataError",
        "Disagreement",
        "Documents",
        "GradientProbe",
        "HeadraceError",
        "JoinTimeout",
        "LogFn",
        "NotAuthenticated",
        "NotReady",
        "Rejected",
        "Retryable",
        "Security",
        "Session",
        "StaleGeneration",
        "WorkerUnreachable",
        "WrongRun",
        "connect",
        "merge_states",
    ]
    assert all(hasattr(trainer_client, name) for name in trainer_client.__all__)


def test_a_foreign_protos_package_is_named_in_one_sentence(tmp_path: Path) -> None:
    foreign = tmp_path / "protos" / "__init__.py"
    foreign.parent.mkdir()
    foreign.write_text("")
    script = tmp_path / "train.py"
    script.write_text("")
    done = _python(script)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: trainer_client needs Headrace's own package `protos`, but Python found "
        f"another one at {foreign}: rename that one, or start the script from a folder that does "
        "not hold it"
    )


def test_importing_it_imports_neither_ray_nor_grpc(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print(sorted({'ray', 'grpc', 'google.protobuf'} & set(sys.modules)))\n")
    done = _python(script)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
