"""Streamed text equals whole text, for every split, whatever the ids."""

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_ids, tiny_tokenizer, train

from engine.tokenizer import Detokenizer, Tokenizer

# Single spaces-only pieces, whole multi-byte characters, their halves, control ids, separators, UNK and ids beyond the vocabulary are all
# drawn far more often than by chance.
WORD_MARK_ID = tiny_tokenizer().encode_continuation(" ")[0]
RUNS = st.one_of(
    st.integers(0, tiny_tokenizer().vocab_size + 2).map(lambda token_id: [token_id]),
    st.sampled_from(
        [[0], [1], [2], [3], [4], [6], [33], [47], [WORD_MARK_ID], tiny_tokenizer().encode("  "), tiny_tokenizer().encode("the")]
    ),
    st.text(max_size=3).map(lambda text: byte_ids(text.encode())),
    st.binary(max_size=3).map(byte_ids),
    st.sampled_from([b"\xe4", b"\xe4\xbd", b"\xf0\x9f", b"\xf0\x9f\x98", b"\xed\xa0\x80", b"\xe0\x80", b"\xc0\x80", b"\xa0", b"\x80"]).map(
        byte_ids
    ),
)
IDS = st.lists(RUNS, max_size=12).map(lambda runs: [token_id for run in runs for token_id in run])


def text_of(detokenizer: Detokenizer, deltas: list[list[int]]) -> str:
    return "".join([detokenizer.push(delta) for delta in deltas]) + detokenizer.flush()


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return [ids[start:end] for start, end in pairwise(bounds)]


