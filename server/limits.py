"""The one table of limits. Every bound on what a client may send or hold is a field here, with a default that is safe on a public port.

Settings fill it, `create_app` hands it out, each limit is checked by whoever its comment names, and tests try each at the cap and past it.
Ranges that come from the model (vocabulary, context length) are the engine's facts and are not here.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one request and of the server as a whole."""

    # connections: server/http_protocol.py
    max_connections: int = 1024  # open; then the one that has waited longest for a request goes, or the new one gets a 503
    max_pipelined: int = 16  # requests sent before the answer to the one before; more close the connection
    write_timeout_s: float = 30.0  # for a client to take 16 KiB of its answer, or the rest; then the connection ends

    # while reading: server/http_protocol.py, server/middleware.py
    max_header_bytes: int = 32 * 1024  # request line and headers; 431
    max_headers: int = 128  # lines; 431
    max_body_bytes: int = 1024 * 1024  # 413
    max_all_body_bytes: int = 256 * 1024 * 1024  # of all requests that are read or answered; 503
    body_timeout_s: float = 30.0  # for the headers, and again for the body; 408
    max_discarded_bytes: int = 16 * 1024 * 1024  # of a refused body, read so that the client sees the refusal

    # fields of one request: server/preprocess.py
    max_prompts: int = 128
    max_messages: int = 4096  # of one conversation
    max_rendered_chars: int = 4 * 1024 * 1024  # of a conversation as the chat template writes it
    max_sequences: int = 256  # prompts times choices of one request
    max_logprobs: int = 20
    max_stop_strings: int = 16
    max_stop_chars: int = 256  # of one stop string
    max_stop_token_ids: int = 128
    max_logit_bias: int = 1024
    max_bad_words: int = 128  # each up to max_stop_chars
    max_allowed_token_ids: int = 4096  # every choice takes them to the engine
    max_cache_salt_chars: int = 256
    max_timeout_s: float = 3600.0
    max_fields: int = 256  # at the top of a body, unknown ones included
    max_answer_logprobs: int = 2_000_000  # of all candidates of one request; about 50 MB of JSON

    # grammars, from response_format, structured_outputs and tools: server/grammar_check.py
    max_grammar_chars: int = 256 * 1024  # of one, in the engine's form
    grammar_timeout_s: float = 2.0  # of a processor, to compile one and take its first steps
    grammar_memory_bytes: int = 64 * 2**20  # the same in memory; ten times what large schemas need
    max_queued_grammars: int = 64  # waiting to be checked; 503

    # the server as a whole: server/admission.py
    max_queued_sequences: int = 256  # open beyond those the engine runs at once; 503
    max_queued_tokens: int = 2**21  # prompt plus max_tokens of all that is open, beyond what the cache holds; 503
    max_tenant_sequences: int | None = None  # open at once of one tenant; None: as many as the server takes; 429
    max_tenant_tokens: int | None = None  # the same, prompt plus max_tokens; 429
    retry_after_s: float = 1.0  # told with every 429 and 503

    # what is kept for clients that come back: server/response_store.py
    max_stored_responses: int = 4096  # of all tenants
    max_stored_bytes: int = 256 * 1024 * 1024  # of them, as JSON

    # what goes out
    keep_alive_s: float = 15.0  # silence on a stream before a comment
    max_message_chars: int = 400  # of an error
    max_ignored_fields: int = 16  # named in the response header
