import msgspec
import pytest
from fake_core import engine_options, options_info

from engine.errors import TransportError
from engine.messages import (
    Abort,
    Begun,
    Configure,
    Deltas,
    Failed,
    Prepare,
    Queued,
    Ready,
    Refused,
    Report,
    Submit,
    decode_from_engine,
    decode_from_server,
    encode,
)
from engine.types import (
    EngineStats,
    FinishReason,
    GenerationRequest,
    Progress,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)

FULL_REQUEST = GenerationRequest(
    request_id="cmpl-1",
    prompt_token_ids=(1, 2, 131071),
    sampling=SamplingParams(seed=-(2**63), logit_bias={5: -100.0, 131071: 1.5}, stop_token_ids=(2, 47), logprobs=20, prompt_logprobs=0),
    choice=3,
    arrival_s=12.5,
    deadline_s=99.0,
    tenant="müller",
    priority=-3,
    cache_salt="pepper",
)
FULL_DELTA = TokenDelta(
    request_id="cmpl-1",
    token_ids=(4, 5),
    logprobs=(TokenLogprob(token_id=4, logprob=-0.5, top=((4, -0.5), (9, -1.25))),),
    prompt_logprobs=(TokenLogprob(token_id=2, logprob=float("-inf")),),
    finish_reason=FinishReason.STOP,
    num_cached_tokens=16,
)


@pytest.mark.parametrize(
    "message",
    [
        Prepare(engine_options(), "cpu"),
        Configure(engine_options()),
        Submit(FULL_REQUEST),
        Submit(FULL_REQUEST, output_token_ids=(0, 131071), num_scored_tokens=2),
        Abort("cmpl-1"),
    ],
)
def test_what_the_server_says_arrives_as_it_was(message):
    assert decode_from_server(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Report(Progress(phase="load", done=1, total=9, unit="bytes", detail="tensor00001_000")),
        Ready(options_info(engine_options())),
        Failed("no weights"),
        Failed("too little memory", plan="{}"),
        Refused("cmpl-1", "too long"),
        Queued(["cmpl-1", "cmpl-2"]),
        Begun(["cmpl-1"]),
        Deltas([FULL_DELTA, TokenDelta(request_id="b")], EngineStats(num_running=2)),
    ],
)
def test_what_the_engine_says_arrives_as_it_was(message):
    assert decode_from_engine(encode(message)) == message


def test_a_message_of_the_other_side_is_refused():
    with pytest.raises(TransportError, match="no message the engine knows"):
        decode_from_server(encode(Failed("wrong way")))


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x93", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode(["submit", 5])])
def test_bytes_that_are_no_message_are_refused(payload):
    with pytest.raises(TransportError):
        decode_from_server(payload)
    with pytest.raises(TransportError):
        decode_from_engine(payload)


def test_a_field_of_a_wrong_type_is_refused_with_its_place():
    raw = msgspec.msgpack.decode(encode(Submit(FULL_REQUEST)))
    raw[1]["prompt_token_ids"] = ["one"]

    with pytest.raises(TransportError, match="prompt_token_ids"):
        decode_from_server(msgspec.msgpack.encode(raw))


def test_a_model_configuration_that_cannot_exist_is_refused():
    raw = msgspec.msgpack.decode(encode(Configure(engine_options())))
    raw[1]["model"]["num_q_heads"] = 3

    with pytest.raises(TransportError, match="num_q_heads 3"):
        decode_from_server(msgspec.msgpack.encode(raw))
