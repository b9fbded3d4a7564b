"""Token deltas become text: stop strings, echo, log-probabilities with names and offsets, usage."""

from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_ids, tiny_tokenizer

from engine.output import GenerationChunk, StopMatcher, TextStream
from engine.types import FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprob

TOKENIZER = tiny_tokenizer()
LETTERS = st.text(alphabet="abc", max_size=14)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def a_request(prompt: str | list[int] = "Once upon a time", **sampling: object) -> GenerationRequest:
    ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
    return GenerationRequest(request_id="r", prompt_token_ids=tuple(ids), sampling=SamplingParams(**sampling))  # pyright: ignore[reportArgumentType]


def a_score(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-0.5, top=((token_id, -0.5), (69, -inf)))


def a_delta(
    ids: list[int], *, finish: FinishReason | None = None, scored: bool = False, prompt: tuple[int, ...] = (), cached: int = 0
) -> TokenDelta:
    return TokenDelta(
        request_id="r",
        token_ids=tuple(ids),
        logprobs=tuple(a_score(token_id) for token_id in ids) if scored else (),
        prompt_logprobs=tuple(a_score(token_id) for token_id in prompt),
        finish_reason=finish,
        num_cached_tokens=cached,
    )


def run(
    stream: TextStream, ids: list[int], *, size: int = 1, finish: FinishReason = FinishReason.LENGTH, scored: bool = False
) -> list[GenerationChunk]:
    """Push the ids in deltas of `size` until a chunk ends the answer, as the server does."""
    starts = range(0, max(len(ids), 1), size)
    chunks: list[GenerationChunk] = []
    for start in starts:
        is_last = start + size >= len(ids)
        chunks.append(stream.push(a_delta(ids[start : start + size], finish=finish if is_last else None, scored=scored)))
        if chunks[-1].finish_reason is not None:
            break
    return chunks


def text_of(chunks: list[GenerationChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids_of(chunks: list[GenerationChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def naive_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    return min(((text.find(stop), stop) for stop in stops if stop in text), key=lambda match: (match[0], len(match[1])), default=None)


# --- stop strings -------------------------------------------------------------------------------------------------------------------


@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 14), max_size=6), include_stop=st.booleans())
@settings(max_examples=600, deadline=None)
def test_the_earliest_stop_string_is_found_however_the_text_arrives(
    text: str, stops: list[str], cuts: list[int], include_stop: bool
) -> None:
    matcher = StopMatcher(stops, include_stop=include_stop)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]

    shown = ""
    for start, end in pairwise(bounds):
        shown += matcher.push(text[start:end])
        if matcher.found:
            break
    if not matcher.found:
        shown += matcher.flush()

    match = naive_match(text, stops)
    assert matcher.found == (match[1] if match else None)
    assert shown == (text if match is None else text[: match[0] + (len(match[1]) if include_stop else 0)])


@given(text=LETTERS, stops=STOPS.filter(bool))
@settings(deadline=None)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)

    for length in range(1, len(text) + 1):
        matcher.push(text[length - 1])
        if matcher.found or naive_match(text[:length], stops):
            return
        seen = text[:length]
        longest = max(size for size in range(length + 1) if any(stop.startswith(seen[length - size :]) for stop in stops))
        assert matcher._held == seen[length - longest :]


def test_a_stop_string_across_tokens_ends_the_answer_before_it() -> None:
    ids = TOKENIZER.encode_continuation(" the fox. Stop here. The dog")
    stream = TextStream(a_request(), TOKENIZER, stop=("Stop here",))

    chunks = run(stream, ids)

    assert text_of(chunks) == " the fox. "
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert chunks[-1].stop_reason == "Stop here"
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])


