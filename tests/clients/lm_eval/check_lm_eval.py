"""`lm-eval` local-completions, with the tokenizer that it finds at the server and its requests as token ids.

Log-likelihoods must not depend on how many are asked for at once, must be the sum of what the server says of each token, and are greedy
exactly where the server itself would have gone on like that.
"""

import functools
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from served import KEY, MODEL, URL, ask

TASKS = TaskManager(include_path=".", include_defaults=False)
ONE_BY_ONE: dict[str, Any] = {"batch_size": 1, "num_concurrent": 1}
SIXTEEN_A_REQUEST: dict[str, Any] = {"batch_size": 16, "num_concurrent": 1}
EIGHT_AT_ONCE: dict[str, Any] = {"batch_size": 1, "num_concurrent": 8}


def check_loglikelihoods_are_the_same_in_batches_and_side_by_side():
    one_by_one = _scores(**ONE_BY_ONE)

    assert len(one_by_one) > 50
    assert _scores(**SIXTEEN_A_REQUEST) == one_by_one
    assert _scores(**EIGHT_AT_ONCE) == one_by_one


def check_a_prompt_as_text_scores_like_its_token_ids():
    from_text = _scores(**SIXTEEN_A_REQUEST, tokenized_requests=False)

    for (context, continuation), score in _scores(**ONE_BY_ONE).items():
        if context:  # an empty one is the start token, for which the harness has no text
            assert from_text[context, continuation] == score


def check_a_loglikelihood_is_the_sum_of_its_tokens():
    for (context, continuation), (loglikelihood, _) in _scores(**ONE_BY_ONE).items():
        ids, num_context = _split(context, continuation)
        logprobs = _completion(prompt=ids, max_tokens=1, echo=True, logprobs=1)["logprobs"]["token_logprobs"]

        assert sum(logprobs[num_context : len(ids)]) == loglikelihood, (context, continuation)


def check_the_greedy_flag_is_what_greedy_generation_does():
    flags = set()
    for (context, continuation), (_, is_greedy) in _scores(**ONE_BY_ONE).items():
        ids, num_context = _split(context, continuation)
        choice = _completion(prompt=ids[:num_context], max_tokens=len(ids) - num_context, ignore_eos=True, return_token_ids=True)

        assert is_greedy == (choice["token_ids"] == ids[num_context:]), (context, continuation)
        flags.add(is_greedy)
    assert flags == {True, False}


def check_the_default_model_prefers_what_makes_sense():
    assert _evaluate("local_choice", **ONE_BY_ONE)["results"]["local_choice"]["acc,none"] > 0.5


def check_texts_are_generated_until_a_stop_string_the_same_in_batches_and_side_by_side():
    one_by_one = _texts(**ONE_BY_ONE)

    for context, text in one_by_one.items():
        assert text == _completion(prompt=_ids(context), max_tokens=24, stop=[".", "\n\n"])["text"]
        assert "." not in text
    assert _texts(**SIXTEEN_A_REQUEST) == one_by_one
    assert _texts(**EIGHT_AT_ONCE) == one_by_one


def check_a_perplexity_is_that_of_the_whole_text():
    samples = _evaluate("local_perplexity", **EIGHT_AT_ONCE)["samples"]["local_perplexity"]

    for sample in samples:
        ids = _ids("") + _ids(sample["target"])
        logprobs = _completion(prompt=ids, max_tokens=1, echo=True, logprobs=1)["logprobs"]["token_logprobs"]

        assert sample["resps"][0][0] == sum(logprobs[1:-1])


def check_texts_are_generated_by_chat_the_same_side_by_side():
    chat = {"model": MODEL, "base_url": f"{URL}/v1/chat/completions", "max_retries": 1}
    answers = [
        simple_evaluate(
            "local-chat-completions",
            chat | {"num_concurrent": num_concurrent},
            ["local_continuation"],
            apply_chat_template=True,
            task_manager=TASKS,
            bootstrap_iters=0,
        )["samples"]["local_continuation"]
        for num_concurrent in (1, 8)
    ]

    one_by_one, side_by_side = ([sample["resps"][0][0] for sample in samples] for samples in answers)
    assert all(one_by_one)
    assert side_by_side == one_by_one


@functools.cache
def _evaluate(task: str, *, batch_size: int, num_concurrent: int, tokenized_requests: bool = True) -> Any:
    model_args = {
        "model": MODEL,
        "base_url": f"{URL}/v1/completions",
        "auth_token": KEY,
        "num_concurrent": num_concurrent,
        "tokenized_requests": tokenized_requests,
        "max_length": 1024,
        "max_retries": 1,
    }
    return simple_evaluate("local-completions", model_args, [task], batch_size=batch_size, task_manager=TASKS, bootstrap_iters=0)


def _scores(**options: Any) -> dict[tuple[str, str], tuple[float, bool]]:
    """Each context and continuation, and what the harness says of it: log-likelihood, whether it is greedy."""
    samples = _evaluate("local_choice", **options)["samples"]["local_choice"]
    return {
        (arguments[0], arguments[1]): tuple(response[0])
        for sample in samples
        for arguments, response in zip(_arguments(sample), sample["resps"], strict=True)
    }


def _texts(**options: Any) -> dict[str, str]:
    samples = _evaluate("local_continuation", **options)["samples"]["local_continuation"]
    return {_arguments(sample)[0][0]: sample["resps"][0][0] for sample in samples}


def _arguments(sample: Any) -> list[tuple[Any, ...]]:
    """What the harness asked of the model, from the form in which it logs that."""
    arguments = sample["arguments"]
    return [tuple(entry.values()) for entry in arguments.values()] if isinstance(arguments, dict) else [tuple(entry) for entry in arguments]


def _ids(text: str) -> list[int]:
    return ask("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


def _split(context: str, continuation: str) -> tuple[list[int], int]:
    """The ids of both together, and how many of them are the context's: spaces at its end belong to the continuation."""
    if not context:
        return _ids("") + _ids(continuation), 1
    return _ids(context + continuation), len(_ids(context.rstrip()))


def _completion(**request: Any) -> Any:
    """The one choice of a greedy completion, asked for without any client."""
    return ask("/v1/completions", {"model": MODEL, "temperature": 0} | request)["choices"][0]
