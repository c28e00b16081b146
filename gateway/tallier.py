"""How many tokens has this request? The child that counts: what was loaded stays loaded."""

from __future__ import annotations

import os

import msgspec

from backends.backend import Endpoint
from gateway.child import serve
from gateway.ranks import Encoding, encoding_of
from gateway.request import Chat, Completion, Contents, contents_of_chat, contents_of_completion
from gateway.tally import Answer, Count, Question
from gateway.tokenizer_file import TokenizerFile, TokenizerUnusable

# OpenAI's cookbook, "How to count tokens with tiktoken": three tokens and the role about every message, three before
# the answer. Templates of others cost about as much.
_MESSAGE_TOKENS = 4
_ANSWER_HEAD_TOKENS = 3

_encode = msgspec.msgpack.Encoder().encode
_decode_question = msgspec.msgpack.Decoder(Question).decode
_decode_body = msgspec.json.Decoder(dict[str, object]).decode


class Tallier:
    """The child's side: what was loaded stays loaded."""

    def __init__(self) -> None:
        self._files: dict[str, TokenizerFile | None] = {}
        self._encodings: dict[str, Encoding] = {}

    def answer(self, head: bytes, rest: bytes) -> tuple[bytes, bytes]:
        """Answer a question of `Tally`."""
        question = _decode_question(head)
        return _encode(Answer(self._count(question, rest))), b""

    def _count(self, question: Question, rest: bytes) -> Count | None:
        file = None if question.tokenizer is None else self._file(question.tokenizer)
        name = encoding_of(question.model) if file is None else None
        if file is None and name is None:
            return None
        contents, messages = _contents_of(question.endpoint, rest)
        tokens, sure = 0, contents.plain and not messages
        for piece in contents.texts:
            text = piece if isinstance(piece, str) else piece.decode()
            if file is not None:
                tokens += file.count(text, whole=not messages)
            elif name is not None:
                more, clean = self._encoding(name).count(text)
                tokens, sure = tokens + more, sure and clean
        around = messages * _MESSAGE_TOKENS + _ANSWER_HEAD_TOKENS if messages else 0
        return Count(tokens + around, sure)

    def _file(self, path: str) -> TokenizerFile | None:
        if path not in self._files:
            try:
                self._files[path] = TokenizerFile(path)
            except TokenizerUnusable:
                # Told when the configuration was checked; a file that has gone since is like none.
                self._files[path] = None
        return self._files[path]

    def _encoding(self, name: str) -> Encoding:
        if name not in self._encodings:
            self._encodings[name] = Encoding(name)
        return self._encodings[name]


def _contents_of(endpoint: Endpoint, rest: bytes) -> tuple[Contents, int]:
    """Return the contents of a request, and how many messages it has."""
    fields = _decode_body(b"{" + rest)
    named = {**fields, "model": "-"}
    if endpoint == "chat/completions":
        chat = msgspec.convert(named, Chat)
        return contents_of_chat(chat, fields), len(chat.messages)
    return contents_of_completion(msgspec.convert(named, Completion), fields), 0


if __name__ == "__main__":
    # Guesses do without it; whatever else is to be done goes first.
    os.nice(10)
    serve(Tallier().answer)
