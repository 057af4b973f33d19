"""The live page in a real Chromium: what it shows, to whom, and that no name does anything."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from controller.ledger import reading_ledger
from tests.browser import Browser, chromium
from tests.fakes_controller import join_request, make_report
from tests.fakes_driver import Worker
from tests.fakes_page import HOSTILE, Served, many_domains, page_run, served, write_course
from tests.fakes_security import Authority, make_token, write_tokens

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

DOMAINS = 200
PAINT_MS = 500
_SHOWN = "return document.querySelectorAll('#domains tr').length === arguments[0]"
_FOCUSED = "return document.activeElement === document.getElementById(arguments[0])"


@pytest.fixture(name="browser", scope="module")
def _browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(name="site", scope="module", params=[1_000, 100_000], ids=["1k", "100k"])
def _site(
    request: pytest.FixtureRequest, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A run of many steps and domains; the browser first, which may not be there."""
    folder = tmp_path_factory.mktemp("run")
    config = page_run(folder, many_domains(DOMAINS), steps=request.param + 1000)
    write_course(config, request.param, align_every=max(20, request.param // 100))
    with served(folder / "run.yaml") as found:
        yield found


def _open(browser: Browser, site: Served, *, width: int = 1440, dark: bool = False) -> None:
    browser.look(width=width, dark=dark)
    browser.leave()
    browser.driver.get(site.page)
    browser.until(_SHOWN, DOMAINS)
    browser.until("return document.querySelectorAll('#decision .flow').length")
    browser.until("return document.querySelector('#heat canvas') !== null")


def test_all_is_drawn_without_a_complaint_and_no_name_does_anything(
    browser: Browser, site: Served
) -> None:
    _open(browser, site)
    assert browser.complaints() == []
    names = browser.run(
        "return [...document.querySelectorAll('#domains .name')].map((node) => node.textContent)"
    )
    assert len(names) == DOMAINS
    # All but the one that would turn its neighbours round is shown as it is.
    assert set(HOSTILE) - set(names) == {HOSTILE[1]}
    assert browser.run("return document.querySelectorAll('img, main script').length") == 0
    assert browser.run("return [window.hit ?? null, document.title]") == [None, "small · Headrace"]
    painted = browser.run(
        "return ['c-mixture', 'c-loss', 'c-reward', 'c-speed'].map((id) => {"
        " const canvas = document.querySelector(`#${id} canvas`);"
        " const data = canvas.getContext('2d')"
        "   .getImageData(0, 0, canvas.width, canvas.height).data;"
        " return data.some((value) => value > 0); })"
    )
    assert painted == [True] * 4


def test_the_first_paint_comes_within_half_a_second(browser: Browser, site: Served) -> None:
    paints = []
    for _ in range(5):
        _open(browser, site)
        entry = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
        paints.append(float(browser.run(entry)))
    print(f"first contentful paint, ms: {sorted(round(paint) for paint in paints)}")
    # The best of five: what it takes, and not what else this machine has to do.
    assert min(paints) < PAINT_MS, paints


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1440, 360])
def test_axe_finds_nothing_wrong_and_nothing_sticks_out(
    browser: Browser, site: Served, width: int, dark: bool
) -> None:
    _open(browser, site, width=width, dark=dark)
    assert browser.violations() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_everything_can_be_done_by_keyboard(browser: Browser, site: Served) -> None:
    _open(browser, site)
    reached = set()
    for _ in range(60):
        _press(browser, Keys.TAB)
        reached.add(browser.run("return document.activeElement.id"))
    wanted = {"freeze", "resume", "override", "snapshot", "scrub", "latest", "filter"}
    assert wanted <= reached
    browser.run("document.getElementById('scrub').focus()")
    _press(browser, Keys.HOME)
    browser.until("return document.getElementById('decision-title').textContent.endsWith(' 0')")
    browser.run("document.querySelector('#heat canvas').focus()")
    _press(browser, Keys.ARROW_RIGHT)
    browser.until(
        "return document.querySelector('#heat figcaption').textContent.includes(' with ')"
    )
    browser.run("document.getElementById('override').focus()")
    _press(browser, Keys.ENTER)
    browser.until("return document.getElementById('steer').open")
    _press(browser, Keys.ESCAPE)
    browser.until("return !document.getElementById('steer').open")
    browser.until(_FOCUSED, "override")
    browser.run("document.getElementById('freeze').focus()")
    _press(browser, Keys.ENTER)
    banner = "return document.getElementById('banner').textContent.includes(arguments[0])"
    browser.until(banner, "Operator at the wheel")
    browser.run("document.getElementById('resume').focus()")
    _press(browser, Keys.ENTER)
    browser.until(f"return !({banner.removeprefix('return ')})", "Operator at the wheel")
    assert browser.complaints() == []


def test_a_range_is_drawn_in_finer_points_by_pointer_and_by_keyboard(
    browser: Browser, site: Served
) -> None:
    _open(browser, site)
    chart = browser.driver.find_element(By.CSS_SELECTOR, "#c-loss .u-over")
    drag = ActionChains(browser.driver).move_to_element(chart)
    drag.click_and_hold().move_by_offset(60, 0).release().perform()
    first, last = _shown_range(browser)
    assert 0 < last - first < _newest(browser) / 3
    assert browser.run("return document.getElementById('decision-title').textContent") != ""
    range_ = "document.getElementById('zoom-range').textContent"
    for button in ("zoom-in", "zoom-earlier"):
        browser.run("document.getElementById(arguments[0]).focus()", button)
        before = browser.run(f"return {range_}")
        _press(browser, Keys.ENTER)
        browser.until(f"return {range_} !== arguments[0]", before)
    while "apart" in (before := browser.run(f"return {range_}")):
        browser.run("document.getElementById('zoom-in').click()")
        browser.until(f"return {range_} !== arguments[0]", before)
    assert browser.violations() == []
    browser.run("document.getElementById('zoom-whole').focus()")
    _press(browser, Keys.ENTER)
    browser.until(f"return {range_} === 'the whole run'")
    assert browser.complaints() == []