@given(size=st.integers(1, 30))
@settings(deadline=None)
def test_the_size_of_deltas_changes_neither_text_nor_tokens_nor_usage(size: int) -> None:
    ids = TOKENIZER.encode_continuation(" the fox 你好 Stop here. The dog")
    streams = [TextStream(a_request(), TOKENIZER, stop=("here", "op h")) for _ in range(2)]

    by_one, by_size = run(streams[0], ids, scored=True), run(streams[1], ids, size=size, scored=True)

    assert text_of(by_size) == text_of(by_one) == " the fox 你好 St"
    assert ids_of(by_size) == ids_of(by_one) == ids[: len(ids_of(by_one))]
    assert [entry for chunk in by_size for entry in chunk.logprobs] == [entry for chunk in by_one for entry in chunk.logprobs]
    assert streams[0].num_completion_tokens == streams[1].num_completion_tokens == len(ids_of(by_one)) < len(ids)


def test_tokens_behind_a_stop_string_in_the_same_delta_are_dropped_and_not_counted() -> None:
    before, behind = TOKENIZER.encode_continuation(" the end"), TOKENIZER.encode_continuation(" of it")
    stream = TextStream(a_request(), TOKENIZER, stop=(" end",))

    chunk = stream.push(a_delta([*before, *behind], scored=True))

    assert chunk.text == " the"
    assert list(chunk.token_ids) == before
    assert len(chunk.logprobs) == len(before) == stream.num_completion_tokens
    assert chunk.finish_reason is FinishReason.STOP


def test_the_stop_string_stays_in_the_answer_when_asked_for() -> None:
    stream = TextStream(a_request(), TOKENIZER, stop=("Stop",), include_stop=True)

    chunks = run(stream, TOKENIZER.encode_continuation(" the fox. Stop here"))

    assert text_of(chunks) == " the fox. Stop"


def test_text_held_back_for_a_stop_string_is_given_out_at_the_end() -> None:
    stream = TextStream(a_request(), TOKENIZER, stop=("Stop now",))

    chunks = run(stream, TOKENIZER.encode_continuation(" the fox. Stop no"))

    assert text_of(chunks) == " the fox. Stop no"
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].stop_reason is None


def test_a_stop_string_that_waits_for_a_longer_one_counts_at_the_end() -> None:
    stream = TextStream(a_request(), TOKENIZER, stop=("he fox!", "fo"))

    chunks = run(stream, TOKENIZER.encode_continuation(" the fox"))

    assert text_of(chunks) == " the "
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == (FinishReason.STOP, "fo")


@pytest.mark.parametrize("echo", [False, True])
def test_a_stop_string_is_not_found_in_the_prompt_nor_across_its_end(echo: bool) -> None:
    stream = TextStream(a_request("Once upon"), TOKENIZER, stop=("Once", "upon the"), echo=echo)

    chunks = run(stream, TOKENIZER.encode_continuation(" the fox"))

    assert text_of(chunks) == ("Once upon the fox" if echo else " the fox")
    assert chunks[-1].finish_reason is FinishReason.LENGTH


def test_stop_strings_wait_for_the_least_number_of_tokens() -> None:
    first, then = TOKENIZER.encode_continuation("stop"), TOKENIZER.encode_continuation(" and stop")
    stream = TextStream(a_request(min_tokens=len(first)), TOKENIZER, stop=("stop",))

    assert text_of(run(stream, [*first, *then])) == "stop and "


def test_a_stop_string_may_be_a_broken_character() -> None:
    stream = TextStream(a_request(), TOKENIZER, stop=("\ufffd",))

    chunks = run(stream, byte_ids(b"ab\xe4"))

    assert text_of(chunks) == "ab"
    assert chunks[-1].stop_reason == "\ufffd"


# --- how it ends --------------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_stop_token_is_left_out_and_the_token_counted() -> None:
    ids = [*TOKENIZER.encode_continuation(" the end"), 47]
    stream = TextStream(a_request(stop_token_ids=(47,)), TOKENIZER)

    chunks = run(stream, ids, finish=FinishReason.STOP)

    assert text_of(chunks) == " the end"
    assert chunks[-1].stop_reason == 47
    assert ids_of(chunks) == ids
    assert stream.num_completion_tokens == len(ids)


