"""Text to token ids and back, as the SentencePiece model beside the weights defines it.

`Tokenizer` encodes prompts and names tokens; `Detokenizer` turns a growing continuation into text that never has to be taken back.
The front end owns one `Tokenizer` for its whole life and may use it from worker threads (encoding releases the GIL); each generation
has a `Detokenizer` of its own. Nothing here knows of requests, stop strings or HTTP.

SentencePiece has three edges that this module hides:
  - it parses `<|separator|>` and the like out of plain text. User text is therefore encoded by a second copy of the model in which
    these pieces are control pieces, which no text ever becomes;
  - it puts a space before the text. `encode_continuation` uses a copy that does not;
  - its decoder drops the first space of a sequence and joins byte pieces to characters, so tokens cannot be decoded one by one.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import sentencepiece

from engine.config import model_directories
from engine.errors import TokenizerError

FILE_NAME = "tokenizer.model"

_WORD_MARK = "\u2581"  # how pieces write a space
_REPLACEMENT = "\ufffd"  # what SentencePiece makes of each byte that is no UTF-8

# Parts of SentencePiece's model proto (sentencepiece_model.proto) that are read or changed here.
_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_TYPE = 1, 3
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4
_NO_DUMMY_PREFIX = bytes(
    [_MODEL_NORMALIZER << 3 | 2, 2, _ADD_DUMMY_PREFIX << 3, 0]
)  # appended, it overrides: parsers merge repeated messages


def find_tokenizer(model_dir: Path, override: Path | None) -> Path:
    """The tokenizer file to use: `override` where given, else `tokenizer.model` in the model directory.

    Where the model directory holds the tensor files itself, the file may also lie above it. Raises `TokenizerError`.
    """
    if override is not None:
        if not override.is_file():
            raise TokenizerError(f"--tokenizer {override} is not a file; name a SentencePiece model, or use --skip-tokenizer-init")
        return override
    directories = model_directories(model_dir)
    for directory in directories:
        if (directory / FILE_NAME).is_file():
            return directory / FILE_NAME
    raise TokenizerError(
        f"no {FILE_NAME} in {' or '.join(map(str, directories))}; the released one is published in the xai-org/grok-1 repository on GitHub "
        f"as {FILE_NAME}: put it there, name a file with --tokenizer PATH, or serve token ids only with --skip-tokenizer-init"
    )


class Tokenizer:
    """A SentencePiece model: encoding, decoding, and one distinct name per token. Immutable, safe to share between threads."""

    def __init__(self, model_proto: bytes) -> None:
        """Build from the bytes of a model file; raises `ValueError` or `RuntimeError` when they are none."""
        self._model = _ModelProto(model_proto)
        self._plain = sentencepiece.SentencePieceProcessor(model_proto=self._model.without_markers())
        self._special = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        self.vocab_size: int = self._special.get_piece_size()
        if self.vocab_size != len(self._model.pieces):
            raise ValueError(f"{len(self._model.pieces)} pieces in the file, {self.vocab_size} after loading")
        self._pieces = self._model.pieces
        self._surfaces = [self._surface_of(token_id) for token_id in range(self.vocab_size)]

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a model file. Raises `TokenizerError` when it cannot be read or is no SentencePiece model."""
        try:
            return cls(path.read_bytes())
        except OSError as error:
            raise TokenizerError(f"cannot read tokenizer {path}: {error.strerror}") from error
        except (ValueError, RuntimeError) as error:
            raise TokenizerError(
                f"{path} is not a SentencePiece model ({error}); it may be cut short or a placeholder for the file"
            ) from error

    def encode(self, text: str, *, parse_special_tokens: bool = False) -> list[int]:
        """Token ids of a text that begins a document, without BOS or EOS; like SentencePiece, as if a space stood before it.

        Special markers such as `<|separator|>` are ordinary text unless `parse_special_tokens`. Control tokens never come from text.
        """
        return (self._special if parse_special_tokens else self._plain).encode(_without_lone_surrogates(text))

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that continues other text: no space is put before it. Special markers are ordinary text."""
        return self._continuing.encode(_without_lone_surrogates(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole sequence. Its one leading space is dropped, control tokens and ids beyond the vocabulary give nothing."""
        return self._special.decode([token_id for token_id in token_ids if 0 <= token_id < self.vocab_size])

    def surface(self, token_id: int) -> str | int | None:
        """What a token contributes in the middle of a text: its text (empty for control tokens), or the value of its one byte.

        None for an id beyond the vocabulary; a model may have more rows than its tokenizer has pieces.
        """
        return self._surfaces[token_id] if 0 <= token_id < self.vocab_size else None

    def surface_at_start(self, token_id: int) -> tuple[str, bool]:
        """(text, whether text has begun) of a token with a text surface where nothing visible stands before it."""
        text = self._surfaces[token_id]
        assert isinstance(text, str)
        if self._model.drops_leading_space and self._pieces[token_id].startswith(_WORD_MARK):
            return text[1:], len(text) > 1 or not self._model.drops_every_leading_space
        return text, bool(text)

    def token_name(self, token_id: int) -> str:
        """A readable name that no other token has: the piece with real spaces, `<0x0A>` for a byte, `[EOS]` for a control token.

        `token_id:N` names an id beyond the vocabulary, and a piece of literal spaces (they would read like the ordinary pieces of spaces).
        """
        if not 0 <= token_id < self.vocab_size or " " in self._pieces[token_id]:
            return f"token_id:{token_id}"
        return self._pieces[token_id].replace(_WORD_MARK, " ")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token contributes in the middle of a text; none for control tokens and ids beyond the vocabulary."""
        surface = self.surface(token_id)
        if isinstance(surface, int):
            return bytes([surface])
        return (surface or "").encode()

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """How each control token and marker is spelled, with its id: `[BOS]`, `<|separator|>` and the like."""
        markers = {*self._model.markers}
        return {
            piece: token_id
            for token_id, (piece, kind) in enumerate(zip(self._pieces, self._model.types, strict=True))
            if kind in (_CONTROL, _UNKNOWN) or piece in markers
        }

    @cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self._model.without_markers() + _NO_DUMMY_PREFIX)

    def _surface_of(self, token_id: int) -> str | int:
        piece, kind = self._pieces[token_id], self._model.types[token_id]
        if kind == _BYTE:
            return int(piece[3:5], 16)
        if kind == _CONTROL:
            return ""
        if kind == _UNKNOWN:
            return self._special.decode([token_id])
        return piece.replace(_WORD_MARK, " ")


class Detokenizer:
    """Text of the tokens that follow a prompt, piece by piece; what it has given out is final.

    For every way to split the ids, the pushes and the flush together give the text by which the prompt's text grows:
    `decode(prompt + ids)[len(decode(prompt)):]`. So the continuation keeps its leading space, unless nothing visible stands before it.
    A character whose bytes begin in the prompt and end in the continuation is given out whole; if it never completes, only the
    continuation's bytes become U+FFFD. Constant work per token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._held = b""  # the first bytes of a character, a proper prefix of valid UTF-8
        self._num_prompt_bytes = 0  # how many of them belong to the prompt
        self._at_start = True  # nothing visible so far: the next piece loses its leading space
        self._pass_over(prompt_token_ids)

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is now final."""
        return "".join(text for token_id in token_ids for text in self.push_token(token_id))

    def push_token(self, token_id: int) -> tuple[str, str]:
        """Take one token; return (what the byte pieces before it turned out to be, the text that it completes itself)."""
        surface = self._tokenizer.surface(token_id)
        if surface is None:
            return "", ""
        if isinstance(surface, int):
            return self._push_byte(surface)
        broken = self.flush()
        if self._at_start:
            surface, begun = self._tokenizer.surface_at_start(token_id)
            self._at_start = not begun
        return broken, surface

    def flush(self) -> str:
        """Give up waiting for the rest of a character: U+FFFD for each of its bytes that is not the prompt's."""
        if not self._held:
            return ""
        broken = _REPLACEMENT * (len(self._held) - self._num_prompt_bytes)
        self._forget_held()
        return broken

    def _push_byte(self, byte: int) -> tuple[str, str]:
        self._at_start = False
        broken = ""
        candidate = self._held + bytes([byte])
        if self._held and not _can_become_character(candidate):
            broken, candidate = self.flush(), bytes([byte])
        if not _can_become_character(candidate):
            return broken, _REPLACEMENT
        try:
            character = candidate.decode()
        except UnicodeDecodeError:
            self._held = candidate
            return broken, ""
        self._forget_held()
        return broken, character

    def _pass_over(self, prompt_token_ids: Sequence[int]) -> None:
        """Reach the state after the prompt: only its first visible token and its last three bytes can matter."""
        for token_id in prompt_token_ids:
            self.push_token(token_id)
            if not self._at_start:
                break
        self._forget_held()
        known = (token_id for token_id in reversed(prompt_token_ids) if self._tokenizer.surface(token_id) is not None)
        self.push(reversed(list(islice(known, 3))))
        self._num_prompt_bytes = len(self._held)

    def _forget_held(self) -> None:
        self._held, self._num_prompt_bytes = b"", 0


