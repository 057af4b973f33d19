"""The Ray that `headrace run` starts: nobody is let in without its token, which is in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.fakes_consumer import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SCRIPT = """
import json, os, stat
import grpc
import psutil
from deploy.local_ray import local_ray, temporary_folder
from deploy.processes import Family, StopSignals
from tests.fakes_security import call, make_token, shown

with (
    StopSignals() as stop,
    temporary_folder() as folder,
    local_ray(folder, num_actors=1, logs=folder / "logs", family=Family(), stop=stop),
):
    import ray

    context = ray.get_runtime_context()
    file = folder / "token"
    started = psutil.Process().children(recursive=True)
    found = {"mode": stat.S_IMODE(file.stat().st_mode), "processes": len(started)}
    # Ray starts a part of its dashboard even without one; that part must not serve.
    found["dashboard"] = [
        process.pid
        for process in started
        if any("dashboard/dashboard.py" in word for word in process.cmdline())
        and any(each.status == "LISTEN" for each in process.net_connections("tcp"))
    ]
    found["in_environment"] = file.read_text() in "".join(os.environ.values())
    with grpc.insecure_channel(context.gcs_address) as channel:
        for name, metadata in {
            "none": [],
            "another": shown(make_token()),
            "right": shown(file.read_text()),
        }.items():
            code, _ = call(channel, "/ray.rpc.JobInfoGcsService/GetAllJobInfo", metadata)
            found[name] = code.name
    print(json.dumps(found))
"""


def test_rays_ports_answer_nobody_without_the_token() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["none"], found["another"], found["right"]) == (
        "UNAUTHENTICATED",
        "UNAUTHENTICATED",
        "OK",
    )
    assert found["mode"] == 0o600
    assert not found["in_environment"]
    assert found["processes"] > 2
    assert not found["dashboard"]
