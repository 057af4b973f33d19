"""The page's addresses: what each answers. `access.Door` has let the request in."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from controller.dashboard.access import COOKIE, SESSION_S, Sessions, cookie_of, refused
from controller.dashboard.live import MAX_WATCHERS, Live
from controller.dashboard.operated import WORK_S
from controller.dashboard.series import MAX_CURVES
from controller.explanation import explain_step
from protos.errors import HeadraceError, InvalidMessage, NotReady
from protos.spec import RunSpec
from protos.tokens import Right

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).with_name("assets")

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """What the handlers work with."""

    spec: RunSpec
    live: Live
    ledger: Path
    guard: dict[str, Any]
    """The run's bounds, as its file has them."""

    def routes(self) -> list[Route | Mount]:
        """Return all addresses."""
        get, post = ["GET"], ["POST"]
        return [
            Route("/", _file("index.html"), methods=get),
            Route("/login", _file("login.html"), methods=get),
            Route("/login", _log_in, methods=post),
            Route("/logout", _log_out, methods=post),
            Route("/api/run", self._run, methods=get),
            Route("/api/events", self._events, methods=get),
            Route("/api/series", self._series, methods=get),
            Route("/api/alignment", self._alignment, methods=get),
            Route("/api/steps/{step:int}", self._step, methods=get),
            Route("/api/preview", _told(self._preview), methods=post),
            Route("/api/mixture", _told(self._set_mixture), methods=post),
            Route("/api/freeze", _told(self._freeze), methods=post),
            Route("/api/resume", _told(self._resume), methods=post),
            Route("/api/snapshot", _told(self._snapshot), methods=post),
            Mount("/assets", _Assets(directory=ASSETS)),
        ]

    async def _run(self, request: Request) -> Response:
        spec = self.spec
        return JSONResponse(
            {
                "run": spec.run_id,
                "domains": list(spec.domains),
                "num_steps": spec.num_steps,
                "lag": spec.lag,
                "global_sequences": spec.global_sequences,
                "guard": self.guard,
                "may_steer": request.state.right is Right.ADMIN,
                "has_session": bool(cookie_of(request.headers)),
            }
        )

    async def _events(self, request: Request) -> Response:
        if self.live.num_watchers >= MAX_WATCHERS:
            return refused(503, f"{MAX_WATCHERS} pages watch this run already; close one")
        return StreamingResponse(self.live.events(), media_type="text/event-stream")

    async def _series(self, request: Request) -> Response:
        try:
            domains = [int(text) for text in request.query_params["domains"].split(",") if text]
            if len(domains) > MAX_CURVES or not set(domains) <= set(range(self.spec.num_domains)):
                raise ValueError
        except (KeyError, ValueError):
            return refused(
                400,
                f"domains must be at most {MAX_CURVES} numbers of domains, with commas between",
            )
        if "first" not in request.query_params:
            return JSONResponse({"first": 0, **self.live.tail.series.curves(domains)})
        return await self._between(request, domains)

    async def _between(self, request: Request, domains: list[int]) -> Response:
        """Answer with the curves of a range of steps, finer than those of the whole run."""
        try:
            first, last = (int(request.query_params[name]) for name in ("first", "last"))
            if not 0 <= first <= last < 2**63:
                raise ValueError
        except (KeyError, ValueError):
            return refused(400, "first and last must be steps, the first one not after the last")
        try:
            series = await self.live.between(first, last)
        except HeadraceError as error:
            return refused(503, str(error).replace(str(self.ledger), "the ledger"))
        return JSONResponse({"first": first, **series.curves(domains)})

    async def _alignment(self, request: Request) -> Response:
        return JSONResponse(self.live.tail.heat.packed())

    async def _step(self, request: Request) -> Response:
        try:
            told = await run_in_threadpool(explain_step, self.ledger, request.path_params["step"])
        except HeadraceError as error:
            return refused(404, str(error).replace(str(self.ledger), "the ledger"))
        told["observation"].pop("alignment")
        return JSONResponse(_by_place(told, self.spec.domains))

    async def _preview(self, request: Request) -> dict[str, Any]:
        shares = await self._shares(request)
        total = sum(shares.values())
        entered = {name: share / total for name, share in shares.items()}
        result = await self._ask(self.live.reach.controller.preview(entered))
        return {
            "entered": list(entered.values()),
            "guarded": list(result.mixture.shares),
            "reasons": list(result.reasons),
            "held": result.held,
        }

    async def _set_mixture(self, request: Request) -> dict[str, Any]:
        shares = await self._shares(request)
        return {"first_step": await self._ask(self.live.reach.controller.set_mixture(shares))}

    async def _freeze(self, request: Request) -> dict[str, Any]:
        await self._ask(self.live.reach.controller.freeze())
        return {}

    async def _resume(self, request: Request) -> dict[str, Any]:
        await self._ask(self.live.reach.controller.resume())
        return {}

    async def _snapshot(self, request: Request) -> dict[str, Any]:
        saving = self.live.reach.controller.snapshot_policy()
        return {"path": await self.live.reach.ask(saving, WORK_S)}

    async def _ask(self, call: Any) -> Any:
        return await self.live.reach.ask(call)

    async def _shares(self, request: Request) -> dict[str, float]:
        """Return the shares that a request holds: a number for each domain, in their order."""
        try:
            shares = json.loads(await request.body())["shares"]
            known = [float(share) for share in shares]
        except (ValueError, TypeError, KeyError):
            raise InvalidMessage('the request must be {"shares": [numbers]}') from None
        if len(known) != self.spec.num_domains:
            raise InvalidMessage(
                f"there are {len(known)} shares, the run has {self.spec.num_domains} domains"
            )
        if not all(math.isfinite(share) and share >= 0 for share in known):
            raise InvalidMessage("shares must be numbers of 0 or more")
        if not sum(known) > 0:
            raise InvalidMessage("the shares add up to 0: give at least one domain a share")
        return dict(zip(self.spec.domains, known, strict=True))


