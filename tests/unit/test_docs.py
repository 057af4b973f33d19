"""README and deploy/docs: every block, link and named test, as far as that is quick."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

import trainer_client
from controller.config import RunConfig, parse_run
from deploy.compare.spec import load_spec
from tests.command_parsers import Refused, check_command
from tests.docs_blocks import PAGES, ROOT, Block, all_blocks, blocks_of
from trainer_client import Batch, Session

BLOCKS = all_blocks()
_API: dict[str, Any] = {"session": Session, "batch": Batch, "trainer_client": trainer_client}
_TEXT = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


def blocks(*ways: str) -> list[Any]:
    return [pytest.param(each, id=each.place) for each in BLOCKS if each.way in ways]


@pytest.mark.parametrize("block", blocks("parsed"))
def test_every_command_is_taken_by_its_program(block: Block) -> None:
    for command in block.commands():
        check_command(command)


def test_a_command_that_no_program_takes_is_found() -> None:
    for command in (
        "headrace run --no-such-option",
        "headrace no-such-command",
        "headrace mixture no-such-command",
        "python -m loader_workers --cache DIR",
        "torchrun --no-such-option train.py",
        "make no-such-target",
        "ray job no-such-command",
        "unknown-program",
    ):
        with pytest.raises(Refused):
            check_command(command)


def test_a_block_without_a_known_way_is_an_error() -> None:
    page = ROOT / "README.md"
    for text in ("```fish\nls\n```", "<!-- tset: run -->\n```bash\nls\n```", "```bash\nls"):
        with pytest.raises(ValueError, match="README.md:"):
            blocks_of(page, text)


@pytest.mark.parametrize("block", blocks("compiled", "policy"))
def test_python_compiles_imports_what_is_there_and_uses_what_we_have(block: Block) -> None:
    tree = ast.parse(textwrap.dedent(block.text))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, each.name) for each in node.names)
        elif isinstance(node, ast.Import):
            for each in node.names:
                importlib.import_module(each.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = _API.get(node.value.id)
            known = owner is None or hasattr(owner, node.attr)
            assert known or node.attr in getattr(owner, "__annotations__", {}), node.attr


def test_the_policy_of_the_guide_runs_and_keeps_the_laws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "guide"}
    ours = [block for block in BLOCKS if block.way == "policy"]
    assert len(ours) == 2
    for block in ours:
        exec(compile(block.text, block.place, "exec"), names)
    assert (tmp_path / "state.safetensors").exists()


BASE = """
run: r
steps: 10
out: out
data: {index: i.parquet, domains: {web: {shards: [a]}, code: {shards: [b]}}, tokenizer: t.json}
batch: {global_sequences: 8, sequence_length: 8}
policy: {name: uniform}
"""


@pytest.mark.parametrize("block", blocks("run file"))
def test_a_run_file_is_one(block: Block) -> None:
    assert isinstance(parse_run(yaml.safe_load(block.text), source=block.place), RunConfig)


@pytest.mark.parametrize("block", blocks("run file keys"))
def test_keys_of_a_run_file_are_such(block: Block) -> None:
    document = {**yaml.safe_load(BASE), **yaml.safe_load(block.text)}
    parse_run(document, source=block.place)


@pytest.mark.parametrize("block", blocks("compare file"))
def test_a_comparison_is_one(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "compare.yaml"
    path.write_text(block.text)
    assert len(load_spec(path).arms) > 1


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_is_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text)


@pytest.mark.parametrize("block", blocks("not run"))
def test_what_cannot_run_here_says_why_and_names_files_that_are_there(block: Block) -> None:
    assert len(block.reason) > 10
    for name in re.findall(r"(?<![\w/])deploy/[\w./*-]+", block.text):
        assert list(ROOT.glob(name)), name
    for command in block.commands():
        if command.startswith(("headrace", "python -m", "make")):
            check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, part = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if part:
            heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
            assert part in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`(test_\w+)`", page.read_text()):
        assert f"def {name}(" in _TEXT, name


def test_every_guide_is_in_the_index() -> None:
    index = (ROOT / "deploy/docs/README.md").read_text()
    for page in PAGES[1:]:
        assert page.name == "README.md" or f"]({page.name})" in index, page.name
