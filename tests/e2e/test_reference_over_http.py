"""The released code's outputs on tiny-a, asked for by a client: token ids in, log-probabilities out."""

import httpx
import numpy as np
import pytest
from server_process import ROOT, RunningServer

pytestmark = pytest.mark.timeout(300)

ORACLE = np.load(ROOT / "tests" / "data" / "tiny-a" / "oracle.npz")
PROMPTS = [ORACLE[f"prompt_{i}"].tolist() for i in range(6)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    highest = wide.max(-1, keepdims=True)
    return wide - highest - np.log(np.exp(wide - highest).sum(-1, keepdims=True))


def complete(server: RunningServer, **body: object) -> dict:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny-a", **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_matches(logprobs: dict, reference: np.ndarray, token_ids: list[int], *, first: int) -> None:
    """Entries from `first` on against rows of log-probabilities; row i is the distribution of the token at position first + i."""
    for place, (row, token) in enumerate(zip(reference, token_ids, strict=True), start=first):
        assert logprobs["tokens"][place] == f"token_id:{token}"
        assert logprobs["token_logprobs"][place] == pytest.approx(row[token], abs=1e-4)
        top = logprobs["top_logprobs"][place]
        best = np.argsort(-row)[:20]
        assert {f"token_id:{other}" for other in best} <= top.keys()
        for other in best:
            assert top[f"token_id:{other}"] == pytest.approx(row[other], abs=1e-4)


@pytest.mark.parametrize("index", range(6))
def test_echoed_prompt_has_the_reference_log_probabilities(tiny_a_server: RunningServer, index: int):
    prompt = PROMPTS[index]
    reference = log_softmax(ORACLE[f"f32/full_logits_{index}"])

    answer = complete(tiny_a_server, prompt=prompt, max_tokens=0, echo=True, logprobs=20, return_tokens_as_token_ids=True)

    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(prompt)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert_matches(logprobs, reference[:-1], prompt[1:], first=1)


@pytest.mark.parametrize("index", range(6))
def test_greedy_continuation_is_the_reference_one(tiny_a_server: RunningServer, index: int):
    tokens = ORACLE[f"f32/decode_tokens_{index}"].tolist()
    reference = log_softmax(ORACLE[f"f32/decode_logits_{index}"])

    answer = complete(
        tiny_a_server,
        prompt=PROMPTS[index],
        max_tokens=len(tokens),
        temperature=0,
        logprobs=20,
        ignore_eos=True,
        return_tokens_as_token_ids=True,
    )

    assert answer["choices"][0]["text"] == ""
    assert answer["usage"]["completion_tokens"] == len(tokens)
    assert_matches(answer["choices"][0]["logprobs"], reference, tokens, first=0)