class _Assets(StaticFiles):
    """Files that browsers ask for again each time, and mostly have already."""

    def file_response(self, *arguments: Any, **keywords: Any) -> Response:
        response = super().file_response(*arguments, **keywords)
        response.headers["cache-control"] = "no-cache"
        return response


def application(page: Page) -> Starlette:
    """Return the page without its door."""
    return Starlette(routes=page.routes())


def _file(name: str) -> Handler:
    async def answer(request: Request) -> Response:
        return FileResponse(ASSETS / name, headers={"cache-control": "no-cache"})

    return answer


def _told(work: Callable[[Request], Awaitable[dict[str, Any]]]) -> Handler:
    """Have what goes wrong said in the answer."""

    async def answer(request: Request) -> Response:
        try:
            return JSONResponse(await work(request))
        except NotReady as error:
            return refused(503, str(error))
        except HeadraceError as error:
            return refused(400, str(error))

    return answer


async def _log_in(request: Request) -> Response:
    sessions: Sessions = request.state.sessions
    fields = parse_qs((await request.body())[:4096].decode("latin-1"))
    cookie = sessions.begin(fields.get("token", [""])[0].strip())
    if cookie is None:
        logger.warning("a token that is not known was shown to the page")
        return RedirectResponse("/login#refused", status_code=303)
    response = RedirectResponse("/", status_code=303)
    response.set_cookie(
        COOKIE,
        cookie,
        max_age=int(SESSION_S),
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


async def _log_out(request: Request) -> Response:
    sessions: Sessions = request.state.sessions
    sessions.end(cookie_of(request.headers))
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(COOKIE)
    return response


def _by_place(told: dict[str, Any], domains: tuple[str, ...]) -> dict[str, Any]:
    """Turn what is told by domain into lists in the domains' order: names are data, not keys."""

    def listed(values: dict[str, Any] | None) -> list[Any] | None:
        return None if values is None else [values.get(domain) for domain in domains]

    seen = told["observation"]
    rows = [seen["domains"][domain] for domain in domains]
    columns = rows[0].keys() if rows else ()
    seen["domains"] = {name: [row[name] for row in rows] for name in columns}
    told["policy"]["proposal"] = listed(told["policy"]["proposal"])
    told["decision"]["mixture"] = listed(told["decision"]["mixture"])
    told["decision"].pop("changed")
    if told["plan"] is not None:
        told["plan"]["mixture"] = listed(told["plan"]["mixture"])
    for shadow in told["shadows"].values():
        shadow["proposal"] = listed(shadow["proposal"])
    return told
