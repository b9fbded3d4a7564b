"""Token deltas of one generation become text: detokenized, cut at stop strings, with named log-probabilities.

The front end makes one `TextStream` per generation and pushes every `TokenDelta` through it; each push gives one `GenerationChunk`. Text
is held back while it could still be taken back: unfinished characters, and endings that could grow into a stop string. When a stop
string is found the chunk says so, and the caller closes the engine's stream; the engine itself knows no text.

Chunks of a generation joined are the same however the tokens were split over deltas.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.tokenizer import Detokenizer, Tokenizer
from engine.types import FinishReason, GenerationRequest, TokenDelta, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLogprob:
    """One token of the answer with its log-probability, under names that no two tokens share.

    `text_offset` counts characters of the returned text (held-back text and stop strings included) before this token's own text; the
    bytes of one character all stand where the character stands. It depends on the tokens only, never on how they were streamed.
    """

    token: str
    token_id: int
    logprob: float | None  # None for the first token of an echoed prompt; may be -inf
    top: tuple[tuple[str, float], ...]  # (name, logprob) in falling order; the token itself need not be among them
    text_offset: int
    bytes: bytes  # what the token contributes in the middle of a text; empty for control tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationChunk:
    """What one delta adds to an answer. Only the last chunk has a finish reason."""

    text: str
    token_ids: tuple[int, ...]  # generated tokens, those of a stop string included
    logprobs: tuple[TextLogprob, ...]  # empty unless asked for; with echo, those of the prompt come first
    finish_reason: FinishReason | None
    stop_reason: str | int | None  # the stop string or stop token id that ended it; None for the end of the document
    num_cached_tokens: int


class TextStream:
    """The text side of one generation. Not thread-safe; constant work per token, and linear in the prompt when it is echoed."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Tokenizer | None,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        echo: bool = False,
        tokens_as_ids: bool = False,
    ) -> None:
        """Without a tokenizer text is always empty and tokens are named `token_id:N`, as they are with `tokens_as_ids`.

        `stop` strings are searched in generated text only, after the first `min_tokens` tokens. `include_stop` leaves the stop string,
        or the text of the stop token, in the answer. `echo` puts the prompt's text, and its log-probabilities where they were asked
        for, in front.
        """
        self._request = request
        self._tokenizer = tokenizer
        self._names_are_ids = tokens_as_ids or tokenizer is None
        self._matcher = StopMatcher(stop, include_stop=include_stop)
        self._include_stop = include_stop
        # An echoed prompt is part of the answer, so it goes through the detokenizer like the rest.
        self._detokenizer = Detokenizer(tokenizer, () if echo else request.prompt_token_ids) if tokenizer else None
        self._num_chars = 0  # characters of the answer's text up to the last token taken
        self._num_cached_tokens = 0
        self._num_completion_tokens = 0
        self._is_echo_due = echo
        self._prompt_offsets: list[int] = []  # filled when the echoed prompt's log-probabilities are reported
        self._num_prompt_scored = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt_token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens so far, up to and including the one that completed a stop string."""
        return self._num_completion_tokens

    def push(self, delta: TokenDelta) -> GenerationChunk:
        """Take the next delta; after a chunk with a finish reason nothing more is pushed."""
        texts: list[str] = []
        logprobs: list[TextLogprob] = []
        if self._is_echo_due:
            texts.append(self._echo_prompt())
            logprobs += self._score_first_prompt_token()
        logprobs += [self._score_prompt_token(entry) for entry in delta.prompt_logprobs if self._prompt_offsets]

        num_taken = 0
        while num_taken < len(delta.token_ids) and self._matcher.found is None:
            text, offset = self._take_token(delta.token_ids[num_taken], is_stop_token=self._is_stop_token(delta, num_taken))
            texts.append(text)
            if delta.logprobs:
                logprobs.append(self._score(delta.logprobs[num_taken], offset))
            num_taken += 1

        if delta.finish_reason is not None and self._matcher.found is None:
            texts += self._finish()
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        finish_reason, stop_reason = self._how_it_ended(delta)
        return GenerationChunk(
            text="".join(texts),
            token_ids=delta.token_ids[:num_taken],
            logprobs=tuple(logprobs),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_cached_tokens=self._num_cached_tokens,
        )

    def _echo_prompt(self) -> str:
        self._is_echo_due = False
        wants_logprobs = self._request.sampling.prompt_logprobs is not None
        texts: list[str] = []
        for token_id in self._request.prompt_token_ids:
            text, offset = self._detokenize(token_id)
            texts.append(text)
            if wants_logprobs:
                self._prompt_offsets.append(offset)
        return "".join(texts)

    def _take_token(self, token_id: int, *, is_stop_token: bool) -> tuple[str, int]:
        """(text of the answer that is now safe to show, offset of the token)."""
        self._num_completion_tokens += 1
        text, offset = self._detokenize(token_id)
        if is_stop_token and not self._include_stop:
            text = text[: len(text) - (self._num_chars - offset)]
        if self._num_completion_tokens <= self._request.sampling.min_tokens:
            return text, offset
        return self._matcher.push(text), offset

    def _detokenize(self, token_id: int) -> tuple[str, int]:
        """(text that this token makes final, where the token's own text begins in the answer)."""
        if self._detokenizer is None:
            return "", 0
        earlier, own = self._detokenizer.push_token(token_id)
        offset = self._num_chars + len(earlier)
        self._num_chars = offset + len(own)
        return earlier + own, offset

    def _finish(self) -> tuple[str, str]:
        rest = self._detokenizer.flush() if self._detokenizer else ""
        return self._matcher.push(rest), self._matcher.flush()

    def _is_stop_token(self, delta: TokenDelta, index: int) -> bool:
        """Whether the engine ended the generation at this token because the request named it as an end."""
        is_last = delta.finish_reason is FinishReason.STOP and index == len(delta.token_ids) - 1
        return is_last and delta.token_ids[index] in self._request.sampling.stop_token_ids

    def _how_it_ended(self, delta: TokenDelta) -> tuple[FinishReason | None, str | int | None]:
        if self._matcher.found is not None:
            return FinishReason.STOP, self._matcher.found
        if delta.token_ids and self._is_stop_token(delta, len(delta.token_ids) - 1):
            return FinishReason.STOP, delta.token_ids[-1]
        return delta.finish_reason, None

    def _score_first_prompt_token(self) -> list[TextLogprob]:
        """The prompt's first token, which nothing predicts; empty unless the prompt's log-probabilities are reported."""
        if not self._prompt_offsets:
            return []
        self._num_prompt_scored = 1
        token_id = self._request.prompt_token_ids[0]
        return [self._entry(token_id, logprob=None, top=(), offset=0)]

    def _score_prompt_token(self, entry: TokenLogprob) -> TextLogprob:
        offset = self._prompt_offsets[self._num_prompt_scored]
        self._num_prompt_scored += 1
        return self._score(entry, offset)

    def _score(self, entry: TokenLogprob, offset: int) -> TextLogprob:
        top = tuple((self._name(token_id), logprob) for token_id, logprob in entry.top)
        return self._entry(entry.token_id, logprob=entry.logprob, top=top, offset=offset)

    def _entry(self, token_id: int, *, logprob: float | None, top: tuple[tuple[str, float], ...], offset: int) -> TextLogprob:
        token_bytes = self._tokenizer.token_bytes(token_id) if self._tokenizer else b""
        return TextLogprob(token=self._name(token_id), token_id=token_id, logprob=logprob, top=top, text_offset=offset, bytes=token_bytes)

    def _name(self, token_id: int) -> str:
        if self._names_are_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_name(token_id)


class StopMatcher:
    """Finds the stop string that begins earliest in a growing text, and shows only text that is certainly before it.

    The outcome depends on the text alone, not on how it arrives. So when one stop string is complete while another that began before it
    could still be completed ("bc" in "abc", with "abcd" also a stop string), the verdict waits for more text or for the end. Of stop
    strings that begin at the same place, the shortest counts. Each character costs amortised constant work per stop string.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self.found: str | None = None  # set once, by the push or flush that decides
        self._include_stop = include_stop
        self._searches = [_StopSearch(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""  # text from the earliest place where a stop string may begin
        self._num_seen = 0  # characters of the whole text so far
        self._candidate: tuple[int, str] | None = None  # (where it begins in the whole text, complete stop string)

    def push(self, text: str) -> str:
        """Take more text; return what can be shown. When `found` is set by this, the text after the stop string is dropped."""
        if not self._held and self._first_chars.isdisjoint(text):
            self._num_seen += len(text)
            return text
        self._held += text
        held_from = self._num_seen - (len(self._held) - len(text))
        for char in text:
            self._num_seen += 1
            earliest = min([self._advance(search, char) for search in self._searches])
            if self._candidate is not None and self._candidate[0] <= earliest:
                return self._cut(held_from)
        earliest = min(search.begins_at(self._num_seen) for search in self._searches)
        shown, self._held = self._held[: earliest - held_from], self._held[earliest - held_from :]
        return shown

    def flush(self) -> str:
        """The text has ended: return what was held back, up to a stop string that was complete."""
        if self._candidate is not None:
            return self._cut(self._num_seen - len(self._held))
        shown, self._held = self._held, ""
        return shown

    def _advance(self, search: "_StopSearch", char: str) -> int:
        """Feed one character to one search; return where its match, complete or partial, begins."""
        search.advance(char)
        begin = search.begins_at(self._num_seen)
        if search.is_complete and (self._candidate is None or begin < self._candidate[0]):
            self._candidate = begin, search.stop
        return begin

    def _cut(self, held_from: int) -> str:
        assert self._candidate is not None
        begin, self.found = self._candidate
        end = begin - held_from + (len(self.found) if self._include_stop else 0)
        shown, self._held, self._candidate = self._held[:end], "", None
        return shown


class _StopSearch:
    """Knuth, Morris and Pratt's search for one string: how much of it the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self._num_matched = 0
        self._shorter = self._next_shorter_matches()

    @property
    def is_complete(self) -> bool:
        return self._num_matched == len(self.stop)

    def begins_at(self, num_seen: int) -> int:
        return num_seen - self._num_matched

    def advance(self, char: str) -> None:
        self._num_matched = self._longest_match_after(self._num_matched, char)

    def _longest_match_after(self, num_matched: int, char: str) -> int:
        while num_matched == len(self.stop) or self.stop[num_matched] != char:
            if num_matched == 0:
                return 0
            num_matched = self._shorter[num_matched]
        return num_matched + 1

    def _next_shorter_matches(self) -> list[int]:
        """For each n: the longest proper prefix of the stop string that its first n characters end with; for "abab" [0, 0, 0, 1, 2]."""
        self._shorter = [0, 0]
        for char in self.stop[1:]:
            self._shorter.append(self._longest_match_after(self._shorter[-1], char))
        return self._shorter
