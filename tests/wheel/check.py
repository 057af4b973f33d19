"""The wheel, used as a stranger would: built, installed into a clean environment, run elsewhere.

    python tests/wheel/check.py

Checks what a trainer gets (three packages, no Ray) and that nothing of the tree is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
CLIENT_PACKAGES = {"headrace", "grpcio", "numpy", "protobuf", "typing-extensions"}

SMOKE = """
import sys
import trainer_client
from protos.types import Mixture
from protos.client import ControlClient
assert "site-packages" in trainer_client.__file__, trainer_client.__file__
assert "ray" not in sys.modules
try:
    trainer_client.connect("127.0.0.1:1", rank=0, world_size=1, timeout_s=1)
except trainer_client.HeadraceError as error:
    assert "127.0.0.1:1" in str(error), error
else:
    raise SystemExit("connected to nobody")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in a clean environment; return what it printed."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """Refuse a wheel that ships tests or lacks what it needs."""
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith("tests")], names
    for needed in ("protos/wire/control_pb2.py", "trainer_client/py.typed", "deploy/cli.py"):
        assert needed in names, f"{needed} is not in {wheel.name}"


def main() -> None:
    """Build, install, use."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", work, ROOT, cwd=work)
        (wheel,) = work.glob("*.whl")
        check_contents(wheel)
        venv.create(work / "env", with_pip=True)
        python = work / "env" / "bin" / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        run(*pip, "install", "-c", CONSTRAINTS, wheel, cwd=work)
        listed = run(*pip, "list", "--format", "freeze", cwd=work).split()
        found = {line.split("==")[0].lower().replace("_", "-") for line in listed}
        client = found - {"pip", "setuptools", "wheel"}
        assert client == CLIENT_PACKAGES, f"a trainer gets {client}, not {CLIENT_PACKAGES}"
        without_server = subprocess.run(
            [work / "env" / "bin" / "headrace", "--help"], cwd=work, capture_output=True, text=True
        )
        assert without_server.returncode != 0
        assert "headrace[server]" in without_server.stderr, without_server.stderr
        run(*pip, "install", "-c", CONSTRAINTS, "torch", cwd=work)
        run(python, "-c", SMOKE, cwd=work)
        run(*pip, "install", "-c", CONSTRAINTS, f"headrace[server] @ {wheel.as_uri()}", cwd=work)
        assert "run" in run(work / "env" / "bin" / "headrace", "--help", cwd=work)
    print(f"{wheel.name}: the client needs {sorted(client)}; command and client work")


if __name__ == "__main__":
    main()
