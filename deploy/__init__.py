"""How Headrace is started: command line, local harness, examples."""
