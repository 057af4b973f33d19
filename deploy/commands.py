"""The commands, put together."""

from __future__ import annotations

from deploy import (
    commands_cluster,
    commands_compare,
    commands_data,
    commands_ledger,
    commands_live,
    commands_run,
)
from deploy.explain import explain
from deploy.overview import make_app

app = make_app()
app.command("run")(commands_run.run)
app.command("compare")(commands_compare.compare)
app.command("pack")(commands_data.pack)
app.command("index")(commands_data.index)
app.command("verify")(commands_data.verify)
app.command("explain")(explain)
app.command("export")(commands_ledger.export)
app.command("replay")(commands_ledger.replay)
app.command("report")(commands_ledger.report)
app.command("controller")(commands_live.controller)
app.command("up")(commands_cluster.up)
app.command("down")(commands_cluster.down)
app.command("logs")(commands_cluster.logs)
app.command("status")(commands_live.status)
app.add_typer(commands_live.mixture, name="mixture")
app.command("scale")(commands_live.scale)
app.command("freeze")(commands_live.freeze)
app.command("resume")(commands_live.resume)
app.command("snapshot")(commands_live.snapshot)
app.command("drain")(commands_live.drain)
app.command("doctor")(commands_run.doctor)
