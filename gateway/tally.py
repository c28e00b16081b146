"""How are tokens counted here without anybody waiting? In a process of their own, by tiktoken or a `tokenizer.json`.

Both libraries hand over what they found in one piece, which would hold the event loop for 5 to 20 ms a megabyte even
from a thread; some texts take them seconds, and one kind kills them. A child can be killed, and only it loads them.
"""

from __future__ import annotations

import msgspec

from backends.backend import Endpoint
from gateway.child import Child

_LONGEST_S = 5.0


class Count(msgspec.Struct, frozen=True):
    """Tokens of a prompt. `exact`: the model's server would say the same."""

    tokens: int
    exact: bool


class Question(msgspec.Struct, frozen=True):
    """What the child is asked, beside the request itself."""

    endpoint: Endpoint
    model: str
    tokenizer: str | None


class Answer(msgspec.Struct, frozen=True):
    """What it says."""

    count: Count | None


_encode = msgspec.msgpack.Encoder().encode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Tally:
    """Counts the tokens of requests, one after the other, in a child that `open`, or the first of them, starts."""

    def __init__(self) -> None:
        self._child = Child("gateway.tallier")

    async def count(self, endpoint: Endpoint, model: str, rest: bytes, tokenizer: str | None) -> Count | None:
        """Return the tokens of the request whose JSON is `{` and `rest`, as `Body.rest` holds it.

        By the file `tokenizer` where that is given, else by tiktoken; None where it does not know the model. Raises
        OSError (TimeoutError is one) or IncompleteReadError where the text takes longer than any should, or is the
        child's end.
        """
        told, _ = await self._child.ask(_encode(Question(endpoint, model, tokenizer)), rest, limit_s=_LONGEST_S)
        return _decode_answer(told).count

    async def open(self) -> None:
        """Start the child."""
        await self._child.open()

    async def close(self) -> None:
        """End the child."""
        await self._child.close()
