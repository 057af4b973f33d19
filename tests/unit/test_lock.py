"""The lock has hashes of every pinned release, and pip installs no file of another one."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from tests.supply.sbom import ROOT, read_pins

LOCKS = {
    "constraints.txt": "requirements.lock",
    "tests/integration/torchtitan.txt": "tests/integration/torchtitan.lock",
}
"""What is locked, and where."""

BY_VERSION_ALONE = {"torch", "atheris"}
"""Torch's build depends on the machine; only `make fuzz` needs the other, where it has a wheel."""

_ENTRY = re.compile(
    r"(?P<name>[\w.-]+)==(?P<version>\S+) \\\n(?P<hashes>(?: +--hash=\S+(?: \\)?\n)+)"
)


def _entries(lock: Path) -> dict[str, tuple[str, list[str]]]:
    text = lock.read_text()
    found = list(_ENTRY.finditer(text))
    assert "".join(each[0] for each in found) == text, "nothing else is in it"
    return {
        re.sub(r"[-_.]+", "-", each["name"]).lower(): (
            each["version"],
            re.findall(r"--hash=sha256:([0-9a-f]{64})\b", each["hashes"]),
        )
        for each in found
    }


@pytest.mark.parametrize("pinned", LOCKS)
def test_every_pinned_release_is_locked_by_hashes(pinned: str) -> None:
    pins, locked = read_pins(ROOT / pinned), _entries(ROOT / LOCKS[pinned])
    assert {name: version for name, (version, _) in locked.items()} == {
        name: version for name, version in pins.items() if name not in BY_VERSION_ALONE
    }, "`make lock` writes it anew"
    assert all(hashes for _, hashes in locked.values())


def test_a_file_of_another_hash_is_not_installed(tmp_path: Path) -> None:
    wheel = tmp_path / "parcel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("parcel.py", "")
        archive.writestr(
            "parcel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: parcel\nVersion: 1.0\n"
        )
        archive.writestr(
            "parcel-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("parcel-1.0.dist-info/RECORD", "")
    right = sha256(wheel.read_bytes()).hexdigest()

    def install(digest: str, target: str) -> subprocess.CompletedProcess[str]:
        lock = tmp_path / f"{target}.lock"
        lock.write_text(f"parcel==1.0 \\\n    --hash=sha256:{digest}\n")
        options = ["--require-hashes", "--no-deps", "--no-index", "--find-links", str(tmp_path)]
        return subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "--quiet", *options),
                *("--target", str(tmp_path / target), "-r", str(lock)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )

    assert install(right, "right").returncode == 0
    assert (tmp_path / "right" / "parcel.py").exists()
    wrong = install("0" * 64, "wrong")
    assert wrong.returncode != 0
    assert "DO NOT MATCH THE HASHES" in wrong.stderr
    assert not (tmp_path / "wrong" / "parcel.py").exists()
