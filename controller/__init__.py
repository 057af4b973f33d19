"""The one process that decides: sessions, reports, policies, ledger."""
