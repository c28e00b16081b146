"""Is this machine fit to run the gateway? Each thing that has gone wrong before is looked at once."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import gateway
from backends.backend import BackendFault
from backends.vllm import HttpPool, VllmBackend
from gateway import __version__
from gateway.config import model as noun
from gateway.config.load import Loaded
from gateway.config.prices_meaning import stated
from gateway.config.secrets import resolve_all
from gateway.config.units import render_usd
from gateway.price_list import LiteLlmPrices, PriceUnknownError

_PACKAGES = ("gateway", "backends", "policies", "routing")
_LIBRARIES = ("starlette", "uvicorn", "aiohttp", "msgspec", "tiktoken", "redis", "opentelemetry-api")
_OPTIONAL = ("xllamacpp", "litellm", "vllm", "locust")
_OLDEST = (3, 11)
_LONGEST_LOOK_S = 2.0


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


def prices(loaded: Loaded) -> list[Finding]:
    """Look up what LiteLLM's price list says of each model that is priced by it."""
    listed = LiteLlmPrices()
    findings = []
    for model in sorted({one.price.litellm for one in stated(loaded.config) if one.price.litellm is not None}):
        what = f"price {model}"
        try:
            price = listed.price_of(model)
        except PriceUnknownError as fault:
            findings.append(Finding(what, ok=False, detail=str(fault)))
            continue
        parts = (("in", price.input_nusd), ("cached", price.cached_input_nusd), ("out", price.output_nusd))
        detail = f"{', '.join(f'{render_usd(nusd)} {word}' for word, nusd in parts)} (litellm {listed.version})"
        if price.unread:
            detail += f"; nothing is billed by its {', '.join(price.unread)}"
        findings.append(Finding(what, ok=True, detail=detail))
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


async def stores(loaded: Loaded) -> list[Finding]:
    """Look whether every address of the store answers, in time, and keeps what it is given."""
    state = loaded.config.state
    if not isinstance(state, noun.RedisState):
        return [Finding("state", ok=None, detail="in memory")]
    secrets = resolve_all(loaded)
    # Sentinels have passwords of their own, if any.
    login = [] if state.password is None else [*([state.user] if state.user else []), secrets[state.password].reveal()]
    say = [] if state.mode == "sentinel" or not login else [("AUTH", *login)]

    async def look(address: str) -> Finding:
        what = f"state {address}"
        host, _, number = address.rpartition(":")
        try:
            async with asyncio.timeout(_LONGEST_LOOK_S):
                said, seconds = await _asked(loaded, host.strip("[]"), int(number), [*say, ("PING",), ("INFO",)])
        except TimeoutError:
            return Finding(what, ok=False, detail=f"does not answer within {_LONGEST_LOOK_S:g} s")
        except (OSError, EOFError, ValueError) as fault:
            return Finding(what, ok=False, detail=f"cannot be asked: {fault}")
        told = dict(line.split(":", 1) for line in said.splitlines() if ":" in line)
        version = f"{told.get('redis_version', 'of unknown version')} answers in {seconds * 1000:.1f} ms"
        if told.get("maxmemory_policy", "noeviction") != "noeviction":
            return Finding(what, ok=False, detail=f"{version}, but forgets when it is full: set noeviction")
        if seconds > state.timeout:
            return Finding(what, ok=False, detail=f"{version}, more than `timeout`")
        return Finding(what, ok=True, detail=version)

    return list(await asyncio.gather(*(look(address) for address in state.addresses)))


async def _asked(loaded: Loaded, host: str, number: int, said: Sequence[Sequence[str]]) -> tuple[str, float]:
    """Say this to a server of the Redis protocol (RESP 2); return its last answer and the time the one before took.

    Written out, because a doctor that used the client would wait and try again as the client does.
    """
    state = loaded.config.state
    tls = state.tls if isinstance(state, noun.RedisState) else None
    context = None
    if tls is not None:
        context = ssl.create_default_context(cafile=None if tls.ca is None else str(loaded.beside(tls.ca)))
    reader, writer = await asyncio.open_connection(
        host, number, ssl=context, server_hostname=None if tls is None else tls.server_name or host
    )
    try:
        answer, seconds = "", []
        for words in said:
            began = time.perf_counter()
            parts = "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
            writer.write(f"*{len(words)}\r\n{parts}".encode())
            line = (await reader.readuntil(b"\r\n")).decode().strip()
            if line.startswith("-") or line[:1] not in {"+", "$"}:
                raise ValueError(line[1:] if line.startswith("-") else "this is no Redis")
            answer = line[1:]
            if line.startswith("$"):
                answer = (await reader.readexactly(int(line[1:]) + 2)).decode()
            seconds.append(time.perf_counter() - began)
        return answer, seconds[-2]
    finally:
        writer.close()


def run(loaded: Loaded | None) -> int:
    """Print every finding; 1 if any is bad."""
    findings = [Finding("tierway", ok=True, detail=__version__), *packages(), *versions()]
    if loaded is not None:
        findings.append(port(loaded.config.server.host, loaded.config.server.port))
        admin = loaded.config.server.admin
        if admin is not None:
            findings.append(port(admin.host, admin.port))
        findings += prices(loaded)
        findings += asyncio.run(backends(loaded))
        findings += asyncio.run(stores(loaded))
    for finding in findings:
        mark = {True: "ok  ", False: "BAD ", None: "    "}[finding.ok]
        print(f"{mark}{finding.what:<24}{finding.detail}")
    return int(any(finding.ok is False for finding in findings))
