"""Is this machine fit to run the gateway? Each thing that has gone wrong before is looked at once."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import socket
import sys
from pathlib import Path

import msgspec

import gateway
from backends.backend import BackendFault
from backends.vllm import HttpPool, VllmBackend
from gateway import __version__
from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.secrets import resolve_all

_PACKAGES = ("gateway", "backends", "policies", "routing")
_LIBRARIES = ("starlette", "uvicorn", "aiohttp", "msgspec", "tiktoken", "redis", "opentelemetry-api")
_OPTIONAL = ("xllamacpp", "litellm", "vllm", "locust")
_OLDEST = (3, 11)


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at. `ok` is None for what is only told."""

    what: str
    ok: bool | None
    detail: str


def packages() -> list[Finding]:
    """Look whether the four top-level packages are ours.

    Two strangers on the public index install packages called `routing` and `policies`.
    """
    home = Path(gateway.__file__).parent.parent
    findings = []
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
        if origin is None:
            findings.append(Finding(f"package {name}", ok=False, detail="is not installed"))
        elif origin.parent != home:
            findings.append(
                Finding(
                    f"package {name}", ok=False, detail=f"is a stranger's, from {origin.parent}: uninstall that one"
                )
            )
        else:
            findings.append(Finding(f"package {name}", ok=True, detail="is ours"))
    return findings


def versions() -> list[Finding]:
    """Look at the interpreter and the libraries."""
    shown = ".".join(map(str, sys.version_info[:3]))
    findings = [Finding("Python", ok=sys.version_info[:2] >= _OLDEST, detail=shown)]
    for name in (*_LIBRARIES, *_OPTIONAL):
        try:
            findings.append(Finding(name, ok=True, detail=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            optional = name in _OPTIONAL
            detail = "not installed (optional)" if optional else "not installed"
            findings.append(Finding(name, ok=None if optional else False, detail=detail))
    return findings


def port(host: str, number: int) -> Finding:
    """Look whether the port is free."""
    what = f"port {host}:{number}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            return Finding(what, ok=False, detail=f"cannot be taken: {error.strerror}")
    return Finding(what, ok=True, detail="is free")


async def backends(loaded: Loaded) -> list[Finding]:
    """Look whether every server answers. Local models are not started for it."""
    secrets = resolve_all(loaded)
    pool = HttpPool()

    async def look(name: str, backend: noun.AnyBackend) -> Finding:
        if not isinstance(backend, noun.VllmBackend):
            return Finding(f"backend {name}", ok=None, detail=f"kind {backend.__struct_config__.tag}, not asked")
        key = None if backend.api_key is None else secrets[backend.api_key].reveal()
        try:
            await VllmBackend(pool, url=backend.url, api_key=key).probe()
        except BackendFault as fault:
            return Finding(f"backend {name}", ok=False, detail=f"{backend.url} does not answer: {fault}")
        return Finding(f"backend {name}", ok=True, detail=f"{backend.url} answers")

    try:
        return list(await asyncio.gather(*(look(name, one) for name, one in loaded.config.backends.items())))
    finally:
        await pool.close()


def run(loaded: Loaded | None) -> int:
    """Print every finding; 1 if any is bad."""
    findings = [Finding("tierway", ok=True, detail=__version__), *packages(), *versions()]
    if loaded is not None:
        findings.append(port(loaded.config.server.host, loaded.config.server.port))
        findings += asyncio.run(backends(loaded))
    for finding in findings:
        mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.ok]
        print(f"{mark}{finding.what:<24}{finding.detail}")
    return int(any(finding.ok is False for finding in findings))
