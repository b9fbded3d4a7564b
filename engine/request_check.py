"""The engine's own look at a request before it is queued. The server has checked it; the core trusts no caller."""

from engine.errors import RequestError
from engine.types import GenerationRequest


def check_request(request: GenerationRequest, output_token_ids: tuple[int, ...], *, vocab_size: int, max_len: int) -> None:
    """Raises `RequestError` for token ids outside the vocabulary, and for more tokens than one sequence can ever hold.

    `output_token_ids` are those that another engine has generated of it already.
    """
    num_prompt, num_output, sampling = len(request.prompt_token_ids), request.sampling.max_tokens, request.sampling
    if not num_prompt:
        raise RequestError("the prompt has no tokens")
    if len(output_token_ids) >= max(1, num_output):
        raise RequestError(f"{len(output_token_ids)} of {num_output} output tokens are there already")
    fields = {
        "prompt": request.prompt_token_ids,
        "output": output_token_ids,
        "stop_token_ids": sampling.stop_token_ids,
        "logit_bias": sampling.logit_bias,
        "allowed_token_ids": sampling.allowed_token_ids,
        "bad_words": [token for run in sampling.bad_words for token in run],
    }
    for name, ids in fields.items():
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise RequestError(f"{name} holds token ids from {min(ids)} to {max(ids)}, the vocabulary has 0 to {vocab_size - 1}")
    if not all(sampling.bad_words):
        raise RequestError("bad_words holds a run of no tokens")
    if num_prompt + num_output > max_len:
        raise RequestError(f"{num_prompt} prompt tokens and {num_output} output tokens exceed the limit of {max_len}")
