"""How the property tests search, and the fault suite's bookkeeping.

Property tests search anew on every run here, and the same examples on every run in CI.
"""

from __future__ import annotations

import os
import signal

from hypothesis import settings

pytest_plugins = ["tests.fault_table"]

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a job that a shell has put in the background; processes started here would inherit it,
    # and tests of Ctrl-C would wait for what cannot come.
    signal.signal(signal.SIGINT, signal.default_int_handler)
