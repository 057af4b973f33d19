"""What the command's exit codes mean, in the words of its help."""

from __future__ import annotations

STOPPED = 130
"""After Ctrl-C or SIGTERM."""

EXIT_CODES_HELP = (
    "Exit codes: 0 done, 1 no answer, 2 bad input or settings, 3 another controller holds ledger "
    "or port, 4 data, 5 ledger, 6 the trainer failed, 130 stopped by Ctrl-C or SIGTERM."
)
