"""A real web server and a real S3-compatible store on loopback, that misbehave when told to."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

ACCESS_KEY, SECRET_KEY, REGION = "AKIDTEST", "secret/of+the test", "us-east-1"


class FaultyStore:
    """What is stored, and which faults the next requests meet; counts the faults that happened."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.num_requests = 0
        self.happened: Counter[str] = Counter()
        self.after: Callable[[], None] | None = None
        """Called once after the next answer with a body."""

        self._planned: list[str] = []
        self._lock = threading.Lock()
        self.hold = threading.Event()
        """Ends every `slow` fault that is under way."""

    def plan(self, *faults: str) -> None:
        """Have the next requests fail, one fault each.

        500, 503, 429; expired (credentials); slow, short, range, reset; empty: none.
        """
        self._planned += faults

    def all_happened(self) -> bool:
        return not self._planned

    def next_fault(self, method: str) -> str:
        with self._lock:
            self.num_requests += 1
            # Only an answer with a body can be wrong in its body.
            bodily = self._planned[:1] and self._planned[0] in ("short", "range", "reset")
            if not self._planned or (method == "HEAD" and bodily):
                return ""
            fault = self._planned.pop(0)
            self.happened[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FaultyStore
    bucket = ""
    asks_signature = True

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        fault = self.store.next_fault(self.command)
        if fault == "slow":
            self.store.hold.wait(20)
            self.close_connection = True
            return
        if fault == "expired":
            self._send(400, b"<Error><Code>ExpiredToken</Code></Error>")
            return
        if fault.isdigit():
            self._send(int(fault), b"<Error><Code>SlowDown</Code></Error>")
            return
        if self.bucket and not self._may_come_in():
            self._send(403, b"<Error><Code>InvalidAccessKeyId</Code></Error>")
            return
        parts = urlsplit(self.path)
        key = unquote(parts.path).lstrip("/")
        if self.bucket:
            bucket, _, key = key.partition("/")
            if bucket != self.bucket:
                self._send(404, b"<Error><Code>NoSuchBucket</Code></Error>")
                return
            if not key:
                self._list(parse_qs(parts.query))
                return
        if key.startswith("elsewhere/"):
            self._send(302, b"", {"Location": "file:///etc/passwd"})
        elif key not in self.store.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._object(self.store.objects[key], fault)

    def _object(self, data: bytes, fault: str) -> None:
        headers = {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"',
            "Last-Modified": "Mon, 23 Nov 2026 00:00:00 GMT",
        }
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body, status = data, 200
        if found:
            start, last = int(found[1]), min(int(found[2]), len(data) - 1)
            body, status = data[start : last + 1], 206
            if fault == "range":
                start, body = start + 1, data[start + 1 : last + 2]
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        cut = len(body) // 2 if fault in ("short", "reset") else len(body)
        self._send(status, body, headers, cut=cut)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if fault in ("short", "reset"):
            self.close_connection = True
        if self.command == "GET" and self.store.after is not None:
            after, self.store.after = self.store.after, None
            after()

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        begin = query.get("continuation-token", [""])[0]
        keys = sorted(k for k in self.store.objects if k.startswith(prefix) and k > begin)
        page, rest = keys[:2], keys[2:]
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.store.objects[key])}</Size>"
            f"<LastModified>2026-11-23T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if rest else ""
        body = (
            f"<ListBucketResult><Name>b</Name><IsTruncated>{str(bool(rest)).lower()}</IsTruncated>"
            f"<KeyCount>{len(page)}</KeyCount>{rows}{token}</ListBucketResult>"
        )
        self._send(200, body.encode(), {"Content-Type": "application/xml"})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, cut: int = -1
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if cut < 0 else body[:cut])
            self.wfile.flush()

    def _may_come_in(self) -> bool:
        if self.asks_signature:
            return self._is_signed()
        # An emulator is not to be shown anybody's credentials.
        return "Authorization" not in self.headers

    def _is_signed(self) -> bool:
        """Check the signature (AWS Signature Version 4) of a request without a body."""
        found = re.fullmatch(
            r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d+)/([^/]+)/s3/aws4_request, ?"
            r"SignedHeaders=([^,]+), ?Signature=([0-9a-f]+)",
            self.headers.get("Authorization", ""),
        )
        if found is None or found[1] != ACCESS_KEY:
            return False
        parts = urlsplit(self.path)
        names = found[4].split(";")
        query = "&".join(sorted(parts.query.split("&"))) if parts.query else ""
        path = quote(unquote(parts.path), safe="/-_.~")
        headers = "".join(f"{name}:{self.headers[name].strip()}\n" for name in names)
        payload = self.headers["x-amz-content-sha256"]
        canonical = "\n".join([self.command, path, query, headers, found[4], payload])
        scope = f"{found[2]}/{found[3]}/s3/aws4_request"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{self.headers['x-amz-date']}\n{scope}\n{digest}"
        key = f"AWS4{SECRET_KEY}".encode()
        for part in (found[2], found[3], "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.compare_digest(hmac.new(key, to_sign.encode(), "sha256").hexdigest(), found[5])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        # A client that gave up, or a connection that was reset on purpose.
        pass


@contextmanager
def serving_store(
    store: FaultyStore, *, s3_bucket: str = "", gcs_bucket: str = ""
) -> Iterator[str]:
    """Serve a store over HTTP.

    With a bucket as S3 does, for signed requests only, or as an emulator of Google's does over its
    XML interface, for requests without credentials only.
    """
    kind = {"store": store, "bucket": s3_bucket or gcs_bucket, "asks_signature": bool(s3_bucket)}
    handler = type("Handler", (_Handler,), kind)
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            store.hold.set()
            server.shutdown()
            thread.join()
