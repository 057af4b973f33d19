"""The live page: what the controller decides, while it happens, for whoever looks and steers.

    who             does                                   waits for
    page thread     HTTP, reads the ledger, packs          the ledger's file, the status
    control loop    answers `Operated` calls               never for the page

The page has a thread and an event loop of its own, and a bound on what reading may cost. It takes
from the control loop one status a second, and only while somebody looks.
"""
