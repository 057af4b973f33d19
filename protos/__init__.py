"""The contract between the parts: values, services, wire, and arithmetic exact to the bit."""

HEADRACE = "headrace"
"""Tells our `protos` package from any other of that name on a trainer's path."""