def test_the_text_of_a_stop_token_stays_when_asked_for() -> None:
    stream = TextStream(a_request(stop_token_ids=(47,)), TOKENIZER, include_stop=True)

    assert text_of(run(stream, [*TOKENIZER.encode_continuation(" the end"), 47], finish=FinishReason.STOP)) == " the end<|separator|>"


def test_the_end_of_the_document_has_no_stop_reason() -> None:
    chunks = run(TextStream(a_request(), TOKENIZER), [*TOKENIZER.encode_continuation(" the end"), 2], finish=FinishReason.STOP)

    assert text_of(chunks) == " the end"
    assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == (FinishReason.STOP, None)


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_end_gives_out_an_incomplete_character(reason: FinishReason) -> None:
    stream = TextStream(a_request(), TOKENIZER)

    assert stream.push(a_delta(byte_ids(b"\xe4\xbd"))).text == ""
    last = stream.push(a_delta([], finish=reason))

    assert last.text == "\ufffd\ufffd"
    assert last.finish_reason is reason


def test_cached_tokens_are_kept_to_the_last_chunk() -> None:
    stream = TextStream(a_request(), TOKENIZER)

    stream.push(a_delta([4], cached=2))

    assert stream.push(a_delta([4], finish=FinishReason.LENGTH)).num_cached_tokens == 2
    assert (stream.num_prompt_tokens, stream.num_completion_tokens) == (len(TOKENIZER.encode("Once upon a time")), 2)


# --- echo and log-probabilities -----------------------------------------------------------------------------------------------------


def test_an_echoed_prompt_comes_first_with_its_log_probabilities() -> None:
    request = a_request("Once upon", logprobs=1, prompt_logprobs=1)
    prompt = request.prompt_token_ids
    stream = TextStream(request, TOKENIZER, echo=True)
    the = TOKENIZER.encode_continuation(" the")

    chunks = [
        stream.push(a_delta([], prompt=prompt[1:2])),
        stream.push(a_delta([], prompt=prompt[2:])),
        stream.push(a_delta(the, scored=True, finish=FinishReason.LENGTH)),
    ]

    assert [chunk.text for chunk in chunks] == ["Once upon", "", " the"]
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token_id for entry in entries] == [*prompt, *the]
    assert (entries[0].logprob, entries[0].top, entries[0].text_offset) == (None, (), 0)
    assert entries[1].logprob == -0.5
    assert entries[-1].text_offset == len("Once upon")
    assert stream.num_completion_tokens == len(the)


def test_echo_without_generating_ends_at_the_prompt() -> None:
    request = a_request("Once upon", logprobs=0, prompt_logprobs=0, max_tokens=0)
    stream = TextStream(request, TOKENIZER, echo=True)

    chunk = stream.push(a_delta([], prompt=request.prompt_token_ids[1:], finish=FinishReason.LENGTH))

    assert chunk.text == "Once upon"
    assert len(chunk.logprobs) == len(request.prompt_token_ids)
    assert chunk.token_ids == ()


def test_a_prompt_of_one_token_is_echoed_with_its_one_entry() -> None:
    chunk = TextStream(a_request([1], prompt_logprobs=1), TOKENIZER, echo=True).push(a_delta([], finish=FinishReason.LENGTH))

    assert [(entry.token, entry.logprob) for entry in chunk.logprobs] == [("[BOS]", None)]


def test_without_echo_the_prompts_log_probabilities_are_not_reported() -> None:
    request = a_request("Once upon", prompt_logprobs=1)

    chunk = TextStream(request, TOKENIZER).push(a_delta([], prompt=request.prompt_token_ids[1:], finish=FinishReason.LENGTH))

    assert (chunk.text, chunk.logprobs) == ("", ())


