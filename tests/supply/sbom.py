"""`python -m tests.supply.sbom FILE`: the pinned packages as a CycloneDX 1.6 document.

https://cyclonedx.org/docs/1.6/json/: one library a pin, named by its package URL (`pkg:pypi/...`).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PINS = ROOT / "constraints.txt"

_PIN = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!]+)")


def read_pins(path: Path = PINS) -> dict[str, str]:
    """Return versions by normalized name (PEP 503).

    Raises:
        ValueError: a line pins nothing, or a package is pinned twice.
    """
    pins: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _PIN.fullmatch(text)
        if found is None:
            raise ValueError(f"{path}, line {number}: write NAME==VERSION instead of {text!r}")
        name = re.sub(r"[-_.]+", "-", found["name"]).lower()
        if name in pins:
            raise ValueError(f"{path}, line {number}: {name} is pinned twice; remove one")
        pins[name] = found["version"]
    return pins


def bill_of_materials(pins: dict[str, str], *, version: str) -> dict[str, Any]:
    """Return the document; the same pins give the same one."""
    components = [_component(name, pins[name]) for name in sorted(pins)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**_component("headrace", version), "type": "application"}},
        "components": components,
    }


def _component(name: str, version: str) -> dict[str, str]:
    # A local version's plus sign must be escaped in a package URL.
    purl = f"pkg:pypi/{name}@{version.replace('+', '%2B')}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
    }


def main() -> int:
    """Write the document."""
    parser = argparse.ArgumentParser(prog="python -m tests.supply.sbom", description=__doc__)
    parser.add_argument("file", type=Path)
    path: Path = parser.parse_args().file
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    document = bill_of_materials(read_pins(), version=project["version"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"{path}: {len(document['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
