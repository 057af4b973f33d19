"""How the property tests search, and the fault suite's bookkeeping.

Property tests search anew on every run here, and the same examples on every run in CI.
"""

from __future__ import annotations

import os

from hypothesis import settings

pytest_plugins = ["tests.fault_table"]

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
