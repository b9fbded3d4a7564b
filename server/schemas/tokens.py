"""The wire types of `/tokenize`, `/detokenize` and `/tokenizer_info`: vLLM's, which lm-eval's remote tokenizer reads."""

from typing import ClassVar

import msgspec

from server.schemas.common import TokenIds, WireModel


class TokenFields(WireModel):
    """What both bodies have."""

    not_an_object: ClassVar[str] = "the body must be a JSON object"

    model: str | None = None


class TokenizeRequest(TokenFields):
    """A body of `POST /tokenize`. The flags are those of a completions request, with the same defaults and the same effect."""

    prompt: str
    add_special_tokens: bool = False
    parse_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(TokenFields):
    """A body of `POST /detokenize`."""

    tokens: TokenIds


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of a text. `max_model_len` is null until the engine is ready, `token_strs` unless it was asked for."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True, kw_only=True):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a `tokenizer_config.json` would say.

    `bos_token` is empty because the start token has no text of its own: the empty prompt stands for it, in `/tokenize` as in completions.
    """

    tokenizer_class: str = "SentencePieceProcessor"
    bos_token: str = ""
    eos_token: str
    pad_token: str
    additional_special_tokens: list[str]
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    add_bos_token: bool = False
    add_eos_token: bool = False
    clean_up_tokenization_spaces: bool = False
    vocab_size: int
    model_max_length: int
