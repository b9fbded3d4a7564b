"""A SentencePiece model of 420 pieces, trained in memory when first asked for: Grok-1's special-token layout, byte fallback, some English.

Ids: 0-3 `[PAD] [BOS] [EOS] [UNK]`, 4-13 runs of newlines, 14-23 digits, 24-31 runs of tabs, 32-46 runs of literal spaces,
47 `<|separator|>`, 48 `<|mask|>`, 49-68 `<|control1|>` to `<|control20|>`, 69-324 bytes, from 325 ordinary pieces.
"""

from functools import cache
from io import BytesIO
from typing import Any

import sentencepiece

from engine.tokenizer import Tokenizer

FIRST_BYTE_ID = 69
MARKERS = ("<|separator|>", "<|mask|>", *(f"<|control{n}|>" for n in range(1, 21)))
_SPECIAL_PIECES = [
    *("\n" * n for n in range(1, 11)),
    *"0123456789",
    *("\t" * n for n in range(1, 9)),
    *(" " * n for n in range(2, 17)),
    *MARKERS,
]
_SENTENCES = [
    "Once upon a time there was a little fox who lived at the edge of the wood.",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Hello world! Say hello to the whole wide world (please) & wait; then go home?",
    "She said: 'What is the answer to life, the universe and everything?'",
    "    four spaces    and  two, to make pieces of spaces.",
    "Stop here. Do not stop there. A long story needs a long end.",
]


def train(**options: Any) -> bytes:
    """The bytes of a small BPE model; `options` replace those that give Grok-1's layout."""
    model = BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "pad_piece": "[PAD]",
        "bos_piece": "[BOS]",
        "eos_piece": "[EOS]",
        "unk_piece": "[UNK]",
        "unk_surface": "[UNK]",
        "user_defined_symbols": _SPECIAL_PIECES,
        "minloglevel": 2,
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(_SENTENCES), model_writer=model, **settings)
    return model.getvalue()


@cache
def tiny_model_proto() -> bytes:
    """The bytes of the model file, to be written where a test needs one."""
    return train()


@cache
def tiny_tokenizer() -> Tokenizer:
    """The tokenizer, shared by all tests of a run."""
    return Tokenizer(tiny_model_proto())


def byte_ids(content: bytes) -> list[int]:
    """The ids of the byte pieces that spell these bytes."""
    return [FIRST_BYTE_ID + byte for byte in content]