def _shown_range(browser: Browser) -> tuple[int, int]:
    """Wait until the charts show a range of steps; return its ends."""
    text = "document.getElementById('zoom-range').textContent"
    told = browser.until(f"return {text}.startsWith('steps ') && {text}")
    first, last = re.findall(r"\d[\d,]*\d|\d", told)[:2]
    return int(first.replace(",", "")), int(last.replace(",", ""))


def _newest(browser: Browser) -> int:
    return int(browser.run("return document.getElementById('scrub').max"))


def _press(browser: Browser, key: str) -> None:
    ActionChains(browser.driver).send_keys(key).perform()


def test_a_mixture_is_set_by_hand_after_a_preview(browser: Browser, tmp_path: Path) -> None:
    guard = {"max_share": 0.5}
    config = page_run(tmp_path, ("web", "code", "books"), steps=60, guard=guard)
    write_course(config, 10, align_every=2)
    with served(tmp_path / "run.yaml") as site:
        browser.look(width=1440)
        browser.leave()
        browser.driver.get(site.page)
        browser.until(_SHOWN, 3)
        browser.run("document.getElementById('override').click()")
        browser.run(
            "document.querySelectorAll('#steer-rows input[type=number]').forEach((box, index) => {"
            " box.value = [6, 3, 1][index]; box.dispatchEvent(new Event('input')); });"
            "document.getElementById('steer-preview').click()"
        )
        note = browser.until(
            "const said = document.getElementById('steer-note').textContent;"
            "return said.startsWith('The guard') && said"
        )
        assert "max_share: lowered web" in note
        row = "return document.querySelector('#steer-rows tr').textContent"
        assert browser.run(row).endswith("60.00%50.00%")
        browser.run("document.getElementById('steer-guarded').click()")
        browser.until("return !document.getElementById('steer').open")
        with reading_ledger(config.ledger_path) as database:
            (body,) = database.execute("SELECT body FROM ledger WHERE kind = 'control'").fetchone()
        assert str(2**31) in body
        assert browser.complaints() == []


def test_a_step_is_on_the_screen_within_a_second(browser: Browser, tmp_path: Path) -> None:
    page_run(tmp_path, ("web", "code", "books"), steps=60)
    with served(tmp_path / "run.yaml") as site:
        worker = Worker(site.address)
        with closing(worker):
            worker.client.join(join_request(0, 1))
            browser.look(width=1440)
            browser.leave()
            browser.driver.get(site.page)
            browser.until("return document.getElementById('live-text').textContent === 'live'")
            waits = []
            for step in range(7):
                began_s = time.monotonic()
                worker.client.report(make_report(worker.spec, step=step))
                shown = "return document.getElementById('step-now').textContent === arguments[0]"
                browser.until(shown, str(step + 1))
                waits.append(time.monotonic() - began_s)
            print(f"report to screen, s: {[round(wait, 2) for wait in waits]}")
            # The first one too, which nothing has woken the page for; of the machine's worse
            # moments the median of the others knows nothing.
            assert waits[0] < 1.0, waits
            assert sorted(waits)[len(waits) // 2] < 1.0, waits
            chart = browser.driver.find_element(By.CSS_SELECTOR, "#c-loss .u-over")
            quarter = chart.size["width"] // 4
            drag = ActionChains(browser.driver).move_to_element_with_offset(chart, -quarter, 0)
            drag.click_and_hold().move_by_offset(quarter, 0).perform()
            for step in range(7, 15):
                worker.client.report(make_report(worker.spec, step=step))
                browser.until(shown, str(step + 1))
            ActionChains(browser.driver).release().perform()
            # What came meanwhile has not moved the steps from beneath the pointer.
            assert 0 < _shown_range(browser)[0] < _shown_range(browser)[1] < 5


def test_who_has_the_join_token_looks_and_steers_nothing(browser: Browser, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls", "ours")
    cert, key = authority.issue("server")
    join, admin = make_token(), make_token()
    security = {
        "tls": {"cert": str(cert), "key": str(key), "ca": str(authority.pem)},
        "join_token_file": str(write_tokens(tmp_path / "join", join)),
        "admin_token_file": str(write_tokens(tmp_path / "admin", admin)),
    }
    config = page_run(tmp_path, ("web", "code", "books"), steps=60, security=security)
    write_course(config, 10)
    with served(tmp_path / "run.yaml") as site:
        for token, may_steer in ((make_token(), None), (join, False), (admin, True)):
            browser.driver.get(f"{site.page}login")
            assert browser.violations() == []
            browser.run("document.getElementById('token').value = arguments[0]", token)
            browser.run("document.querySelector('button').click()")
            if may_steer is None:
                browser.until(
                    "const alert = document.getElementById('refused');"
                    "return alert && getComputedStyle(alert).display === 'block'"
                )
                continue
            browser.until(_SHOWN, 3)
            assert browser.run("return !document.getElementById('actions').hidden") is may_steer
            assert browser.run("return document.cookie") == ""
            browser.run("document.querySelector('#logout button').click()")
            browser.until("return document.getElementById('token') !== null")
        assert [each for each in browser.complaints() if "Refused" in each] == []
