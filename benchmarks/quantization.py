"""What each form of weights and of the KV cache costs the default model: bits per byte of text it never saw, and how far its logits are
from the reference's.

    python -m benchmarks.quantization --text FILE.jsonl.gz ... [--model DIR] [--tokens N]

A FILE has one JSON object with a "text" in each line; those that `scripts/prepare_corpus.py` held out of training are taken, whole, until
there are N tokens. The model is converted to each form and run over them, one document a step. The reference is the model's own int8
weights in float32 arithmetic with a float32 cache, which is exact: the trained floats behind them are not part of a release. The table is
printed and kept in `benchmarks/results/quantization.json`; of the text only its digest is.
"""

import argparse
import gzip
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.serving import machine
from engine.checkpoint.checkpoint import open_checkpoint
from engine.checkpoint.convert import Settings, TargetForm, convert
from engine.checkpoint.logits import Arithmetic, prompt_logits
from engine.checkpoint.tensors import Checkpoint
from engine.config import KVDType, kv_bytes_per_token, read_model_config
from engine.tokenizer import Tokenizer, find_tokenizer
from server.settings import default_model_dir

RESULTS = Path(__file__).parent / "results" / "quantization.json"
WINDOW = 512  # longest document, in tokens


FLOAT32 = Arithmetic()
BFLOAT16 = Arithmetic(dtype="bfloat16", kv_dtype="bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One row of the table."""

    name: str
    weights: TargetForm | None  # None: as the model has them, turned into the floats of the arithmetic
    group: int = 128
    arithmetic: Arithmetic = FLOAT32

    @property
    def kv_dtype(self) -> KVDType:
        return self.arithmetic.kv_dtype


FORMS = (
    Form(name="float32, from int8", weights=None, arithmetic=Arithmetic(keeps_packed=False)),
    Form(name="int8", weights="int8"),
    Form(name="bfloat16", weights="bfloat16"),
    Form(name="int4, groups of 64", weights="int4", group=64),
    Form(name="int4, groups of 128", weights="int4", group=128),
    *(Form(name="int8", weights="int8", arithmetic=Arithmetic(kv_dtype=kv_dtype)) for kv_dtype in ("bfloat16", "int8", "fp8")),
    Form(name="int4, groups of 64", weights="int4", group=64, arithmetic=Arithmetic(kv_dtype="int8")),
    Form(name="int8, bfloat16 arithmetic", weights="int8", arithmetic=BFLOAT16),
    Form(name="int8, bfloat16 arithmetic", weights="int8", arithmetic=replace(BFLOAT16, kv_dtype="int8")),
    Form(name="int8, bfloat16 arithmetic", weights="int8", arithmetic=replace(BFLOAT16, kv_dtype="fp8")),
    Form(name="int4, groups of 64, bfloat16 arithmetic", weights="int4", group=64, arithmetic=BFLOAT16),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text with the start token before it."""

    token_ids: list[int]
    num_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits per byte and logit error of every form of weights.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="a .jsonl.gz with a text in each line")
    parser.add_argument("--model", type=Path, default=default_model_dir())
    parser.add_argument("--tokens", type=int, default=8192, help="how much text to take")
    arguments = parser.parse_args()

    documents, digest = read_documents(arguments.text, arguments.model, max_tokens=arguments.tokens)
    with tempfile.TemporaryDirectory() as work:
        reference = list(logits_of(arguments.model, FORMS[0], documents))
        rows = [measure(form, arguments.model, Path(work, str(index)), documents, reference) for index, form in enumerate(FORMS)]

    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,}" for value in row.values()))
    Console().print(table)
    setting = {
        "model": arguments.model.name,
        "text": [path.name for path in arguments.text],
        "text_sha256": digest,
        "documents": len(documents),
        "tokens": sum(len(document.token_ids) - 1 for document in documents),
        "bytes": sum(document.num_bytes for document in documents),
        "std_of_logits": round(float(np.std(np.concatenate(reference))), 3),
    }
    RESULTS.write_text(json.dumps({"machine": machine(), "setting": setting, "rows": rows}, indent=1) + "\n")


def read_documents(paths: list[Path], model_dir: Path, *, max_tokens: int) -> tuple[list[Document], str]:
    """Held-out texts that fit a window, and the digest of all of them."""
    tokenizer = Tokenizer.load(find_tokenizer(model_dir, None))
    bos = read_model_config(model_dir).bos_token
    documents: list[Document] = []
    digest = hashlib.sha256()
    for text in (text for path in paths for text in read_texts(path)):
        token_ids = [bos, *tokenizer.encode(text)] if is_held_out(text) else []
        if 1 < len(token_ids) <= WINDOW:
            documents.append(Document(token_ids=token_ids, num_bytes=len(text.encode())))
            digest.update(text.encode())
        if sum(len(document.token_ids) for document in documents) >= max_tokens:
            break
    return documents, digest.hexdigest()


def read_texts(path: Path) -> Iterator[str]:
    """The text of every line."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"].strip()


def is_held_out(text: str) -> bool:
    """As `scripts/prepare_corpus.py` decides it."""
    return hashlib.sha256(text[:200].encode()).digest()[0] < 5


def measure(form: Form, model_dir: Path, work: Path, documents: list[Document], reference: list[NDArray[np.float32]]) -> dict[str, Any]:
    """One row: sizes of the weights, loss, and distance from the reference."""
    if form.weights is not None:
        convert(model_dir, work, Settings(weights=form.weights, group=form.group), report=lambda _: None)
        model_dir = work
    num_bytes, matrix_bits = weight_sizes(open_checkpoint(model_dir, read_model_config(model_dir)), form)
    bits = 0.0
    errors: list[NDArray[np.float32]] = []
    is_same: list[NDArray[np.bool_]] = []
    for document, logits, expected in zip(documents, logits_of(model_dir, form, documents), reference, strict=True):
        bits += loss_bits(logits, document.token_ids)
        errors.append(logits - expected)
        is_same.append(logits.argmax(axis=-1) == expected.argmax(axis=-1))
    error = np.concatenate(errors)
    return {
        "weights": form.name,
        "bytes": num_bytes,
        "bits per weight of matrices": round(matrix_bits, 3),
        "cache": form.kv_dtype,
        "bytes of cache per token": kv_bytes_per_token(read_model_config(model_dir), form.kv_dtype),
        "bits per byte": round(bits / sum(document.num_bytes for document in documents), 4),
        "logit error, RMS": float(f"{np.sqrt(np.square(error).mean()):.3g}"),
        "logit error, largest": float(f"{np.abs(error).max():.3g}"),
        "same likeliest token, %": round(100 * float(np.concatenate(is_same).mean()), 2),
    }


def weight_sizes(checkpoint: Checkpoint, form: Form) -> tuple[int, float]:
    """Bytes of all tensors, and bits for each weight of the quantised matrices with their scales."""
    if form.weights is None:
        return 4 * checkpoint.num_params, 32.0
    matrices = [tensor for tensor in checkpoint.tensors.values() if tensor.spec.is_quantized]
    num_bytes = sum(tensor.num_bytes for tensor in matrices)
    return checkpoint.num_bytes, 8 * num_bytes / sum(tensor.spec.num_params for tensor in matrices)


def loss_bits(logits: NDArray[np.float32], token_ids: list[int]) -> float:
    """Bits that the tokens after the first cost."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(axis=-1)
    normalizer = top + np.log(np.exp(wide - top[:, None]).sum(axis=-1))
    return float((normalizer - wide[np.arange(len(wide)), token_ids[1:]]).sum()) / math.log(2)


def logits_of(model_dir: Path, form: Form, documents: list[Document]) -> Iterator[NDArray[np.float32]]:
    """[tokens, V] of each document in turn, each computed alone."""
    return prompt_logits(model_dir, [document.token_ids for document in documents], form.arithmetic)


if __name__ == "__main__":
    main()
