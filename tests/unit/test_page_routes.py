"""The page's answers, over HTTP, from a controller that a test moves."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller.config import parse_run
from controller.dashboard import live
from controller.dashboard.server import PageServer
from controller.threads import Bell
from protos.errors import AlreadyServing, ConfigError
from tests.fakes_controller import ACODM, Bench, bench, run_document, small_run

PAGE = {"dashboard": {"address": "127.0.0.1:0"}}


def _call(url: str, body: object = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"X-Headrace": "1", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=20) as got:
            return got.status, json.loads(got.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _packed(values: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    return base64.b64encode(values.tobytes()).decode()


class _Site:
    """A page and the controller behind it."""

    def __init__(self, made: Bench, url: str) -> None:
        self.bench = made
        self._url = url

    def is_held(self) -> bool:
        return self.bench.loop.steering.override is not None

    async def get(self, path: str) -> tuple[int, Any]:
        return await asyncio.to_thread(_call, f"{self._url}{path}")

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        return await asyncio.to_thread(_call, f"{self._url}{path}", body)

    async def until(self, path: str, key: str, value: object) -> Any:
        async with asyncio.timeout(20):
            while (answer := (await self.get(path))[1])[key] != value:
                await asyncio.sleep(0.02)
        return answer


@asynccontextmanager
async def _site(folder: Path, **changes: Any) -> AsyncIterator[_Site]:
    config = small_run(folder, **PAGE, **changes)
    with bench(config) as made:
        server = PageServer(config)
        async with server.serving(made.service, made.spec):
            yield _Site(made, server.url)


def test_curves_decisions_and_the_heat_map_are_those_of_the_run(tmp_path: Path) -> None:
    async def check() -> None:
        async with _site(tmp_path, policy=ACODM) as site:
            await site.bench.join_all(1)
            for step in range(10):
                await site.bench.report_step(step)
            await site.bench.loop.flush()
            status, run = await site.get("api/run")
            assert (status, run["domains"]) == (200, ["web", "code", "books"])
            assert run["may_steer"]
            told = await site.until("api/series?domains=0,2", "length", 10)
            loss = np.frombuffer(base64.b64decode(told["loss"][0]), "<f4")
            assert np.isfinite(loss).all()
            _, part = await site.get("api/series?domains=0,2&first=3&last=6")
            assert (part["first"], part["width"], part["length"]) == (3, 1, 4)
            assert part["loss"][0] == _packed(loss[3:7])
            for query in ("first=3", "first=-1&last=6", "first=4&last=3", "first=x&last=4"):
                refused, why = await site.get(f"api/series?domains=0&{query}")
                assert refused == 400
                assert "first and last must be steps" in why["error"]
            _, heat = await site.get("api/alignment")
            assert (heat["step"], heat["size"]) == (9, 3)
            _, step = await site.get("api/steps/4")
            assert step["policy"]["proposed_step"] == 6
            assert sum(step["decision"]["mixture"]) == pytest.approx(1)
            assert len(step["observation"]["domains"]["loss"]) == 3
            assert "alignment" not in step["observation"]
            missing, why = await site.get("api/steps/400")
            assert missing == 404
            assert "knows nothing of step 400" in why["error"]
            assert str(tmp_path) not in why["error"]

    asyncio.run(check())


def test_an_operator_previews_overrides_freezes_resumes_and_saves(tmp_path: Path) -> None:
    async def check() -> None:
        guard = {"min_share": 0.1, "max_share": 0.6}
        async with _site(tmp_path, guard=guard) as site:
            await site.bench.join_all(1)
            await site.bench.report_step(0)
            status, told = await site.post("api/preview", {"shares": [8, 1, 1]})
            assert status == 200
            assert told["entered"] == pytest.approx([0.8, 0.1, 0.1])
            assert told["guarded"] == pytest.approx([0.6, 0.2, 0.2], abs=1e-6)
            assert any("max_share: lowered web" in each for each in told["reasons"])
            assert not site.is_held()
            status, told = await site.post("api/mixture", {"shares": [0.8, 0.1, 0.1]})
            assert (status, told) == (200, {"first_step": 3})
            assert site.is_held()
            assert (await site.post("api/resume", {}))[0] == 200
            assert not site.is_held()
            assert (await site.post("api/freeze", {}))[0] == 200
            assert site.bench.loop.steering.frozen
            _, saved = await site.post("api/snapshot", {})
            assert Path(saved["path"]).is_file()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"shares": [1, 2]}, "there are 2 shares, the run has 3 domains"),
        ({"shares": [1, -2, 1]}, "0 or more"),
        ({"shares": ["NaN", 1, 1]}, "0 or more"),
        ({"shares": "abc"}, "the request must be"),
        ({"shares": None}, "the request must be"),
        ([], "the request must be"),
        ({"shares": [0, 0, 0]}, "add up to 0"),
    ],
)
def test_shares_without_sense_are_refused_in_a_sentence(
    tmp_path: Path, body: object, said: str
) -> None:
    async def check() -> None:
        async with _site(tmp_path) as site:
            for path in ("api/preview", "api/mixture"):
                status, told = await site.post(path, body)
                assert status == 400
                assert said in told["error"]
            assert site.bench.loop.steering.override is None
            for domains in ("", "9", "0," * 17, "x", "-1"):
                asked = f"api/series?domains={domains}"
                assert (await site.get(asked))[0] == (200 if not domains else 400)

    asyncio.run(check())


def test_watchers_hear_of_a_step_and_of_how_the_run_stands(tmp_path: Path) -> None:
    async def check() -> None:
        async with _site(tmp_path) as site:
            await site.bench.join_all(1)

            def watch() -> tuple[str, str]:
                with urllib.request.urlopen(f"{site._url}api/events", timeout=20) as stream:
                    heard = b""
                    while b'"policy":"static"' not in heard or b'"step":0,"heat"' not in heard:
                        heard += stream.readline()
                    return stream.headers["content-type"], heard.decode()

            watching = asyncio.create_task(asyncio.to_thread(watch))
            await asyncio.sleep(0)
            await site.bench.report_step(0)
            await site.bench.loop.flush()
            kind, heard = await watching
            assert kind.startswith("text/event-stream")
            lines = [line[6:] for line in heard.splitlines() if line.startswith("data: ")]
            told = [json.loads(line) for line in lines]
            assert any(each.get("policy") == "static" for each in told)
            assert any(each.get("step") == 0 and each["points"] for each in told)

    asyncio.run(check())


def test_a_watcher_who_comes_and_a_step_are_heard_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever would wait for its interval never comes.
    monkeypatch.setattr(live, "IDLE_S", 3600.0)
    monkeypatch.setattr(live, "STATUS_S", 3600.0)

    async def check() -> None:
        async with _site(tmp_path) as site:
            await site.bench.join_all(1)
            await site.until("api/series?domains=0", "length", 0)

            def hear(stream: Any, wanted: bytes) -> None:
                while wanted not in (line := stream.readline()):
                    assert line, f"the stream ended before {wanted!r}"

            with urllib.request.urlopen(f"{site._url}api/events", timeout=20) as stream:
                await asyncio.to_thread(hear, stream, b'"phase":"running"')
                for step in range(4):
                    await site.bench.report_step(step)
                    await asyncio.to_thread(hear, stream, f'"step":{step},"heat"'.encode())

    asyncio.run(check())


def test_a_bell_wakes_for_what_happens_after_it_was_armed() -> None:
    async def check() -> None:
        bell = Bell()
        bell.ring()
        bell.arm()
        began_s = time.monotonic()
        await bell.wait(0.05)
        assert time.monotonic() - began_s >= 0.05
        for _ in range(2):
            for _ in range(3):
                await asyncio.to_thread(bell.ring)
            async with asyncio.timeout(20):
                await bell.wait()
            bell.arm()

    asyncio.run(check())
    bell = Bell()
    asyncio.run(_armed(bell))
    bell.ring()


async def _armed(bell: Bell) -> None:
    bell.arm()


def test_a_taken_port_and_an_open_one_are_refused_in_a_sentence(tmp_path: Path) -> None:
    config = small_run(tmp_path, **PAGE)
    server = PageServer(config)
    port = server.url.rstrip("/").rpartition(":")[2]
    taken = small_run(tmp_path, dashboard={"address": f"127.0.0.1:{port}"})
    with pytest.raises(AlreadyServing, match="cannot serve the page at 127.0.0.1"):
        PageServer(taken)
    server.close()
    open_to_all = run_document(tmp_path, dashboard={"address": "0.0.0.0:7780"})
    with pytest.raises(ConfigError, match=r"binding 0\.0\.0\.0:7780"):
        parse_run(open_to_all, source="run.yaml")
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_run(run_document(tmp_path, dashboard={"address": "here"}), source="run.yaml")
