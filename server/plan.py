"""The one validated request: every endpoint's wire type becomes a `GenerationPlan`, through the checks in this file.

What the schema can say alone is checked there; what needs the model, the limits or the caller is checked here, and lengths in
`server/preprocess.py`, once there are token ids. After these nobody checks a request again. `check_completion` is here; an endpoint of
another kind has its check in a file of its own, which ends in `plan_of`, too.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config import ModelConfig
from engine.types import EngineInfo, SamplingParams
from server.errors import InvalidRequest, ModelNotFound, shown
from server.limits import Limits
from server.schemas.common import SamplingFields, WireModel
from server.schemas.completions import CompletionRequest, IdPrompts, TextPrompts
from server.structured_output import OutputGrammar, output_grammar

DEFAULT_MAX_TOKENS = 16

RenderedPrompt = tuple[str | int, ...]  # runs of text, each encoded as one, and the ids of special tokens between them


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What this server takes, and from whom: all that a request is checked against."""

    limits: Limits
    info: EngineInfo
    model: ModelConfig
    model_name: str
    key_tenant: str = ""  # whose API key it came with; empty where there are no keys

    @property
    def max_logprobs(self) -> int:
        return min(self.limits.max_logprobs, self.info.max_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """A request whose fields are all in range; its prompts may still be too long, and its grammar too large."""

    prompts: TextPrompts | IdPrompts | tuple[RenderedPrompt, ...]
    prompt_param: str = "prompt"  # the field that they are from
    sampling: SamplingParams  # without the seed, which is per prompt, and without what has to be tokenised first
    seed: int | None
    max_tokens: int | None
    max_tokens_param: str = "max_tokens"  # the field that it is from
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS  # where max_tokens is None; None: what room the context leaves
    num_choices: int  # answered per prompt
    num_candidates: int  # run per prompt; more than num_choices with best_of
    logprobs: int | None  # as the client asked, for the answer
    prompt_logprobs: int | None = None  # beside the choices, for the answer
    echo: bool = False
    stop: tuple[str, ...]
    include_stop: bool
    bad_words: tuple[str, ...] = ()
    grammar: OutputGrammar | None = None
    truncate_prompt_tokens: int | None = None  # keep this many at the end; -1: as many as fit
    tokens_as_ids: bool = False
    returns_token_ids: bool = False
    parse_special_tokens: bool = False
    add_bos: bool = False
    stream: bool
    include_usage: bool
    timeout_s: float | None
    tenant: str
    priority: int
    cache_salt: str

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine will run for it."""
        return len(self.prompts) * self.num_candidates

    def min_worst_case_tokens(self, *, max_model_len: int) -> int:
        """What `worst_case_tokens` will be at least: known before tokenising, when of a text only its one first token is certain.

        A prompt that is too long counts as a whole context: it is refused in its own words later.
        """
        are_ids = isinstance(self.prompts[0], tuple) and self.truncate_prompt_tokens is None and isinstance(self.prompts[0][0], int)
        lengths = (len(prompt) if are_ids else 1 for prompt in self.prompts)
        return self.num_candidates * sum(min(length + (self.max_tokens or 0), max_model_len) for length in lengths)


def check_completion(body: CompletionRequest, terms: Terms) -> GenerationPlan:
    """The plan of a `POST /v1/completions`. Raises `InvalidRequest` with the field, or `ModelNotFound`."""
    if body.suffix:
        raise InvalidRequest("suffix is not supported: this model has no infill; leave it out", param="suffix")
    for name in ("logprobs", "prompt_logprobs"):
        check_logprobs(getattr(body, name), param=name, terms=terms)
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed; use echo with logprobs", param="prompt_logprobs")
    num_candidates = _num_candidates(body)
    if len(body.prompt) * num_candidates > terms.limits.max_sequences:
        raise InvalidRequest(
            f"{len(body.prompt):,} prompts with {num_candidates} choices each exceed the limit of {terms.limits.max_sequences:,} sequences",
            param="best_of" if num_candidates > body.n else "n",
        )
    plan = plan_of(
        body,
        terms,
        prompts=body.prompt,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        grammar=output_grammar(body, limits=terms.limits),
    )
    ranks_candidates = num_candidates > body.n
    return replace(
        plan,
        sampling=replace(
            plan.sampling,
            logprobs=0 if body.logprobs is None and ranks_candidates else body.logprobs,
            prompt_logprobs=_most(body.logprobs if body.echo else None, body.prompt_logprobs),
        ),
        num_candidates=num_candidates,
        prompt_logprobs=body.prompt_logprobs,
        echo=body.echo,
    )


def plan_of(
    body: SamplingFields,
    terms: Terms,
    *,
    prompts: TextPrompts | IdPrompts | tuple[RenderedPrompt, ...],
    prompt_param: str = "prompt",
    max_tokens: int | None,
    logprobs: int | None,
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
    more_stop_token_ids: tuple[int, ...] = (),
    grammar: OutputGrammar | None = None,
) -> GenerationPlan:
    """What all endpoints share: check the common fields and enter them. Raises `InvalidRequest` with the field, or `ModelNotFound`.

    `more_stop_token_ids` end every answer of the endpoint, and do not count against what a client may name.
    """
    check_model(body.model, model_name=terms.model_name)
    check_refused(body)
    _check_options(body, limits=terms.limits)
    if max_tokens is not None and body.min_tokens > max_tokens:
        raise InvalidRequest(f"min_tokens {shown(body.min_tokens)} is above max_tokens {shown(max_tokens)}", param="min_tokens")
    sampling = _sampling(body, terms=terms, more_stop_token_ids=more_stop_token_ids)
    _check_some_token_goes_on(sampling, vocab_size=terms.info.vocab_size, eos_token=terms.model.eos_token)
    return GenerationPlan(
        prompts=prompts,
        prompt_param=prompt_param,
        sampling=replace(sampling, logprobs=logprobs),
        seed=body.seed,
        max_tokens=max_tokens,
        default_max_tokens=default_max_tokens,
        num_choices=body.n,
        num_candidates=body.n,
        logprobs=logprobs,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        bad_words=body.bad_words,
        grammar=grammar,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        tokens_as_ids=body.return_tokens_as_token_ids,
        returns_token_ids=body.return_token_ids,
        parse_special_tokens=body.parse_special_tokens,
        add_bos=body.add_special_tokens,
        stream=body.stream,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        timeout_s=body.timeout,
        tenant=terms.key_tenant or tenant_of(body.user),
        priority=body.priority,
        cache_salt=composed_salt(body.cache_salt or "", key_tenant=terms.key_tenant),
    )


def tenant_of(user: str | None) -> str:
    """Who shares the engine fairly with others, where there are no API keys: whoever sends the same `user`.

    A digest, so that it is short whatever the client sends and so that no name of a person reaches the engine.
    """
    return f"user-{hashlib.sha256(user.encode()).hexdigest()[:32]}" if user else ""


def composed_salt(cache_salt: str, *, key_tenant: str = "") -> str:
    """What the prefix cache keeps apart: tenants of different API keys always, and within one those that ask for it by a `cache_salt`.

    `user` has no part in it: anybody can write any name there, and users of one key may share what they have in common. The length in
    front keeps two parts from being taken for two others.
    """
    return f"{len(key_tenant)}:{key_tenant}:{cache_salt}"


def check_model(model: str | None, *, model_name: str) -> None:
    """Raises `ModelNotFound` for another model than the one served; none means that one."""
    if model is not None and model != model_name:
        raise ModelNotFound(f"the model {shown(model)} does not exist; this server serves {model_name!r}", param="model")


def check_ids(ids: Sequence[int], *, vocab_size: int, param: str) -> None:
    """Raises `InvalidRequest` naming the first id that is none."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        found = next(token for token in ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{param}: token id {shown(found)} is outside the vocabulary of {vocab_size:,}", param=param)