def _can_become_character(prefix: bytes) -> bool:
    """Whether the bytes are one character of UTF-8, or the beginning of one."""
    try:
        prefix.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _without_lone_surrogates(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON can carry and UTF-8 cannot; whole pairs are joined."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class _ModelProto:
    """The few facts about a model file that the library does not tell, read from its protobuf encoding without a protobuf package."""

    def __init__(self, content: bytes) -> None:
        self.pieces: list[str] = []
        self.types: list[int] = []
        self.markers: list[str] = []  # user-defined `<|...|>` pieces
        self.drops_leading_space = True
        self.drops_every_leading_space = False
        self._content = content
        self._marker_spans: list[tuple[int, int]] = []  # of whole fields, tag and length included
        numbers: set[int] = set()
        field_start = 0
        for number, value, field_end in _fields(content):
            numbers.add(number)
            if number == _MODEL_PIECES and isinstance(value, bytes):
                self._read_piece(value, (field_start, field_end))
            elif number == _MODEL_NORMALIZER and isinstance(value, bytes):
                self._read_normalizer(value)
            field_start = field_end
        if not numbers >= {_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER}:
            raise ValueError("pieces or settings are missing")

    def without_markers(self) -> bytes:
        """The model with its user-defined `<|...|>` pieces turned into control pieces, which text never encodes to."""
        parts: list[bytes] = []
        end_of_last = 0
        for start, end in self._marker_spans:
            ((_, piece, _),) = _fields(self._content[start:end])
            assert isinstance(piece, bytes)
            piece += bytes([_PIECE_TYPE << 3, _CONTROL])  # of a field given twice the last value counts
            parts += [self._content[end_of_last:start], bytes([_MODEL_PIECES << 3 | 2]), _varint(len(piece)), piece]
            end_of_last = end
        return b"".join([*parts, self._content[end_of_last:]])

    def _read_piece(self, message: bytes, span: tuple[int, int]) -> None:
        text, kind = "", 1  # the format's default type, an ordinary piece
        for number, value, _ in _fields(message):
            if number == _PIECE_TEXT and isinstance(value, bytes):
                text = value.decode()
            elif number == _PIECE_TYPE and isinstance(value, int):
                kind = value
        self.pieces.append(text)
        self.types.append(kind)
        if kind == _USER_DEFINED and text.startswith("<|") and text.endswith("|>"):
            self.markers.append(text)
            self._marker_spans.append(span)

    def _read_normalizer(self, message: bytes) -> None:
        flags = {_ADD_DUMMY_PREFIX: True, _REMOVE_EXTRA_WHITESPACES: True}  # the format's defaults
        flags |= {number: bool(value) for number, value, _ in _fields(message) if number in flags}
        self.drops_leading_space = any(flags.values())
        self.drops_every_leading_space = flags[_REMOVE_EXTRA_WHITESPACES]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes, int]]:
    """(number, value, offset behind it) of each field of a protobuf message; numbers are varints, everything else is bytes.

    Raises `ValueError` where the message is cut short or malformed.
    """
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, position = _read_varint(message, position)
            yield number, value, position
            continue
        if wire_type == 2:
            length, position = _read_varint(message, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(message):
            raise ValueError(f"cut short at byte {len(message)}")
        yield number, message[position : position + length], position + length
        position += length


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 64:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"number cut short at byte {position}")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