def test_an_echoed_character_that_the_prompt_began_is_whole() -> None:
    first, *rest = byte_ids("你".encode())
    stream = TextStream(a_request([*TOKENIZER.encode("Once"), first]), TOKENIZER, echo=True)

    assert text_of(run(stream, rest)) == "Once你"


@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size + 1), max_size=12), num_prompt=st.integers(1, 6))
@settings(deadline=None)
def test_offsets_never_fall_and_stand_where_the_tokens_text_begins(ids: list[int], num_prompt: int) -> None:
    ids = [1, *ids]
    request = a_request(ids[:num_prompt], prompt_logprobs=1, logprobs=1)
    stream = TextStream(request, TOKENIZER, echo=True)

    chunks = [stream.push(a_delta([], prompt=request.prompt_token_ids[1:])), *run(stream, ids[num_prompt:], scored=True)]

    text = text_of(chunks)
    offsets = [entry.text_offset for chunk in chunks for entry in chunk.logprobs]
    assert text == TOKENIZER.decode(ids)
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    for token_id, start in zip(ids, offsets, strict=True):
        own = TOKENIZER.surface(token_id)
        if isinstance(own, str):
            assert text[start:].startswith((own, own[1:]) if start == 0 else own)


def test_without_echo_offsets_begin_at_zero_and_ignore_held_back_text() -> None:
    ids = TOKENIZER.encode_continuation(" the fox")
    stream = TextStream(a_request(), TOKENIZER, stop=(" the fox!",))

    chunks = run(stream, ids, scored=True)

    offsets = [entry.text_offset for chunk in chunks for entry in chunk.logprobs]
    names = [entry.token for chunk in chunks for entry in chunk.logprobs]
    assert offsets == [len("".join(names[:index])) for index in range(len(names))]
    assert [chunk.text for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)


def test_the_bytes_of_one_character_stand_where_it_stands() -> None:
    chunks = run(TextStream(a_request(), TOKENIZER), byte_ids("a你b".encode()), size=9, scored=True)

    assert [entry.text_offset for entry in chunks[0].logprobs] == [0, 1, 1, 1, 2]
    assert [entry.bytes for entry in chunks[0].logprobs] == [b"a", b"\xe4", b"\xbd", b"\xa0", b"b"]


def test_log_probabilities_keep_minus_infinity_and_have_distinct_names() -> None:
    top = tuple((token_id, -inf) for token_id in range(TOKENIZER.vocab_size))
    entry = TokenLogprob(token_id=32, logprob=-inf, top=top)
    delta = TokenDelta(request_id="r", token_ids=(32,), logprobs=(entry,))

    (scored,) = TextStream(a_request(), TOKENIZER).push(delta).logprobs

    assert scored.logprob == -inf
    assert len(dict(scored.top)) == len(top)
    assert set(dict(scored.top).values()) == {-inf}


def test_tokens_are_named_by_id_when_asked_for() -> None:
    (chunk,) = run(TextStream(a_request(), TOKENIZER, tokens_as_ids=True), [4], scored=True)

    assert chunk.text == "\n"
    assert chunk.logprobs[0].token == "token_id:4"
    assert chunk.logprobs[0].top == (("token_id:4", -0.5), ("token_id:69", -inf))


def test_without_a_tokenizer_text_is_empty_and_tokens_are_named_by_id() -> None:
    request = a_request([5, 6], prompt_logprobs=1)
    stream = TextStream(request, None, echo=True)

    chunk = stream.push(a_delta([7, 10**6], scored=True, prompt=(6,), finish=FinishReason.LENGTH))

    assert chunk.text == ""
    assert [entry.token for entry in chunk.logprobs] == ["token_id:5", "token_id:6", "token_id:7", "token_id:1000000"]
    assert [entry.bytes for entry in chunk.logprobs] == [b""] * 4
