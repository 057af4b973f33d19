"""The bill of materials names every pinned package, and every need of the project is pinned."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.supply.sbom import PINS, ROOT, bill_of_materials, read_pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_pinned_package_is_in_the_bill_of_materials(tmp_path: Path) -> None:
    path = tmp_path / "build" / "sbom.json"
    command = [sys.executable, "-m", "tests.supply.sbom", str(path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    document = json.loads(path.read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    found = {each["name"]: each["version"] for each in document["components"]}
    lines = [line.split("==") for line in PINS.read_text().splitlines()]
    assert found == {_normal(name): version for name, version in lines}
    assert f"pkg:pypi/torch@{found['torch']}" in {each["purl"] for each in document["components"]}


def test_every_package_that_the_project_names_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"]]
    needs += [need for extra in project["optional-dependencies"].values() for need in extra]
    names = {_normal(re.split(r"[\[<>=]", need)[0]) for need in needs} - {"headrace"}
    assert names - set(read_pins()) == set()


def test_a_line_that_pins_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("numpy==2.4.6\nray>=2\n")
    with pytest.raises(ValueError, match=r"line 2: write NAME==VERSION instead of 'ray>=2'"):
        read_pins(path)
    path.write_text("typing_extensions==1\ntyping-extensions==2\n")
    with pytest.raises(ValueError, match="pinned twice"):
        read_pins(path)


def test_a_local_version_is_escaped_in_the_package_url() -> None:
    document = bill_of_materials({"torch": "2.13.0+cpu"}, version="1")
    assert document["components"][0]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
