"""Which tokenizer may a test use? One of a few hundred tokens, made on the spot: byte-level, as today's models have it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_WORDS = ("hello hello world", "hello again world")


def write_tokenizer(folder: Path, texts: Iterable[str] = _WORDS, size: int = 300) -> str:
    """Train a tokenizer on `texts`, write it to `folder`, return its path. Whole prompts begin with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)
