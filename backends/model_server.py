"""How does one local model answer HTTP? As a process of its own: `python -m backends.model_server '{"weights": ...}'`.

The process holds llama.cpp's server and nothing else. Rules a reader must not break:

* `xllamacpp` is imported here and nowhere else, and only once this is a child process: a crash in it, or its memory,
  must never be the gateway's.
* It never outlives its parent, however the parent dies. Loading holds the interpreter's lock for seconds, so that no
  thread of ours can watch; there the kernel does it.
* Standard output carries exactly one line, `{"port": N}`, written when the server answers.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

import msgspec

HOST = "127.0.0.1"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ERRORS_ONLY = 1  # llama.cpp's verbosity: 1 errors, 2 warnings, 3 information

# Prompts that left their slot are kept in memory, 8 GiB of them by llama.cpp's default: too many beside other models.
_PROMPT_CACHE_MIB = 256

# A small model that falls into a loop never ends by itself; without a limit of the caller's this is where it stops.
_LONGEST_ANSWER_TOKENS = 1024


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a model server needs to know; crosses to the child as JSON in its one argument.

    `weights` is the absolute path of a GGUF file, `context_tokens` the context window of each of the `parallel`
    requests, `port` 0 for any free one, `parent_pid` the process to die with.
    """

    weights: str
    model_id: str
    context_tokens: int
    parallel: int
    threads: int
    port: int
    parent_pid: int


class Ready(msgspec.Struct, frozen=True):
    """The line that says that the server answers, and where."""

    port: int


def main(argument: str) -> NoReturn:
    """Serve the model that `argument`, a JSON `ServerSettings`, describes, until the parent is gone.

    Leaves with status 1 and one line on standard error if the model cannot be loaded.
    """
    settings = msgspec.json.decode(argument, type=ServerSettings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends this process in its own order
    _die_with(settings.parent_pid)
    # Whatever the library prints goes to standard error; only the ready line goes to the real standard output.
    ready_out = os.dup(1)
    os.dup2(2, 1)

    kept = _serve(settings)  # the server ends when nothing refers to it
    os.write(ready_out, msgspec.json.encode(Ready(kept[1])) + b"\n")
    os.close(ready_out)
    while True:
        signal.pause()


def _serve(settings: ServerSettings) -> tuple[object, int]:
    """Load the model and answer HTTP from threads of the library; return the server, which must be kept, and its port.

    Exits with one line on standard error when that cannot be.
    """
    if not Path(settings.weights).is_file():
        sys.exit(f"there is no file {settings.weights}")
    try:
        # An optional dependency, and one that only this process may hold.
        import xllamacpp  # noqa: PLC0415
    except ImportError as why:
        sys.exit(f"xllamacpp cannot be imported ({why}); the extra `local` installs it: pip install 'tierway[local]'")

    params = xllamacpp.CommonParams()
    params.model.path = settings.weights
    params.model_alias = {settings.model_id}
    params.hostnames = [HOST]
    params.port = settings.port
    params.n_parallel = settings.parallel
    params.n_ctx = settings.context_tokens * settings.parallel  # the library divides it among the slots
    params.n_predict = _LONGEST_ANSWER_TOKENS
    params.cpuparams.n_threads = settings.threads
    params.cpuparams_batch.n_threads = settings.threads
    params.cache_ram_mib = _PROMPT_CACHE_MIB
    params.fit_params = False  # the context window is what the configuration says, not what happens to be free
    params.warmup = True
    params.endpoint_metrics = True
    params.endpoint_slots = False  # it shows other callers' prompts
    params.ui = False
    params.cors_origins = "http://origin.invalid"  # no web page may talk to it from a browser on this machine
    params.cors_origins_explicit = True
    params.cors_credentials = False
    params.offline = True
    params.verbosity = _ERRORS_ONLY
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as why:
        sys.exit(f"llama.cpp cannot serve {settings.weights} on port {settings.port}: {why}")
    port = int(server.listening_address.rpartition(":")[2])
    _ask_health(port)
    return server, port


def _ask_health(port: int) -> None:
    """Return once the server has answered a health check; exit with the reason if it does not."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError as why:
        sys.exit(f"the server does not answer on port {port}: {why}")
    finally:
        connection.close()
    if status != http.client.OK:
        sys.exit(f"the server answers its health check with {status}")


def _die_with(parent_pid: int) -> None:
    """Let this process end when `parent_pid` does, in whatever way.

    The kernel's signal works at any time but exists on Linux only, and it follows the thread that started us; the end
    of standard input works everywhere but is seen only while the interpreter's lock is to be had.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before we asked
        os._exit(1)
    threading.Thread(target=_leave_at_end_of_input, name="parent", daemon=True).start()


def _leave_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
