"""`python -m tests.fuzz`: fuzz every target, each in a process of its own; 1 if one failed."""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_BYTES = 4096
MEMORY_MB = 2048
ONE_S = 20
"""Seconds that a single input may take."""

START_S = 120
MOST_S = 0.05
"""What a target may take to start, and for each execution in the mean; it is ended after that."""

LOOK_EVERY_S = 0.5
GRACE_S = 5.0

_LAST_FIGURE = "peak_rss_mb"
_FAILURES = ("ERROR: libFuzzer", "Uncaught Python exception")
_PACKAGES = ["controller", "loader_workers", "protos", "trainer_client"]


def fuzz_one(name: str, count: int, seed: int) -> None:
    """Fuzz in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=_PACKAGES):
        from tests.fuzz.targets import TARGETS, seeds

    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for number, good in enumerate(seeds(name, Path(scratch))):
            (corpus / f"seed-{number}").write_bytes(good)
        options = [f"-runs={count}", f"-seed={seed}", f"-max_len={MAX_BYTES}", f"-timeout={ONE_S}"]
        options += [f"-rss_limit_mb={MEMORY_MB}", "-print_final_stats=1"]
        options += [f"-artifact_prefix=crash-{name}-"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[name])
        atheris.Fuzz()


def fuzz_all(names: list[str], count: int, seed: int) -> int:
    """Fuzz each target so often; print a line for each; return the exit status."""
    failed = False
    total = 0
    for name in names:
        command = [sys.executable, "-m", "tests.fuzz", "--only", name]
        status, said = _run([*command, "--count", str(count), "--seed", str(seed)], count)
        ran = _figure("number_of_executed_units", said)
        peak = _figure(_LAST_FIGURE, said)
        total += ran
        ok = status == 0 and ran >= count
        print(f"{name:16} {ran:>9} executions {peak:>5} MiB {'ok' if ok else 'FAILED'}", flush=True)
        if not ok:
            failed = True
            print(said[-4000:], f"ended with {status}", file=sys.stderr)
    print(f"{'all':16} {total:>9} executions")
    return int(failed)


def _run(command: list[str], count: int) -> tuple[int, str]:
    """Return a target's exit status, and what it said.

    One that has said its last figure is done: threads of a library may keep it from ending.
    """
    deadline = time.monotonic() + START_S + count * MOST_S
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=output)
        status, said, done_s = None, "", None
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(LOOK_EVERY_S)
            said = log.read_text(errors="replace")
            if done_s is None and _figure(_LAST_FIGURE, said):
                done_s = time.monotonic()
            is_done = done_s is not None and time.monotonic() - done_s > GRACE_S
            if status is None and (is_done or time.monotonic() > deadline):
                process.kill()
                process.wait()
                is_sound = is_done and not any(word in said for word in _FAILURES)
                status = 0 if is_sound else process.returncode
    return status, said


def _figure(name: str, text: str) -> int:
    found = re.search(rf"stat::{name}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0


def main() -> int:
    """Read the command line and fuzz."""
    names = ["tar", "index", "run_file", "policy_artefact", "state_dict", "codecs"]
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="executions of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=names, help="fuzz this target in this very process")
    parser.add_argument("targets", nargs="*", help=f"default: {', '.join(names)}")
    arguments = parser.parse_args()
    if arguments.only:
        fuzz_one(arguments.only, arguments.count, arguments.seed)
        return 0
    return fuzz_all(arguments.targets or names, arguments.count, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
