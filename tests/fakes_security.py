"""Certificates made by openssl, tokens, and calls of any method by its name alone."""

from __future__ import annotations

import importlib
import pkgutil
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

import protos.wire
from protos.tokens import HEADER, bearer

LOOPBACK = "IP:127.0.0.1,DNS:localhost"
_EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def openssl(*arguments: str | Path) -> None:
    """Run openssl; skip the test where there is none."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on this machine, which makes the certificates")
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Authority:
    """Vouches for servers and clients."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.pem, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        subject = ["-subj", f"/CN={name}", "-days", "2"]
        files = ["-keyout", str(self._key), "-out", str(self.pem)]
        openssl("req", "-x509", *_EC, *subject, *files)

    def issue(self, name: str, *, names: str = LOOPBACK, days: int = 2) -> tuple[Path, Path]:
        """Make a certificate; return it and its key. Negative `days`: it is over already."""
        cert, key, request, extensions = self._request(name, names)
        signer = [
            "-CA",
            str(self.pem),
            "-CAkey",
            str(self._key),
            "-CAcreateserial",
            "-days",
            str(days),
        ]
        openssl("x509", "-req", "-in", request, *signer, "-extfile", extensions, "-out", cert)
        return cert, key

    def issue_for_later(self, name: str) -> tuple[Path, Path]:
        """Make a certificate that is not valid yet; return it and its key."""
        cert, key, request, extensions = self._request(name, LOOPBACK)
        issued, config = self._folder / "issued", self._folder / "ca.conf"
        issued.mkdir(exist_ok=True)
        (issued / "index").touch()
        config.write_text(
            f"[ca]\ndefault_ca=one\n[one]\ndatabase={issued}/index\nnew_certs_dir={issued}\n"
            "rand_serial=yes\ndefault_md=sha256\npolicy=any\n[any]\ncommonName=supplied\n"
        )
        times = ["-startdate", "20900101000000Z", "-enddate", "20910101000000Z"]
        signer: list[str | Path] = [
            "-cert",
            self.pem,
            "-keyfile",
            self._key,
            "-extfile",
            extensions,
        ]
        openssl("ca", "-config", config, "-batch", *times, *signer, "-in", request, "-out", cert)
        return cert, key

    def _request(self, name: str, names: str) -> tuple[Path, Path, Path, Path]:
        """Return where certificate and key go, and the files to sign it by."""
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        request, extensions = self._folder / "request", self._folder / "extensions"
        extensions.write_text(f"subjectAltName={names}\n")
        openssl("req", *_EC, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        return cert, key, request, extensions


def make_token() -> str:
    """Return a token that no other test has."""
    return secrets.token_hex(32)


def write_tokens(path: Path, *tokens: str) -> Path:
    """Write a token file, as a whole."""
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(f"{token}\n" for token in tokens))
    fresh.chmod(0o600)
    return fresh.replace(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """An RPC, as the descriptors have it."""

    service: str
    name: str

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"


def every_method() -> Iterator[Method]:
    """Yield every RPC of every service that is served: a new one cannot be forgotten."""
    modules = [
        importlib.import_module(f"protos.wire.{found.name}")
        for found in pkgutil.iter_modules(protos.wire.__path__)
        if found.name.endswith("_pb2")
    ]
    for module in [*modules, health_pb2]:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert isinstance(method, MethodDescriptor)
                yield Method(service=service.full_name, name=method.name)


def shown(*tokens: str) -> list[tuple[str, str]]:
    """Return the metadata that show tokens."""
    return [(HEADER, bearer(token)) for token in tokens]


def call(
    channel: grpc.Channel,
    path: str,
    metadata: Sequence[tuple[str, str]] = (),
    *messages: bytes,
    timeout_s: float = 5.0,
) -> tuple[grpc.StatusCode, str]:
    """Call a method with raw messages, or an empty one; return how it began: OK at an answer."""
    # On the wire every method is a stream of one message or more.
    method: Any = channel.stream_stream(path)
    answers = method(iter(messages or (b"",)), timeout=timeout_s, metadata=tuple(metadata))
    try:
        next(answers)
    except StopIteration:
        return grpc.StatusCode.OK, ""
    except grpc.RpcError:
        return answers.code(), answers.details() or ""
    finally:
        answers.cancel()
    return grpc.StatusCode.OK, ""
