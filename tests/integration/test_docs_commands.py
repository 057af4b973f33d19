"""The commands of the guides that say so, run as a reader would: page by page, in a new folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs_blocks import ROOT, Block, all_blocks

pytestmark = [pytest.mark.slow, pytest.mark.long]

RUN = [block for block in all_blocks() if block.way == "run"]
PAGES = sorted({block.page for block in RUN})
_LIMIT_S = 540


def script_of(blocks: list[Block]) -> str:
    """Return a script that names a block before it runs it, and ends at the first failure."""
    parts = ["set -euo pipefail", "set -m"]
    for block in blocks:
        parts += [f"echo '== {block.place}' >&2", block.text]
    return "\n".join(parts)


@pytest.mark.timeout(_LIMIT_S + 60)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_guide_do_what_it_says(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    (folder / "deploy").symlink_to(ROOT / "deploy")
    programs = tmp_path / "bin"
    programs.mkdir()
    command = programs / "headrace"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m deploy.cli "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    blocks = [block for block in RUN if block.page == page]
    process = subprocess.Popen(
        ["bash", "-c", script_of(blocks)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"not done after {_LIMIT_S} s:\n{said[-4000:]}")
    assert process.returncode == 0, said[-6000:]
