"""`headrace report`: one page with all plots that fetches and runs nothing, whatever names hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from controller.ledger import Ledger
from controller.ledger_schema import Entry, Kind, event_entry, quarantine_entry
from deploy.commands import app
from deploy.reading.curves import read_curves
from deploy.reading.page import MOST_DOMAINS, write_report_page
from deploy.reading.svg import areas, heat_map, lines
from deploy.record import read_record
from protos.types import Quarantine
from tests.benchmarks.bench_reading import write_long_ledger
from tests.fakes_deploy import DOMAINS, write_ledger

HOSTILE = (
    "</title><script>alert(1)</script>",
    "'\" onload='alert(2)",
    "a\x00b\u202e &amp; <img src=http://evil.example/x>",
)
NUM_STEPS = 60
_VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Every element of a page, each closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def add_run(path: Path, domains: tuple[str, ...], *, policy: str = "acodm") -> None:
    settings = {"policy": {"name": policy}}
    body = {"run": "test", "domains": list(domains), "order_sha256": "0" * 64, "settings": settings}
    lost = Quarantine(domain=domains[1], shard="<b>a.tar", sample=3, reason="it is <i>torn</i>")
    with Ledger(path, now=lambda: 1e6) as ledger:
        ledger.commit(
            [
                Entry(kind=Kind.RUN, step=-1, body=body),
                quarantine_entry(lost, worker_id="w"),
                event_entry("worker lost", worker="<u>w-1", reason="silent"),
            ]
        )


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    write_ledger(path, num_steps=NUM_STEPS)
    add_run(path, DOMAINS)
    return path


def figures(text: str) -> dict[str, ElementTree.Element]:
    """Return each plot by its title; each is well-formed."""
    found = {}
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        element = ElementTree.fromstring(svg)
        found[element.attrib["aria-label"]] = element
    return found


def test_the_page_has_all_plots_and_the_numbers_of_the_ledger(ledger: Path) -> None:
    text = write_report_page(ledger).read_text()
    page = Page(text)
    plots = figures(text)
    assert {
        "The mixture that the plans gave",
        "The mixture that was delivered",
        "Training loss of each domain (nats a token)",
        "Delivered less planned share, largest of all domains",
        "How far the domains' gradients agree (cosines), first quarter",
        "How far the domains' gradients agree (cosines), last quarter",
    } <= set(plots)
    stacked = plots["The mixture that the plans gave"]
    assert len(stacked.findall("polygon")) == len(DOMAINS)
    assert {each.findtext("title") for each in stacked.findall("polygon")} == set(DOMAINS)
    words = " ".join(page.words)
    record = read_record(ledger)
    assert f"{record.tokens():,}" in words
    assert str(NUM_STEPS) in page.words
    for name in DOMAINS:
        assert name in page.words
    assert "it is <i>torn</i>" in page.words


def test_curves_are_means_over_the_steps_of_each_point(ledger: Path) -> None:
    record = read_record(ledger)
    for points in (1, 7, NUM_STEPS, 1000):
        curves = read_curves(ledger, points=points)
        assert curves.num_steps == NUM_STEPS
        assert curves.tokens.sum() == record.tokens()
        assert (curves.count > 0).all()
        for point, (begin, end) in enumerate(
            zip(curves.first_steps[:-1], curves.first_steps[1:], strict=True)
        ):
            seen = [record.steps[step].observation for step in range(begin, end)]
            shares = np.mean([each.planned for each in seen], axis=0)
            assert np.allclose(curves.shares[point], shares)
            loss = sum(each.loss_sum for each in seen) / sum(each.tokens for each in seen)
            assert np.allclose(curves.loss[point], loss)


def test_abandoned_steps_are_left_out(ledger: Path) -> None:
    with Ledger(ledger, now=lambda: 1e6) as writing:
        writing.commit([Entry(kind=Kind.FORK, step=25, body={"generation": 2})])
    curves = read_curves(ledger)
    assert curves.num_steps == 25
    assert curves.num_superseded == NUM_STEPS - 25
    assert curves.tokens.sum() == read_record(ledger).tokens()
    write_report_page(ledger)


def test_hostile_names_are_text_and_nothing_is_fetched_or_run(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    write_ledger(path, num_steps=20)
    add_run(path, HOSTILE, policy="<script>")
    text = write_report_page(path).read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "form",
        "u",
        "b",
        "iforeignobject",
    }
    policies = [held for tag, held in page.elements if held.get("http-equiv")]
    assert policies[0]["content"].startswith("default-src 'none'")  # type: ignore[union-attr]
    for _, held in page.elements:
        for name, value in held.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value is not None
                assert value.startswith("data:image/png;base64,")
    assert "url(" not in text
    assert "\x00" not in text
    assert "\u202e" not in text
    assert any(HOSTILE[0] in words for words in page.words)
    assert figures(text)


def test_many_domains_are_drawn_as_the_largest_and_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    write_long_ledger(path, num_steps=50, num_domains=200)
    text = write_report_page(path, tmp_path / "page.html").read_text()
    stacked = figures(text)["The mixture that the plans gave"].findall("polygon")
    assert len(stacked) == MOST_DOMAINS + 1
    assert stacked[-1].findtext("title") == "180 other domains"
    assert len(text) < 1_000_000
    assert Page(text).words.count("domain-123") >= 1


def test_a_run_without_steps_has_a_page_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    write_ledger(path, num_steps=0)
    add_run(path, DOMAINS)
    text = write_report_page(path).read_text()
    Page(text)
    assert not figures(text)


def test_a_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    write_ledger(path, num_steps=1)
    add_run(path, DOMAINS)
    assert "Training loss of each domain (nats a token)" in figures(
        write_report_page(path).read_text()
    )


def test_plots_without_numbers_are_left_out_and_gaps_stay_gaps() -> None:
    x = np.arange(4.0)
    nothing = np.full(4, np.nan)
    assert lines(x, {"a": nothing}, "t", unit="") == ""
    assert lines(x, {}, "t", unit="") == ""
    assert areas(x, {"a": nothing}, "t") == ""
    gap = lines(x, {"a": np.array([1.0, np.nan, 2.0, 3.0])}, "t", unit="")
    path = re.search(r"<path d='(M[^']*)' fill", gap)
    assert path is not None
    assert path[1].count("M") == 2
    flat = lines(x, {"a": np.zeros(4)}, "t", unit="")
    assert "nan" not in flat
    huge = lines(x, {"a": np.array([1e-300, 1e300, -1e300, 0])}, "t", unit="")
    assert "nan" not in huge
    picture = heat_map(np.array([[1.0, np.nan], [0.5, 1.0]]), ["a", "b"], "t")
    assert "data:image/png;base64," in picture


def test_the_command_writes_the_page_and_tells_where(ledger: Path, tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert made.exit_code == 0, made.output
    assert made.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").is_file()
    content = bytearray(ledger.read_bytes())
    at = content.index(b'"planned"')
    content[at + 1 : at + 8] = b"PLANNED"
    ledger.write_bytes(content)
    damaged = CliRunner().invoke(app, ["report", str(ledger), "--out", str(tmp_path / "x.html")])
    assert damaged.exit_code == 5
    assert not (tmp_path / "x.html").exists()
