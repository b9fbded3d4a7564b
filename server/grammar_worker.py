"""`python -m server.grammar_worker --fd N ...` compiles grammars that may be hostile; `server/grammar_check.py` starts it and talks to it.

A grammar is compiled by the engine's own code under the engine's own limits, which do not hold in every case: some make llguidance ask for
gigabytes at once, or recurse until the stack ends. Here either is the end of a process that nobody misses. The kernel ends it when one
grammar has taken its time of the processor or its share of memory; how it ended is the verdict. What compiles also has to give its first
masks, along one random text, because much of the work is put off until then.

The stack is half of the least that the engine's threads have (2 MiB, where the system's own limit is none), so what passes here does not
end the engine. The process runs at low priority, and ends with the connection or with its parent.
"""

import argparse
import ctypes
import os
import random
import resource
import signal
import socket
import sys
import threading
from io import BufferedReader
from pathlib import Path

import msgspec
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from engine.errors import GrammarError
from engine.grammar import GrammarMatcher, GrammarTokenizer
from server.grammar_messages import HEADER, MAX_REASON_CHARS, Answer, frame, payload_len

NUM_WALK_STEPS = 16
STACK_BYTES = 2**20
NICENESS = 5
_IN_OTHER_WORDS = {  # what clients can do about it
    " <non-verbose/>": "",
    ". Enable 'coerce_one_of' option to approximate oneOf with anyOf": " where branches overlap: use anyOf;",
    "consider making your grammar left-recursive if it's right-recursive": "too much may follow at one place: let fewer properties be "
    "optional, write alternatives as one terminal, and repetitions left-recursively",
}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def judge(tokenizer: GrammarTokenizer, text: str) -> Answer:
    """Compile a grammar and take its first steps. `text` is llguidance's form, Lark, or EBNF as llama.cpp writes it."""
    grammar = ""
    try:
        grammar = _as_engine_takes_it(text)
        matcher = GrammarMatcher(tokenizer, grammar)
        reason = _fault_along_a_walk(matcher, tokenizer)
    except GrammarError as error:
        reason = str(error)
    return Answer(grammar=grammar) if reason is None else Answer(reason=_readable(reason)[:MAX_REASON_CHARS])


def _as_engine_takes_it(text: str) -> str:
    """Raises `GrammarError` for EBNF that is none."""
    if text.startswith("{"):
        return text
    try:
        return any_to_lark(text)
    except MemoryError:
        raise
    except RecursionError:
        raise GrammarError("it nests too deeply") from None
    except Exception as error:  # the converter raises plain exceptions
        raise GrammarError(f"it is neither Lark, for want of a rule called start, nor EBNF: {error}") from None


def _fault_along_a_walk(matcher: GrammarMatcher, tokenizer: GrammarTokenizer) -> str | None:
    """Generate a few tokens, the same ones every time; returns why that cannot go on, if so."""
    row = np.zeros(tokenizer.num_mask_words, np.int32)
    choose = random.Random(0)
    for _ in range(NUM_WALK_STEPS):
        matcher.fill_mask(row)
        if matcher.error is not None:
            return matcher.error
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        if not len(allowed):
            return None if matcher.is_accepting else "no text matches it"
        matcher.advance(int(choose.choice(allowed)))
    return matcher.error


def _readable(reason: str) -> str:
    """llguidance's reason without what only its developers know."""
    if reason.startswith("NoExtension"):
        return "no text matches it"
    for theirs, ours in _IN_OTHER_WORDS.items():
        reason = reason.replace(theirs, ours)
    return reason


def serve(connection: socket.socket, tokenizer: GrammarTokenizer, *, cpu_s: float, memory_bytes: int) -> None:
    """Answer until the connection ends, or this process has grown by a quarter of what a grammar may take."""
    judge(tokenizer, 'start: "a"')  # what the first one needs is not counted against it
    resting_bytes = _address_space_bytes()
    if sys.platform == "linux":
        limit = resting_bytes + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    stream = connection.makefile("rb")
    connection.sendall(frame(b""))
    _be_silent()
    is_last = False
    while not is_last and (text := _receive(stream)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # of all threads; its signal ends the process, whatever that does
        try:
            answer = judge(tokenizer, text)
        except MemoryError:
            os.abort()  # as llguidance does it
        signal.setitimer(signal.ITIMER_PROF, 0)
        is_last = _address_space_bytes() > resting_bytes + memory_bytes // 4
        connection.sendall(frame(msgspec.json.encode(msgspec.structs.replace(answer, is_last=is_last))))


def _receive(stream: BufferedReader) -> str | None:
    """The next text; None at the end of the connection."""
    header = stream.read(HEADER.size)
    return stream.read(payload_len(header)).decode() if len(header) == HEADER.size else None


def _address_space_bytes() -> int:
    """What `RLIMIT_AS` is about; elsewhere than on Linux there is no such limit, and this is 0."""
    if sys.platform != "linux":
        return 0
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _be_silent() -> None:
    """What the end of a hostile grammar prints is of no use in the server's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _die_with_parent() -> None:
    """On Linux, have the kernel kill this process at the end of the thread that started it, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def main() -> None:
    """Runs `serve` in a thread: only a thread's stack can be given a size."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    parser = argparse.ArgumentParser(prog="python -m server.grammar_worker", description="Compiles grammars; started by the server.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the connected socket to the server")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece model")
    parser.add_argument("--vocab-size", type=int, required=True, help="the model's, which may be above the tokenizer's")
    parser.add_argument("--eos-token", type=int, required=True)
    parser.add_argument("--cpu-s", type=float, required=True, help="seconds of the processor for one grammar")
    parser.add_argument("--memory-bytes", type=int, required=True, help="memory for one grammar")
    options = parser.parse_args()
    connection = socket.socket(fileno=options.fd)

    def run() -> None:
        tokenizer = GrammarTokenizer.load(options.tokenizer, vocab_size=options.vocab_size, eos_token=options.eos_token)
        serve(connection, tokenizer, cpu_s=options.cpu_s, memory_bytes=options.memory_bytes)
        os._exit(0)

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=run, name="grammars")
    thread.start()
    thread.join()
    sys.exit(1)  # a traceback says why


if __name__ == "__main__":
    main()
