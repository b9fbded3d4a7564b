"""The wire types of `/tokenize`, `/detokenize` and `/tokenizer_info`: vLLM's, which lm-eval's remote tokenizer reads."""

from collections.abc import Mapping
from typing import ClassVar

import msgspec

from server.schemas.chat import ChatRequest, ConversationFields, Message, Several
from server.schemas.common import TokenIds, WireModel


class TokenFields(WireModel):
    """What both bodies have."""

    not_an_object: ClassVar[str] = "the body must be a JSON object"

    model: str | None = None


class TokenizeRequest(ConversationFields, TokenFields):
    """A body of `POST /tokenize`: a text or a conversation. All fields mean what they mean in a request that generates."""

    refused_fields: ClassVar[Mapping[str, str]] = {
        name: ChatRequest.refused_fields[name] for name in ("functions", "function_call", "documents", "chat_template")
    }

    prompt: str | None = None
    messages: Several[Message] = ()
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
    chat_template: str