def _most(*counts: int | None) -> int | None:
    return max((count for count in counts if count is not None), default=None)


def check_logprobs(count: int | None, *, param: str, terms: Terms) -> None:
    if count is not None and count > terms.max_logprobs:
        raise InvalidRequest(f"{param} is {shown(count)}, at most {terms.max_logprobs} are given", param=param)


def check_refused(body: WireModel) -> None:
    """Raises `InvalidRequest` for a field that would change what is meant, were it ignored; one that says nothing (false, zero, an empty
    list or text) is as good as left out. An empty object turns something on, with all its defaults.
    """
    for name, value in (body.model_extra or {}).items():
        if name in body.refused_fields and (value or value == {}):
            raise InvalidRequest(f"{name} is not supported: {body.refused_fields[name]}", param=name)


def _check_options(body: SamplingFields, *, limits: Limits) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
    if not body.skip_special_tokens:
        raise InvalidRequest("skip_special_tokens: false is not supported; control tokens have no text here", param="skip_special_tokens")
    if body.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "truncate_prompt_tokens is 0: give how many tokens to keep, or -1 for as many as fit", param="truncate_prompt_tokens"
        )
    if body.timeout is not None and body.timeout > limits.max_timeout_s:
        raise InvalidRequest(f"timeout is {body.timeout:g} seconds, the limit is {limits.max_timeout_s:g}", param="timeout")
    for name, strings, most, most_chars in (
        (type(body).model_fields["stop"].alias or "stop", body.stop, limits.max_stop_strings, limits.max_stop_chars),
        ("bad_words", body.bad_words, limits.max_bad_words, limits.max_stop_chars),
    ):
        if len(strings) > most:
            raise InvalidRequest(f"{len(strings):,} strings in {name}, the limit is {most}", param=name)
        if any(len(string) > most_chars for string in strings):
            raise InvalidRequest(f"a string in {name} has more than {most_chars} characters", param=name)
    if body.cache_salt is not None and len(body.cache_salt) > limits.max_cache_salt_chars:
        raise InvalidRequest(f"cache_salt has more than {limits.max_cache_salt_chars} characters", param="cache_salt")
    if len(body.allowed_token_ids or ()) > limits.max_allowed_token_ids:
        raise InvalidRequest(
            f"{len(body.allowed_token_ids or ()):,} allowed token ids, the limit is {limits.max_allowed_token_ids:,}",
            param="allowed_token_ids",
        )
    if len(body.stop_token_ids) > limits.max_stop_token_ids:
        raise InvalidRequest(
            f"{len(body.stop_token_ids):,} stop token ids, the limit is {limits.max_stop_token_ids}", param="stop_token_ids"
        )


