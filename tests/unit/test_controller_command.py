"""`headrace controller` refuses what it can see at once before it reads any shard."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deploy.commands import app
from tests.fakes_controller import run_document


def _refused(tmp_path: Path, *, code: int, says: str, **changes: object) -> None:
    # The shards do not exist: whoever looks for them first says so instead.
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_document(tmp_path, **changes)))
    result = CliRunner().invoke(app, ["controller", str(run_file)])
    assert result.exit_code == code, result.output
    (sentence,) = result.stderr.splitlines()
    assert says in sentence
    assert {path.name for path in tmp_path.iterdir()} <= {"run.yaml", "tokenizer.json"}


@pytest.mark.parametrize(
    ("content", "says"),
    [("{}", "is not a tokenizer file"), (None, "cannot read the tokenizer")],
)
def test_a_tokenizer_that_is_none_is_refused_before_shards_are_read(
    tmp_path: Path, content: str | None, says: str
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    if content is not None:
        tokenizer.write_text(content)
    data = {"tokenizer": str(tokenizer), "vocab_size": None, "eot_id": None}
    _refused(tmp_path, code=4, says=says, data=data)


def test_a_port_that_is_taken_is_refused_before_shards_are_read(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        _refused(tmp_path, code=3, says=f"cannot serve {address}", address=address)
