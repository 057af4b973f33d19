"""Nothing is looked up, fetched or told elsewhere at run time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness_runs import complete
from tests.net_nodes import network

CLOUD = "169.254.169.254"
"""Where clouds tell a machine of itself; Ray looks up a name for that, too."""


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_run_on_text_of_this_machine_sends_nothing_to_another(tmp_path: Path) -> None:
    """But for Ray, which asks the machine's cloud for its name, also with usage statistics off."""
    with network() as net:
        net.add("alone")
        for which in (("-d", CLOUD), ("-p", "udp", "--dport", "53")):
            net.let_vanish("alone", *which)
        net.lose("alone", 1.0)
        arguments = ["--out", str(tmp_path / "out"), "--steps", "20", "--policy", "acodm"]
        complete(arguments, log=tmp_path / "log", timeout_s=240, prefix=net.on("alone"))
        assert net.lose_no_more("alone") == 0
        # What is sent is counted.
        net.lose("alone", 1.0)
        send = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'?', ('192.0.2.1', 9))"
        subprocess.run([*net.on("alone"), sys.executable, "-c", send], check=False, timeout=30)
        assert net.lose_no_more("alone") == 1
