"""What masks cost: 32 streams under a JSON schema against 32 plain sampled ones, on the default model. Run by `make bench`.

    python -m benchmarks.structured [--model DIR] [--tokens N] [--rounds N]

Both sides get the same prompts, seeds and number of tokens; the schema asks for more text than there are tokens, so no stream ends early.
They run through the engine's own loop, messages encoded, without the server. A round measures both one after the other, in turns the
one or the other first, so that they share the machine's mood; the ratio is taken within a round. Results are kept in
`benchmarks/results/structured.json`.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from llguidance import LLMatcher

from benchmarks.serving import machine, show, summary, use_real_time_class
from engine.build import build_engine
from engine.constraints import Grammars
from engine.core import EngineCore
from engine.engine_loop import EngineLoop
from engine.grammar import GrammarMatcher, GrammarTokenizer
from engine.messages import Deltas, FromEngine, Submit, encode
from engine.tokenizer import Tokenizer
from engine.types import FinishReason, GenerationRequest, SamplingParams
from server.engine_options import engine_options
from server.settings import default_model_dir, load_settings

RESULTS = Path(__file__).parent / "results" / "structured.json"
NUM_STREAMS = 32
PROMPT = "A list of the people of the village, as JSON: "
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["happy", "sad", "angry"]},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
    },
    "required": ["name", "age", "mood", "friends"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 500}


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams under a JSON schema against plain ones.")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--tokens", type=int, default=128, help="generated per stream")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    is_real_time = use_real_time_class()

    core, tokenizer = engine_of(arguments.model)
    prompt = tuple(tokenizer.encode(PROMPT))
    schema = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False})
    sides = {f"{NUM_STREAMS} plain streams": None, f"{NUM_STREAMS} streams under a schema": schema}
    rounds: list[dict[str, float]] = []
    for number in range(arguments.rounds + 1):
        order = list(sides.items())[:: -1 if number % 2 else 1]
        rounds.append({name: rate(core, prompt, grammar=grammar, num_tokens=arguments.tokens) for name, grammar in order})
    del rounds[0]  # warms everything up

    plain, structured = sides
    rates = {name: [row[name] for row in rounds] for name in sides}
    ratios = {"under a schema / plain": [row[structured] / row[plain] for row in rounds]}
    show(rates, ratios)
    RESULTS.parent.mkdir(exist_ok=True)
    setting = {"model": arguments.model.name, "tokens": arguments.tokens, "rounds": arguments.rounds, "real_time_class": is_real_time}
    figures = {name: summary(values) for name, values in {**rates, **ratios}.items()}
    RESULTS.write_text(json.dumps({"machine": machine(), "setting": setting, "tokens_per_s_and_ratios": figures}, indent=1) + "\n")


def engine_of(model_dir: Path) -> tuple[EngineCore, Tokenizer]:
    """The engine of a server with default settings."""
    options = engine_options(load_settings({"model": str(model_dir)}))
    tokenizer = Tokenizer.load(model_dir / "tokenizer.model")
    native = GrammarTokenizer(tokenizer, vocab_size=options.model.vocab_size, eos_token=options.model.eos_token)
    config = options.resolve(backend="cpu", free_bytes=512 << 20)
    core = build_engine(config, report=lambda _: None, grammars=Grammars(partial(GrammarMatcher, native)))
    assert isinstance(core, EngineCore), "one data shard is one core"
    return core, tokenizer


def rate(core: EngineCore, prompt: tuple[int, ...], *, grammar: str | None, num_tokens: int) -> float:
    """Tokens a second over all streams, from the first token to the last."""
    arrivals: list[float] = []
    num_received = 0

    def send(message: FromEngine) -> None:
        nonlocal num_received
        encode(message)
        if isinstance(message, Deltas) and message.deltas:
            arrivals.append(time.perf_counter())
            num_received += sum(len(delta.token_ids) for delta in message.deltas)
            assert all(delta.finish_reason in (None, FinishReason.LENGTH) for delta in message.deltas)

    loop = EngineLoop(core, send=send)
    request = GenerationRequest(
        request_id="", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=num_tokens, ignore_eos=True), grammar=grammar
    )
    for number in range(NUM_STREAMS):
        loop.take(Submit(replace(request, request_id=str(number), sampling=replace(request.sampling, seed=number))))
    while core.has_work:
        loop.turn()
    assert num_received == NUM_STREAMS * num_tokens
    return num_received / (arrivals[-1] - arrivals[0])


if __name__ == "__main__":
    main()
