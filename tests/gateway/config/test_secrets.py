"""Does a reference lead to its secret, is a bad one told with its place, and does a value never show itself?"""

from __future__ import annotations

import copy
import logging
import os
import pickle
from pathlib import Path

import pytest

from gateway.config.load import ConfigError, Loaded, load
from gateway.config.model import SecretFromEnv, SecretFromFile
from gateway.config.secrets import LARGEST_SECRET, Secret, SecretError, check, references, resolve, resolve_all

VALUE = "sesame-42"
HERE = Path()


def test_a_secret_shows_itself_nowhere() -> None:
    secret = Secret(VALUE)
    assert secret.reveal() == VALUE
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>30}", f"{secret:>30}", repr({"k": [secret]})]
    assert not any(VALUE in text for text in shown)
    assert not hasattr(secret, "__dict__")


def test_a_secret_does_not_reach_a_log(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("t").warning("key %s %r", Secret(VALUE), Secret(VALUE))
    assert "Secret(…)" in caplog.text
    assert VALUE not in caplog.text


def test_a_secret_is_neither_pickled_nor_copied_nor_hashed() -> None:
    for act in (pickle.dumps, copy.copy, copy.deepcopy, hash):
        with pytest.raises(TypeError) as caught:
            act(Secret(VALUE))
        assert VALUE not in str(caught.value)


def test_secrets_are_equal_by_value() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"


def test_a_secret_comes_from_a_variable() -> None:
    assert resolve(SecretFromEnv(name="K"), folder=HERE, environ={"K": VALUE}).reveal() == VALUE


def test_a_secret_comes_from_a_file_beside_the_configuration_without_white_space(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"  {VALUE}\n\n")
    assert resolve(SecretFromFile(path="key"), folder=tmp_path, environ={}).reveal() == VALUE
    assert resolve(SecretFromFile(path=str(tmp_path / "key")), folder=HERE, environ={}).reveal() == VALUE


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "the environment variable `K` is not set"),
        ({"K": ""}, "the environment variable `K` is empty"),
        ({"K": "sesame\n"}, "the environment variable `K` holds a line break or another control character"),
        ({"K": "ses\x7fame"}, "the environment variable `K` holds a line break or another control character"),
        ({"K": "sesamé"}, "the environment variable `K` holds a character outside ASCII, which no HTTP header carries"),
        ({"K": " sesame"}, "the environment variable `K` begins or ends with a space"),
        (
            {"K": "s" * (LARGEST_SECRET + 1)},
            f"the environment variable `K` holds more than {LARGEST_SECRET} characters",
        ),
    ],
)
def test_a_variable_that_is_no_secret(environ: dict[str, str], message: str) -> None:
    with pytest.raises(SecretError) as caught:
        resolve(SecretFromEnv(name="K"), folder=HERE, environ=environ)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"ses\name", "holds a line break or another control character"),
        (b"ses\xffame", "is not text"),
        ("sesamé".encode(), "holds a character outside ASCII, which no HTTP header carries"),
        (b"s" * (LARGEST_SECRET + 1), f"is larger than {LARGEST_SECRET} bytes"),
    ],
)
def test_a_file_that_is_no_secret(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(SecretError) as caught:
        resolve(SecretFromFile(path="key"), folder=tmp_path, environ={})
    assert str(caught.value) == f"the file `{tmp_path / 'key'}` {message}"


def test_a_folder_or_a_pipe_is_no_secret_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (".", "pipe"):
        with pytest.raises(SecretError, match="is not a regular file"):
            resolve(SecretFromFile(path=path), folder=tmp_path, environ={})
    with pytest.raises(SecretError, match="cannot be read: not a path"):
        resolve(SecretFromFile(path="a\0b"), folder=tmp_path, environ={})


def loaded_with_two(folder: Path) -> Loaded:
    file = folder / "gateway.yaml"
    file.write_text(
        f"""\
backends:
  a: {{kind: vllm, url: "http://h:1", model: a, api_key: {{from: env, name: K}}}}
  b: {{kind: vllm, url: "http://h:2", model: b, api_key: {{from: file, path: key}}}}
tiers: [{{name: t, backends: [a], price: {{input: 1, output: 1}}}}, {{name: u, backends: [b], price: {{input: 1, output: 1}}}}]
keys: [{{name: k, sha256: {"ab" * 32}}}]
"""
    )
    return load(file)


def test_every_bad_reference_is_told_with_its_place(tmp_path: Path) -> None:
    loaded = loaded_with_two(tmp_path)
    file = tmp_path / "gateway.yaml"
    expected = [
        f"{file}:2:57: backends.a.api_key: the environment variable `K` is not set",
        f"{file}:3:57: backends.b.api_key: the file `{tmp_path / 'key'}` cannot be read: No such file or directory",
    ]
    assert [str(problem) for problem in check(loaded, {})] == expected
    with pytest.raises(ConfigError) as caught:
        resolve_all(loaded, {})
    assert [str(problem) for problem in caught.value.problems] == expected


def test_every_reference_is_resolved(tmp_path: Path) -> None:
    loaded = loaded_with_two(tmp_path)
    (tmp_path / "key").write_text("from-file")
    assert check(loaded, {"K": "from-env"}) == ()
    secrets = resolve_all(loaded, {"K": "from-env"})
    assert {place[1]: secrets[ref].reveal() for place, ref in references(loaded)} == {"a": "from-env", "b": "from-file"}
