"""Grammars: which tokens may follow, so that a generated text matches a JSON schema, a regular expression or a context-free grammar.

A grammar is a text in llguidance's own serialized form, as `LLMatcher.grammar_from_json_schema`, `_regex` and `_lark` return it.
`GrammarTokenizer` tells llguidance what each token of a model spells; one serves all grammars. `GrammarMatcher` is one generation's way
through its grammar: mask, token, mask, token. The engine makes one per constrained sequence; the server makes one, in a process that it can
kill, to find out whether a grammar compiles. No method keeps the interpreter's lock while it works, and a matcher may be used by any
thread, though by one at a time.

What a hostile grammar can cost is bounded by `LIMITS`: a matcher that goes past one of them is in error from then on, and allows nothing.
Up to there a single mask may take a tenth of a second, so nobody should wait for one who has other work.
"""

from pathlib import Path

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from engine.errors import GrammarError
from engine.tokenizer import Tokenizer

LIMITS = LLParserLimits(
    max_grammar_size=40_000,  # symbols in all productions; the time to compile may grow with their square, up to seconds
    initial_lexer_fuel=1_000_000,  # of compiling all regular expressions; about 50 a microsecond
    max_lexer_states=50_000,  # of 1 to 2 kB each
    step_lexer_fuel=200_000,  # of one mask; about 14 a microsecond
    step_max_items=10_000,  # of the parser, for one mask
    max_items_in_row=1_000,  # of the parser, at one place of the text; an object takes 4 per optional property
    verbose_errors=False,
)

_MAX_ERROR_CHARS = 400
_SILENT = 0


class GrammarTokenizer:
    """What each token spells, in llguidance's form, over the whole vocabulary of a model. Immutable, shared by all threads.

    Tokens that no text becomes, and ids that the model has and the tokenizer has not, are never allowed by a grammar, unless it names
    them itself. Building takes half a second for a vocabulary of 131,072.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token: int) -> None:
        self.vocab_size = vocab_size
        self.num_mask_words = num_mask_words(vocab_size)
        self.eos_token_id = eos_token
        self.bos_token_id = None
        ids = range(min(vocab_size, tokenizer.vocab_size))
        self.special_token_ids = [token_id for token_id in tokenizer.special_tokens.values() if token_id in ids]
        spelled = [tokenizer.token_bytes(token_id) for token_id in ids]
        # No text holds this byte, and llguidance begins the names of special tokens with it.
        self.special_token_ids += [token_id for token_id in ids if spelled[token_id] == b"\xff"]
        for token_id in self.special_token_ids:
            spelled[token_id] = tokenizer.token_name(token_id).encode()
        self.tokens = spelled + [b""] * (vocab_size - len(ids))
        self._tokenizer = tokenizer
        self._byte_tokens = {token[0]: token_id for token_id, token in enumerate(spelled) if len(token) == 1}
        self.native = LLTokenizer(llguidance.TokenizerWrapper(self), vocab_size, eos_token)

    @classmethod
    def load(cls, path: Path, *, vocab_size: int, eos_token: int) -> "GrammarTokenizer":
        """From a SentencePiece model file. Raises `TokenizerError` when it cannot be read or is none."""
        return cls(Tokenizer.load(path), vocab_size=vocab_size, eos_token=eos_token)

    def __call__(self, text: bytes) -> list[int]:
        """Token ids of text in the middle of a text; llguidance asks for those of text that a grammar forces.

        They spell the text to the byte: llguidance panics at a space that SentencePiece puts before it. What the encoder spells
        otherwise, like the character that stands for a space in the pieces, is spelled in bytes.
        """
        token_ids = self._tokenizer.encode_continuation(text.decode(errors="replace"))
        if max(token_ids, default=0) < self.vocab_size and b"".join(self.tokens[token_id] for token_id in token_ids) == text:
            return token_ids
        return [self._byte_tokens[byte] for byte in text if byte in self._byte_tokens]


class GrammarMatcher:
    """One generation's place in its grammar. It starts before the first generated token."""

    def __init__(self, tokenizer: GrammarTokenizer, grammar: str) -> None:
        """Compiles the grammar; raises `GrammarError` where it is none, or goes past a limit already."""
        self._tokenizer = tokenizer
        self._matcher = LLMatcher(tokenizer.native, grammar, limits=LIMITS, log_level=_SILENT)
        if self.error is not None:
            raise GrammarError(self.error)

    @property
    def error(self) -> str | None:
        """Why no more tokens come: a limit was passed, or a token taken that was not allowed."""
        if not self._matcher.is_error():
            return None
        reason, _, _ = self._matcher.get_error().partition("<backtrace>")
        return " ".join(reason.split())[:_MAX_ERROR_CHARS]

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far is whole: it matches the grammar, though more may follow."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def is_stopped(self) -> bool:
        """Whether the text so far is whole and nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may follow, bit b of word w for token 32 w + b; the end token's is never set.

        `row` has `num_mask_words` words. It is all zero where the matcher is stopped or in error, which it may be only after this.
        """
        assert (row.shape, row.dtype) == ((self._tokenizer.num_mask_words,), np.int32)
        assert row.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        word, bit = divmod(self._tokenizer.eos_token_id, 32)
        if self._matcher.is_error() or self._matcher.is_stopped():
            row[:] = 0
        row.view(np.uint32)[word] &= np.uint32(~(1 << bit) & 0xFFFF_FFFF)

    def advance(self, token: int) -> None:
        """Take the next generated token; one that is not allowed puts the matcher in error."""
        self._matcher.consume_token(token)


def num_mask_words(vocab_size: int) -> int:
    """int32 words of a mask with a bit per token."""
    return -(-vocab_size // 32)
