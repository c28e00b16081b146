"""What is a prompt like, without a word of it? A small vector of numbers that a router can learn from.

Version `words-128-1`: words (runs of letters and digits, in lower case) are hashed into 128 buckets; a bucket holds the
square root of how many fell into it, scaled by 16 and cut to a signed byte. Of a long prompt only the beginning and
the end are looked at, where instruction and question stand. What a vector says of a text is little, but it is of a
person's text: it is personal data.
"""

from __future__ import annotations

import re
from math import isqrt
from zlib import crc32

FEATURES = "words-128-1"
_BUCKETS = 128
_HEAD_BYTES = 256
_TAIL_BYTES = 512
_SCALE = 16
_WORDS = re.compile(rb"[0-9a-z\x80-\xff]+")
# sqrt(n) * 16 in integers, up to where it no longer fits.
_LEVELS = bytes(min(127, isqrt(n * _SCALE * _SCALE)) for n in range(64))


def features_of(prompt: bytes) -> bytes:
    """Return the vector of a request: the JSON of its fields in, one signed byte a bucket out."""
    if len(prompt) > _HEAD_BYTES + _TAIL_BYTES:
        prompt = prompt[:_HEAD_BYTES] + b" " + prompt[-_TAIL_BYTES:]
    counts = bytearray(_BUCKETS)
    for word in _WORDS.findall(prompt.lower()):
        bucket = crc32(word) & 127
        if counts[bucket] < 63:
            counts[bucket] += 1
    return bytes(counts).translate(_LEVELS + bytes([127]) * 192)
