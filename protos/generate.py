"""Make the code in `protos/wire` from the .proto files: `python -m protos.generate [--check]`."""

from __future__ import annotations

import argparse
import importlib.resources
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_WIRE = Path("protos/wire")


def generate(out: Path) -> list[Path]:
    """Write messages, stubs and type stubs below `out`; return the files' paths relative to it."""
    sources = sorted(str(path.relative_to(_ROOT)) for path in (_ROOT / _WIRE).glob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    # A virtual environment that is not activated does not have the mypy plugins on its PATH.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{_ROOT}", f"-I{well_known}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    subprocess.run([*command, *sources], check=True, env={**os.environ, "PATH": path})
    return sorted(found.relative_to(out) for found in (out / _WIRE).iterdir() if found.is_file())


def check() -> list[str]:
    """Return what differs between the committed code and freshly made code."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        found = sorted(path.relative_to(_ROOT) for path in (_ROOT / _WIRE).glob("*_pb2*.py*"))
        if fresh != found:
            return [f"{path}: missing or left over" for path in set(fresh) ^ set(found)]
        return [
            f"{path}: not what the .proto files give"
            for path in fresh
            if (Path(folder) / path).read_bytes() != (_ROOT / path).read_bytes()
        ]


def main() -> int:
    """Generate, or with `--check` compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        generate(_ROOT)
        return 0
    differences = check()
    for difference in differences:
        print(difference, file=sys.stderr)
    if differences:
        print("run `python -m protos.generate` and commit the result", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