def _check_some_token_goes_on(sampling: SamplingParams, *, vocab_size: int, eos_token: int) -> None:
    """`min_tokens` forbids every end token for a while; something must be left to choose."""
    if not sampling.min_tokens:
        return
    end_tokens = {*sampling.stop_token_ids} if sampling.ignore_eos else {*sampling.stop_token_ids, eos_token}
    if len(end_tokens) >= vocab_size:
        raise InvalidRequest(
            f"min_tokens is {shown(sampling.min_tokens)}, but each of the {vocab_size:,} tokens is an end token: lower it to 0 or "
            "name fewer stop_token_ids",
            param="min_tokens",
        )
    if sampling.allowed_token_ids and end_tokens.issuperset(sampling.allowed_token_ids):
        raise InvalidRequest(
            f"min_tokens is {shown(sampling.min_tokens)}, but each of the allowed_token_ids is an end token", param="allowed_token_ids"
        )


def _num_candidates(body: CompletionRequest) -> int:
    """How many to run per prompt. Raises where `best_of` contradicts the rest; 0 is OpenAI's way to leave it out."""
    if not body.best_of:
        return body.n
    if body.best_of < body.n:
        raise InvalidRequest(f"best_of {body.best_of} is below n {body.n}", param="best_of")
    if body.best_of > 1 and body.stream:
        raise InvalidRequest("best_of cannot be streamed: which choice is best is known at the end", param="best_of")
    return body.best_of


def _sampling(body: SamplingFields, *, terms: Terms, more_stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """What the fields mean to the engine. `top_p: 0` keeps the likeliest token alone, which is `top_k: 1`."""
    vocab_size = terms.info.vocab_size
    check_ids(body.stop_token_ids, vocab_size=vocab_size, param="stop_token_ids")
    check_ids(body.allowed_token_ids or (), vocab_size=vocab_size, param="allowed_token_ids")
    return SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p or 1.0,
        top_k=1 if body.top_p == 0 else min(max(body.top_k, 0), vocab_size),
        min_p=body.min_p,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop_token_ids=(*body.stop_token_ids, *more_stop_token_ids),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, vocab_size=vocab_size, limits=terms.limits),
        allowed_token_ids=tuple(sorted({*(body.allowed_token_ids or ())})),
    )


def _logit_bias(raw: Mapping[str, Any], *, vocab_size: int, limits: Limits) -> dict[int, float]:
    if len(raw) > limits.max_logit_bias:
        raise InvalidRequest(f"logit_bias has {len(raw):,} entries, the limit is {limits.max_logit_bias:,}", param="logit_bias")
    bias: dict[int, float] = {}
    for key, value in raw.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise InvalidRequest(f"logit_bias: {shown(key)} is no token id below {vocab_size:,}", param="logit_bias")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and -100 <= value <= 100):
            raise InvalidRequest(
                f"logit_bias: the bias of token {key} must be a number from -100 to 100, found {shown(value)}", param="logit_bias"
            )
        bias[int(key)] = float(value)
    return bias
