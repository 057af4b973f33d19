"""No file of the project names a place that packages or models are fetched from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# In parts, so that this file names none of them itself.
_PARTS = (
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("download", "pytorch", "org"),
    ("anaconda", "org"),
    ("registry", "npmjs", "org"),
    ("huggingface", "co"),
    ("hf", "co"),
    ("modelscope", "cn"),
)
HOSTS = tuple(".".join(parts) for parts in _PARTS)
_NAMED = re.compile("|".join(rf"(?<![\w-]){re.escape(host)}(?![\w-])" for host in HOSTS), re.I)


def test_no_tracked_file_names_a_registry_or_a_model_hub() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: which files are the project's cannot be told")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    assert "pyproject.toml" in names
    found = [
        f"{name}: {match.group()}"
        for name in names
        if (ROOT / name).is_file()
        for match in _NAMED.finditer((ROOT / name).read_bytes().decode(errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_is_found_in_an_address_but_not_within_another_name(host: str) -> None:
    assert _NAMED.search(f"pip install -i https://{host}/simple")
    assert _NAMED.search(f"https://files.{host}:443/x")
    assert not _NAMED.search(f"my-{host}")