def incomplete_bytes(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    """The bytes at the end that begin a character which more bytes could complete."""
    run = b""
    for token_id in ids:
        surface = tokenizer.surface(token_id)
        if surface is not None:
            run = run + bytes([surface]) if isinstance(surface, int) else b""
    endings = (b"\x80", b"\xa0", b"\x80\x80", b"\xa0\x80", b"\x90\x80\x80", b"\x80\x80\x80")
    tails = [run[-length:] for length in (3, 2, 1) if length <= len(run)]
    return next((tail for tail in tails if any(is_character(tail + ending) for ending in endings)), b"")


def is_character(content: bytes) -> bool:
    try:
        return len(content.decode()) == 1
    except UnicodeDecodeError:
        return False


@given(ids=IDS, cuts=st.lists(st.integers(0, 50), max_size=6))
@settings(max_examples=300, deadline=None)
def test_streamed_text_equals_whole_text_for_every_split(ids: list[int], cuts: list[int]) -> None:
    tokenizer = tiny_tokenizer()

    streamed = text_of(Detokenizer(tokenizer), split(ids, cuts))

    assert streamed == tokenizer.decode(ids)


@given(prompt=IDS, ids=IDS)
@settings(max_examples=300, deadline=None)
@example(prompt=[1], ids=tiny_tokenizer().encode("the"))
@example(prompt=[WORD_MARK_ID], ids=tiny_tokenizer().encode("the"))
def test_a_continuation_is_what_the_prompts_text_grows_by(prompt: list[int], ids: list[int]) -> None:
    tokenizer = tiny_tokenizer()
    incomplete = incomplete_bytes(tokenizer, prompt)
    assume(not incomplete.startswith(b"\xef"))  # it could become U+FFFD, which would read like a broken byte
    # Up to the prompt's incomplete character nothing can change any more; behind it stands what is new, or the prompt's own broken bytes.
    settled = tokenizer.decode(prompt)[: len(tokenizer.decode(prompt)) - len(incomplete)]
    grown = tokenizer.decode([*prompt, *ids])

    streamed = text_of(Detokenizer(tokenizer, prompt), [[token_id] for token_id in ids])

    assert grown.startswith(settled)
    rest = grown[len(settled) :]
    assert streamed == rest.removeprefix("\ufffd" * len(incomplete))


@given(prompt=IDS, ids=IDS, cuts=st.lists(st.integers(0, 50), max_size=6))
@settings(deadline=None)
def test_the_split_does_not_matter_after_a_prompt_either(prompt: list[int], ids: list[int], cuts: list[int]) -> None:
    tokenizer = tiny_tokenizer()

    assert text_of(Detokenizer(tokenizer, prompt), split(ids, cuts)) == text_of(Detokenizer(tokenizer, prompt), [ids])


def test_a_continuation_keeps_its_leading_space_after_text() -> None:
    tokenizer = tiny_tokenizer()
    the = tokenizer.encode("the")

    assert Detokenizer(tokenizer, tokenizer.encode("Once")).push(the) == " the"


def test_a_continuation_of_the_document_start_has_no_leading_space() -> None:
    tokenizer = tiny_tokenizer()

    assert Detokenizer(tokenizer, [1]).push(tokenizer.encode("the")) == "the"


def test_an_incomplete_character_is_held_back_until_it_is_complete() -> None:
    detokenizer = Detokenizer(tiny_tokenizer(), tiny_tokenizer().encode("Once"))

    texts = [detokenizer.push([token_id]) for token_id in byte_ids("😀!".encode())]

    assert texts == ["", "", "", "😀", "!"]


def test_an_incomplete_character_ends_as_one_replacement_per_byte() -> None:
    detokenizer = Detokenizer(tiny_tokenizer())

    assert detokenizer.push(byte_ids(b"\xf0\x9f\x98")) == ""
    assert detokenizer.flush() == "\ufffd" * 3
    assert detokenizer.flush() == ""


def test_a_character_that_the_prompt_began_belongs_to_the_continuation() -> None:
    tokenizer = tiny_tokenizer()
    first, *rest = byte_ids("你".encode())

    detokenizer = Detokenizer(tokenizer, [*tokenizer.encode("Once"), first])

    assert [detokenizer.push([token_id]) for token_id in rest] == ["", "你"]


def test_broken_bytes_of_the_prompt_are_not_repeated() -> None:
    tokenizer = tiny_tokenizer()
    prompt = [*tokenizer.encode("Once"), *byte_ids(b"\xf0\x9f")]

    assert text_of(Detokenizer(tokenizer, prompt), []) == ""
    assert text_of(Detokenizer(tokenizer, prompt), [tokenizer.encode(" the")]) == "  the"
    assert text_of(Detokenizer(tokenizer, prompt), [byte_ids(b"\x98")]) == "\ufffd"


def test_an_id_beyond_the_vocabulary_does_not_break_a_character() -> None:
    tokenizer = tiny_tokenizer()
    first, second, third = byte_ids("你".encode())

    assert text_of(Detokenizer(tokenizer, [first, tokenizer.vocab_size]), [[second], [tokenizer.vocab_size + 9], [third]]) == "你"


def test_a_token_tells_its_own_text_from_that_of_broken_bytes_before_it() -> None:
    tokenizer = tiny_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    detokenizer.push(byte_ids(b"\xe4\xbd"))

    assert detokenizer.push_token(byte_ids(b"A")[0]) == ("\ufffd\ufffd", "A")


@cache
def other_tokenizers() -> dict[str, Tokenizer]:
    small: dict[str, object] = {"user_defined_symbols": [], "vocab_size": 340}
    return {
        "library defaults": Tokenizer(train(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, **small)),
        "no added space": Tokenizer(train(add_dummy_prefix=False, **small)),
        "no added space but extra ones removed": Tokenizer(train(add_dummy_prefix=False, remove_extra_whitespaces=True, **small)),
        "no byte pieces": Tokenizer(train(byte_fallback=False, unk_surface=" ?? ", **(small | {"vocab_size": 90}))),
    }


@pytest.mark.parametrize("kind", ["library defaults", "no added space", "no added space but extra ones removed", "no byte pieces"])
@given(data=st.data())
@settings(deadline=None)
def test_other_tokenizers_stream_as_they_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = other_tokenizers()[kind]
    spaces = tokenizer.encode_continuation(" ")
    ids = data.draw(st.lists(st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from([1, 3, *spaces])), max_size=12))

    assert text_of(Detokenizer(tokenizer), [[token_id] for token_id in ids]) == tokenizer.decode(ids)
