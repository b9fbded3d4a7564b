"""Encoding, decoding and names; the released tokenizer's public cases where that file is at hand."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import MARKERS, byte_ids, tiny_model_proto, tiny_tokenizer, train

from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer, find_tokenizer

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
TEXT_WITH_MARKERS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*MARKERS, "<|", "|>", "\n", "  ", "[EOS]", "<0x0A>"]))).map(
    "".join
)


@pytest.fixture(scope="module")
def released() -> Tokenizer:
    path = REFERENCE / "tokenizer.model"
    if not path.is_file():
        pytest.skip(f"the released tokenizer is not at {path}")
    return Tokenizer.load(path)


def reference_cases() -> list[dict[str, Any]]:
    path = REFERENCE / "tokenizer_cases.json"
    if not path.is_file():
        pytest.skip(f"the reference cases are not at {path}")
    return json.loads(path.read_text())["cases"]


def test_every_reference_case_encodes_with_special_tokens_parsed(released: Tokenizer) -> None:
    cases = reference_cases()

    assert len(cases) == 30
    for case in cases:
        assert released.encode(case["text"], parse_special_tokens=True) == case["ids"], case["text"]


def test_every_reference_case_decodes(released: Tokenizer) -> None:
    for case in reference_cases():
        assert released.decode(case["ids"]) == case["decoded"]


def test_reference_cases_with_a_separator_become_ordinary_pieces_and_the_others_stay_as_they_are(released: Tokenizer) -> None:
    cases = reference_cases()

    changed = [case for case in cases if released.encode(case["text"]) != case["ids"]]

    assert [case for case in cases if "<|separator|>" in case["text"]] == changed
    assert len(changed) == 2
    for case in changed:
        ids = released.encode(case["text"])
        assert not set(ids) & set(range(47, 69))
        assert released.decode(ids) == case["text"]


def test_the_released_tokenizer_names_its_special_tokens_and_every_token_differently(released: Tokenizer) -> None:
    names = {released.token_name(token_id) for token_id in range(released.vocab_size)}

    assert [released.token_name(token_id) for token_id in (1, 2, 47)] == ["[BOS]", "[EOS]", "<|separator|>"]
    assert len(names) == released.vocab_size == 131072


def test_a_continuation_after_a_guard_line_break_gives_the_same_pieces(released: Tokenizer) -> None:
    guard = released.encode("\n")

    for case in reference_cases():
        if case["text"].startswith(("\n", "\u2581")):
            continue
        ids = released.encode("\n" + case["text"])
        assert released.encode_continuation(case["text"]) == ids[len(guard) :], case["text"]


@pytest.mark.parametrize("marker", MARKERS)
def test_user_text_never_becomes_a_special_marker(marker: str) -> None:
    tokenizer = tiny_tokenizer()
    marker_id = 47 + MARKERS.index(marker)

    plain = tokenizer.encode(f"a {marker} b")

    assert not set(plain) & set(range(47, 69))
    assert tokenizer.decode(plain) == f"a {marker} b"
    assert marker_id in tokenizer.encode(f"a {marker} b", parse_special_tokens=True)


@given(text=TEXT_WITH_MARKERS)
@settings(deadline=None)
def test_text_survives_encoding_and_decoding_without_any_special_id(text: str) -> None:
    tokenizer = tiny_tokenizer()

    ids = tokenizer.encode(text)

    assert not {0, 1, 2, 3, *range(47, 69)} & set(ids)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


@given(text=TEXT_WITH_MARKERS)
@settings(deadline=None)
def test_with_special_tokens_parsed_encoding_is_sentencepieces_own(text: str) -> None:
    plain_sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=tiny_model_proto())

    assert tiny_tokenizer().encode(text, parse_special_tokens=True) == plain_sentencepiece.encode(text)


@given(text=TEXT_WITH_MARKERS)
@settings(deadline=None)
def test_a_continuation_adds_no_space_and_joins_on(text: str) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.encode("Once")

    ids = before + tokenizer.encode_continuation(text)

    assert tokenizer.decode(ids) == "Once" + text.replace("\u2581", " ")
    assert not {0, 1, 2, 3, *range(47, 69)} & set(ids)


def test_halves_of_surrogate_pairs_become_replacement_characters() -> None:
    tokenizer = tiny_tokenizer()

    assert tokenizer.decode(tokenizer.encode("a\ud800b \ud83d\ude00")) == "a\ufffdb \U0001f600"


def test_control_ids_and_ids_beyond_the_vocabulary_decode_to_nothing() -> None:
    tokenizer = tiny_tokenizer()
    hello = tokenizer.encode("Hello")

    assert tokenizer.decode([1, 10**6, *hello, -1, 2, 0, tokenizer.vocab_size]) == "Hello"
    assert tokenizer.decode([]) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(2) == b""


def test_names_are_readable_and_all_different() -> None:
    tokenizer = tiny_tokenizer()
    (word,) = tokenizer.encode("the")

    names = [tokenizer.token_name(token_id) for token_id in range(tokenizer.vocab_size + 2)]

    assert len(set(names)) == len(names)
    assert names[word] == " the"
    assert names[byte_ids(b"\n")[0]] == "<0x0A>"
    assert names[1] == "[BOS]"
    assert names[47] == "<|separator|>"
    assert names[32] == "token_id:32"  # two literal spaces would read like the ordinary piece for two spaces
    assert names[-1] == f"token_id:{tokenizer.vocab_size + 1}"


def test_token_bytes_are_the_exact_bytes() -> None:
    tokenizer = tiny_tokenizer()
    (word,) = tokenizer.encode("the")

    assert tokenizer.token_bytes(word) == b" the"
    assert tokenizer.token_bytes(byte_ids(b"\xe4")[0]) == b"\xe4"
    assert tokenizer.token_bytes(3) == b"[UNK]"


def test_threads_encode_alike() -> None:
    tokenizer = tiny_tokenizer()
    texts = [f"Once upon a time {n} foxes <|separator|> went home. " * 20 for n in range(40)]
    alone = [(tokenizer.encode(text), tokenizer.encode_continuation(text)) for text in texts]

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda text: (tokenizer.encode(text), tokenizer.encode_continuation(text)), texts))

    assert together == alone


def test_a_tokenizer_without_document_marks_encodes_as_any_other() -> None:
    tokenizer = Tokenizer(train(bos_id=-1, eos_id=-1, pad_id=-1, unk_id=0, user_defined_symbols=[], vocab_size=340))

    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"


def test_the_tokenizer_is_found_in_the_model_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")

    assert find_tokenizer(tmp_path, None) == tmp_path / "tokenizer.model"


def test_the_tokenizer_is_found_beside_a_checkpoint_directory(tmp_path: Path) -> None:
    (tmp_path / "ckpt-0").mkdir()
    (tmp_path / "ckpt-0" / "tensor00000_000").write_bytes(b"")
    (tmp_path / "tokenizer.model").write_bytes(b"")

    assert find_tokenizer(tmp_path / "ckpt-0", None).samefile(tmp_path / "tokenizer.model")


def test_an_override_wins(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    other = tmp_path / "other.model"
    other.write_bytes(b"")

    assert find_tokenizer(tmp_path, other) == other


def test_an_unrelated_parent_is_not_searched(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    (tmp_path / "model").mkdir()

    with pytest.raises(TokenizerError, match=r"no tokenizer\.model in"):
        find_tokenizer(tmp_path / "model", None)


def test_a_missing_tokenizer_says_where_the_released_one_is_published(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError) as caught:
        find_tokenizer(tmp_path, None)

    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), "xai-org/grok-1", "GitHub", "tokenizer.model", "--tokenizer PATH", "--skip-tokenizer-init"):
        assert part in message


def test_a_missing_override_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"nowhere\.model is not a file"):
        find_tokenizer(tmp_path, tmp_path / "nowhere.model")


def damaged_models() -> dict[str, bytes]:
    proto = tiny_model_proto()
    return {
        "empty": b"",
        "placeholder": b"version https://git-lfs.github.com/spec/v1\noid sha256:5c69\nsize 2229219\n",
        "zeros": bytes(100),
        "cut in a piece": proto[:1000],
        "cut at the end": proto[:-1],
        "pieces only": proto[: proto.rindex(b"\x18\x06") + 2],
        "every other byte": proto[::2],
        "text": b"Once upon a time",
    }


@pytest.mark.parametrize("damage", damaged_models())
def test_a_damaged_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged_models()[damage])

    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer.load(path)


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path)


def test_special_tokens_are_listed_with_how_they_are_spelled():
    special = tiny_tokenizer().special_tokens

    assert special["[BOS]"] == 1
    assert special["<|separator|>"] == 47
    assert sorted(special.values()) == [0, 1, 2, 3, *range(47, 69)]
