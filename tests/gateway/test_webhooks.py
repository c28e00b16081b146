"""Does what is sent arrive, signed as the specification says, however the receiver behaves?"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable
from itertools import accumulate
from random import Random

import pytest

from gateway.webhooks import AFTER_S, Ending, Message, Webhook, signature, signing_key
from tests.gateway.receiver import Answer, Receiver, receiving

SECRET = "whsec_" + b64encode(b"thirty-two bytes that sign alerts").decode()
SOON = (0.01, 0.01, 0.01)


class Sender:
    """A webhook at a receiver, and how its messages ended."""

    def __init__(self, webhook: Webhook, receiver: Receiver) -> None:
        self.webhook, self.receiver = webhook, receiver
        self.ended: list[tuple[str, Ending]] = []
        self._news = asyncio.Event()

    def end(self, id_: str, ending: Ending) -> None:
        self.ended.append((id_, ending))
        self._news.set()

    async def until_ended(self, number: int) -> None:
        async with asyncio.timeout(20):
            while len(self.ended) < number:
                self._news.clear()
                await self._news.wait()


def sending(
    *answers: Answer,
    act: Callable[[Sender], Awaitable[None]],
    after_s: tuple[float, ...] = SOON,
    timeout_s: float = 10.0,
    most: int = 1000,
    path: str = "/hook",
) -> None:
    async def run() -> None:
        async with receiving(*answers) as receiver:
            webhook = Webhook(
                receiver.url + path,
                signing_key(SECRET),
                after_s=after_s,
                timeout_s=timeout_s,
                most=most,
                random=Random(1),
            )
            sender = Sender(webhook, receiver)
            webhook.open(sender.end)
            try:
                await act(sender)
            finally:
                await webhook.close()

    asyncio.run(run())


def test_the_signature_is_that_of_the_specification() -> None:
    # The example of the reference libraries.
    key = signing_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_secret_without_the_prefix_signs_with_its_own_bytes() -> None:
    assert signing_key("correct horse") == b"correct horse"


@pytest.mark.parametrize("secret", ["whsec_not base64!", "whsec_abc"])
def test_a_secret_that_cannot_be_meant_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_") as raised:
        signing_key(secret)
    assert secret.removeprefix("whsec_") not in str(raised.value)


def test_what_is_sent_can_be_verified_by_its_headers_alone() -> None:
    async def act(sender: Sender) -> None:
        assert sender.webhook.send(Message("budget-1", b'{"type":"budget.threshold"}'))
        await sender.until_ended(1)
        ((headers, body),) = sender.receiver.came
        assert sender.receiver.paths == ["/hook"]
        assert body == b'{"type":"budget.threshold"}'
        assert headers["content-type"] == "application/json"
        assert headers["webhook-id"] == "budget-1"
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        version, _, value = headers["webhook-signature"].partition(",")
        signed = f"budget-1.{headers['webhook-timestamp']}.".encode() + body
        assert version == "v1"
        assert b64decode(value) == hmac.digest(b"thirty-two bytes that sign alerts", signed, "sha256")
        assert sender.ended == [("budget-1", "taken")]
        assert sender.webhook.waiting == 0

    sending(act=act)


@pytest.mark.parametrize("answer", [500, 503, 404, 400, 429, 301, 302, 307, "drop"])
def test_what_is_not_taken_is_sent_again_under_its_id(answer: Answer) -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}"))
        await sender.until_ended(1)
        assert sender.ended == [("a", "taken")]
        assert sender.receiver.ids() == ["a", "a", "a"]
        # A redirect is not followed.
        assert sender.receiver.paths == ["/hook"] * 3
        assert sender.webhook.attempts == {"taken": 1, "failed": 2, "given_up": 0}

    sending(answer, answer, act=act)


def test_a_receiver_that_hangs_is_left_and_asked_again() -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}"))
        await sender.until_ended(1)
        assert sender.receiver.ids() == ["a", "a"]
        assert sender.ended == [("a", "taken")]

    sending("hang", act=act, timeout_s=0.2)


def test_what_is_answered_is_not_read() -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}"))
        await sender.until_ended(1)
        assert sender.ended == [("a", "taken")]
        sender.webhook.send(Message("b", b"{}"))
        await sender.until_ended(2)

    sending("endless", act=act)


def test_nobody_there_is_tried_again_too() -> None:
    async def run() -> None:
        async with receiving() as receiver:
            pass
        webhook = Webhook(receiver.url, b"k", after_s=(0.01,))
        sender = Sender(webhook, receiver)
        webhook.open(sender.end)
        webhook.send(Message("a", b"{}"))
        await sender.until_ended(1)
        assert sender.ended == [("a", "given_up")]
        await webhook.close()

    asyncio.run(run())


def test_after_the_last_attempt_it_is_given_up_and_the_next_has_its_turn() -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}"))
        await sender.until_ended(1)
        assert sender.ended == [("a", "given_up")]
        assert sender.receiver.ids() == ["a"] * 4
        sender.webhook.send(Message("b", b"{}"))
        await sender.until_ended(2)
        assert sender.ended[-1] == ("b", "taken")

    sending(500, 500, 500, 500, act=act)


def test_of_one_that_is_old_already_fewer_attempts_are_made() -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}", age_s=0.025))
        await sender.until_ended(1)
        assert sender.receiver.ids() == ["a"] * 2

    sending(500, 500, 500, 500, act=act)


def test_one_that_fails_does_not_hold_up_the_next() -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}"))
        sender.webhook.send(Message("b", b"{}"))
        await sender.until_ended(1)
        assert sender.ended == [("b", "taken")]
        assert sender.webhook.waiting == 1

    sending(500, act=act, after_s=(3600.0,))


def test_one_that_is_under_way_is_not_sent_twice_and_there_is_room_for_so_many() -> None:
    async def act(sender: Sender) -> None:
        assert [sender.webhook.send(Message(id_, b"{}")) for id_ in "aabac"] == [True, True, True, True, False]
        await sender.until_ended(2)
        assert sender.receiver.ids() == ["a", "b"]
        assert sender.webhook.send(Message("c", b"{}"))
        await sender.until_ended(3)

    sending(act=act, most=2)


def test_who_answers_410_gets_no_more() -> None:
    async def act(sender: Sender) -> None:
        sender.webhook.send(Message("a", b"{}"))
        sender.webhook.send(Message("b", b"{}"))
        await sender.receiver.until_came(1)
        async with asyncio.timeout(20):
            while sender.webhook.waiting:
                await asyncio.sleep(0)
        assert not sender.webhook.send(Message("c", b"{}"))
        assert sender.receiver.ids() == ["a"]
        # Nobody said that they were taken: after a restart they are sent.
        assert sender.ended == []

    sending(410, act=act)


def test_the_log_shows_neither_the_address_nor_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    async def act(sender: Sender) -> None:
        with caplog.at_level(logging.DEBUG, "tierway"):
            sender.webhook.send(Message("a", b"{}"))
            await sender.until_ended(1)
            sender.receiver.answers.append(410)
            sender.webhook.send(Message("b", b"{}"))
            await sender.receiver.until_came(5)
            async with asyncio.timeout(20):
                while sender.webhook.waiting:
                    await asyncio.sleep(0)
        assert "answered 410" in caplog.text
        shown = caplog.text + repr(sender.webhook)
        assert "127.0.0.1" in shown
        assert "T0K3N" not in shown
        assert SECRET not in shown

    sending(500, 307, "drop", 500, act=act, path="/services/T0K3N")


def test_nobody_is_tried_for_longer_than_a_day_and_nobody_gives_up_much_earlier() -> None:
    waits = list(accumulate(AFTER_S))
    assert 20 * 3600 < waits[-1] <= 24 * 3600 + 3600
    assert list(AFTER_S) == sorted(AFTER_S)
