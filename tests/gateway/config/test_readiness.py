"""Is it told before the start what would fail or count wrongly after it?"""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli import main
from gateway.config.load import load
from gateway.config.readiness import check

GOOD = (Path(__file__).parent / "good.yaml").read_text()
LIMIT = "limits: [{name: l, concurrent: 8, requests: {limit: 600, per: minute, burst: 10}, spend: {usd: 5}}]\n"
QUEUE = ("name: large\n", "name: large\n    queue: {concurrent: 8}\n")
ADMIN = ("{port: 0}", "{port: 0, admin: {port: 0, key: {from: env, name: K}}}")
REDIS = "state: {kind: redis, addresses: [r:1]}\n"
SHARES = "state: {kind: memory, per_worker_shares: true}\n"

NOT_SHARED = (
    "counted in memory, which 4 workers do not share; set `state: {kind: redis, …}` to count together, or "
    "`state: {kind: memory, per_worker_shares: true}` to give each of them its share"
)
NOT_KNOWN = "its keys would be kept in the memory of one of 4 workers; set `state: {kind: redis, …}`, or serve with one"


def problems_of(folder: Path, text: str, workers: int) -> list[str]:
    file = folder / "g.yaml"
    file.write_text(text)
    return [str(problem).removeprefix(f"{file}:") for problem in check(load(file), workers=workers)]


WORKER_CASES = {
    "nothing counted": (GOOD, []),
    "limits": (GOOD + LIMIT, [f"20:9: limits: {NOT_SHARED}"]),
    "limits in memory that is asked for": (GOOD + LIMIT + "state: {kind: memory}\n", [f"21:8: state: {NOT_SHARED}"]),
    "a queue": (GOOD.replace(*QUEUE), [f"10:12: tiers[1].queue: {NOT_SHARED}"]),
    "keys of an admin API": (GOOD.replace(*ADMIN), [f"1:26: server.admin: {NOT_KNOWN}"]),
    "keys and shares": (GOOD.replace(*ADMIN) + LIMIT + SHARES, [f"1:26: server.admin: {NOT_KNOWN}"]),
    "shares": (GOOD.replace(*QUEUE) + LIMIT + SHARES, []),
    "redis": (GOOD.replace(*ADMIN).replace(*QUEUE) + LIMIT + REDIS, []),
}


@pytest.mark.parametrize("case", WORKER_CASES)
def test_what_memory_cannot_share_is_told_for_several_workers_only(case: str, tmp_path: Path) -> None:
    text, messages = WORKER_CASES[case]
    assert problems_of(tmp_path, text, 4) == messages
    assert problems_of(tmp_path, text, 1) == []


def test_a_limit_of_less_than_one_a_worker_cannot_be_shared(tmp_path: Path) -> None:
    end = "cannot be shared by 9 workers; set `state: {kind: redis, …}`"
    assert problems_of(tmp_path, GOOD.replace(*QUEUE) + LIMIT + SHARES, 9) == [
        f"10:25: tiers[1].queue.concurrent: 8 {end}",
        f"21:32: limits[0].concurrent: 8 {end}",
    ]
    assert len(problems_of(tmp_path, GOOD + LIMIT + SHARES, 11)) == 2  # the burst too


def test_the_workers_of_the_file_or_else_of_the_command_line_are_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(GOOD.replace("port: 0", "port: 0, workers: 4") + LIMIT)
    assert main(["check", "--config", str(file)]) == 2
    assert f"{file}:20:9: limits: {NOT_SHARED}\n" in capsys.readouterr().err
    assert main(["check", "--config", str(file), "--workers", "1"]) == 0
    assert main(["serve", "--config", str(file)]) == 2
    assert f"{file}:20:9: limits: {NOT_SHARED}\n" in capsys.readouterr().err


ROOT_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBhTCCASugAwIBAgIUMVOzreRE2kzGE0oXlEgt1l0Xp/0wCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMdGllcndheSB0ZXN0MCAXDTI2MTEyMTE1MjgwOVoYDzIxMjYx
MDI4MTUyODA5WjAXMRUwEwYDVQQDDAx0aWVyd2F5IHRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAARgG1eUKK1L+MjKwlkC6Cii/NCGO7INIxDm0v55HSUxJKeC
kcFF1bSkpCjgmQJ4nc6dhqOynf61VF2on0eVybsfo1MwUTAdBgNVHQ4EFgQU9jWR
vZ89OAqexn+HicJhZkgg1fEwHwYDVR0jBBgwFoAU9jWRvZ89OAqexn+HicJhZkgg
1fEwDwYDVR0TAQH/BAUwAwEB/zAKBggqhkjOPQQDAgNIADBFAiEAlB91lfh2erBT
KylR5PTtB/9tXJSDWt6lRPjgtE+Vf48CIAeSnaG/M8J2EKrQHeUqdkUo3l0412oo
uFZVetMt11P4
-----END CERTIFICATE-----
"""


def state_with(ca: str) -> str:
    return f"{GOOD}state: {{kind: redis, addresses: [r:1], tls: {{ca: {ca}}}}}\n"


def test_certificates_are_looked_at_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("not a certificate")
    (tmp_path / "folder").mkdir()
    for ca, message in (
        ("none.pem", "does not exist"),
        ("folder", "is not a regular file"),
        ("no.pem", "holds no certificate in PEM"),
    ):
        assert problems_of(tmp_path, state_with(ca), 1) == [
            f"20:50: state.tls.ca: the file `{tmp_path / ca}` {message}"
        ]


def test_certificates_in_pem_are_taken(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text(ROOT_CERTIFICATE)
    assert problems_of(tmp_path, state_with("ca.pem"), 1) == []


def test_a_tokenizer_is_looked_at(tmp_path: Path) -> None:
    text = GOOD.replace("model: m-two", "model: m-two, tokenizer: t/tokenizer.json")
    file = tmp_path / "t" / "tokenizer.json"
    assert problems_of(tmp_path, text, 1) == [f"4:65: backends.two.tokenizer: the file `{file}` does not exist"]
    file.parent.mkdir()
    file.write_text("{}")
    assert problems_of(tmp_path, text, 1) == []
