"""What stands before every request of the page: who asks, from where, and by which name.

A browser runs what any page tells it, so a request that comes from this machine proves nothing:

    Host            must be a name of ours, else a foreign name was made to point here (rebinding)
    Origin          of a request that changes something must be this page
    X-Headrace      no form of another page can send it; one that changes something has it
    Sec-Fetch-Site  where browsers say that another page asks, data is refused
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from protos.tokens import HEADER, Gatekeeper, Right, digest

COOKIE = "headrace_session"
MARK = "x-headrace"
"""Header of every request that changes something; its value is not looked at."""

SESSION_S = 12 * 3600.0
MAX_SESSIONS = 256
MAX_BODY_BYTES = 1 << 20

OPEN_PATHS = ("/login", "/assets/login.css", "/assets/login.html", "/assets/favicon.svg")
"""What is told to whoever has not said yet who they are."""

POLICY = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Session:
    token: bytes
    """Its digest: a session ends with its token."""

    ends_s: float


class Sessions:
    """Who has shown a token before; the cookie holds a number that means nothing elsewhere."""

    def __init__(self, keeper: Gatekeeper) -> None:
        self._keeper = keeper
        self._sessions: dict[bytes, _Session] = {}

    def begin(self, token: str) -> str | None:
        """Return the cookie of a new session; None: the token is not known."""
        asked = digest(token)
        if self._keeper.right_of(asked) is None:
            return None
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        cookie = secrets.token_urlsafe(32)
        session = _Session(token=asked, ends_s=time.monotonic() + SESSION_S)
        self._sessions[digest(cookie)] = session
        return cookie

    def end(self, cookie: str) -> None:
        """Forget a session; twice does no harm."""
        self._sessions.pop(digest(cookie), None)

    def right_of(self, cookie: str) -> Right | None:
        """Return what a session allows now; None: there is none."""
        session = self._sessions.get(digest(cookie))
        if session is None:
            return None
        right = self._keeper.right_of(session.token)
        if right is None or time.monotonic() > session.ends_s:
            self.end(cookie)
            return None
        return right


class Door:
    """ASGI middleware: lets a request in, or answers why not. `scope["state"]` gets `right`."""

    def __init__(self, app: ASGIApp, *, keeper: Gatekeeper, hosts: Iterable[str]) -> None:
        """Guard `app`; `hosts` are the names it may be called by, beside plain addresses."""
        self._app = app
        self._keeper = keeper
        self.sessions = Sessions(keeper)
        own = (socket.gethostname(), socket.getfqdn(), "localhost")
        self._hosts = frozenset(name.lower() for name in (*own, *hosts) if name)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        right = self._right_of(headers)
        scope.setdefault("state", {}).update(right=right, sessions=self.sessions)
        refusal = self._misplaced(scope, headers) or self._unknown(scope, right)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _misplaced(self, scope: Scope, headers: Headers) -> Response | None:
        """Refuse what does not come from our own page, by one of our own names."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return refused(421, "this is not the host that was asked for; see dashboard.hosts")
        if scope["method"] in ("GET", "HEAD"):
            site = headers.get("sec-fetch-site", "none")
            if scope["path"].startswith("/api/") and site not in ("none", "same-origin"):
                return refused(403, "another page asks for the run's data")
            return None
        if scope["method"] != "POST":
            return refused(405, "only GET and POST are answered")
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return refused(413, f"a request needs a length of at most {MAX_BODY_BYTES} bytes")
        origin = headers.get("origin")
        # A program without an Origin must bring its token itself; a browser always has one.
        is_program = origin is None and (HEADER in headers or self._keeper.lets_all_in)
        if not is_program and origin != f"{scope['scheme']}://{hosts[0]}":
            return refused(403, "another page asks for a change")
        if scope["path"].startswith("/api/") and MARK not in headers:
            return refused(403, f"a request that changes something needs the header {MARK}")
        return None

    def _unknown(self, scope: Scope, right: Right | None) -> Response | None:
        """Refuse those without a token, and changes to those without the admin token."""
        if scope["path"] in OPEN_PATHS:
            return None
        if right is None:
            if scope["path"] == "/":
                return RedirectResponse("/login", status_code=303)
            return refused(401, "no token is known here: log in, or send it in Authorization")
        is_change = scope["method"] == "POST" and scope["path"].startswith("/api/")
        if is_change and right is not Right.ADMIN:
            return refused(403, "this needs the admin token, and came with the join token")
        return None

    def _right_of(self, headers: Headers) -> Right | None:
        if self._keeper.lets_all_in:
            return Right.ADMIN
        shown = headers.getlist(HEADER)
        if shown:
            scheme, _, token = shown[0].partition(" ")
            is_one = len(shown) == 1 and scheme == "Bearer"
            return self._keeper.right_of(digest(token)) if is_one else None
        cookie = cookie_of(headers)
        return self.sessions.right_of(cookie) if cookie else None

    def _is_ours(self, host: str) -> bool:
        """Say whether nobody else can have had a browser come here by this name."""
        name, _, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        name = (name if port.isdigit() and name else host).lower()
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


def cookie_of(headers: Headers) -> str:
    """Return the session's cookie; empty: there is none."""
    try:
        held = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return held.value if held else ""


def refused(status: int, sentence: str) -> Response:
    """Return an answer that says why nothing was done."""
    return JSONResponse({"error": sentence}, status_code=status)
