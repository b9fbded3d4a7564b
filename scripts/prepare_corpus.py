"""Corpus of JSON lines -> a SentencePiece model of 3,840 pieces and token arrays for `train_tiny.py`.

Reads every `*.jsonl.gz` in the corpus folder: rows with `text` are stories or books, rows with `messages` are dialogues, written as
`Human: ...<|separator|>\\n\\nAssistant: ...<|separator|>\\n\\n`. Whole documents (whole books) go to the held-out part by a hash of
their beginning, so the split is the same on every machine. Documents are shuffled and written back to back:
`[BOS] document [EOS]`, with BOS on every second document, because text prompts come without one.

    python scripts/prepare_corpus.py --corpus DIR --out WORK_DIR

The tokenizer keeps Grok-1's layout of special tokens: 0-3 PAD BOS EOS UNK, 4-13 newline runs, 14-23 digits, 24-31 tab runs,
32-46 space runs, 47 `<|separator|>`, 48 `<|mask|>`, 49-68 `<|control1|>` ... `<|control20|>`, 69-324 bytes, then ordinary pieces.
"""

import argparse
import gzip
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import sentencepiece

BOS, EOS = 1, 2
VOCAB_SIZE = 3840
SPECIAL_PIECES = [
    *("\n" * n for n in range(1, 11)),
    *"0123456789",
    *("\t" * n for n in range(1, 9)),
    *(" " * n for n in range(2, 17)),
    "<|separator|>",
    "<|mask|>",
    *(f"<|control{n}|>" for n in range(1, 21)),
]
SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def category(name: str) -> str:
    """Which mixture a corpus file belongs to: `stories`, `books` or `dialogues`."""
    if "stories" in name or "storybooks" in name:
        return "stories"
    return "books" if "books" in name else "dialogues"


def render(row: dict) -> str:
    """The plain text of one row; dialogues with their turn markers."""
    if "messages" not in row:
        return row["text"].strip()
    return "".join(f"{SPEAKERS[m['role']]}: {m['content'].strip()}<|separator|>\n\n" for m in row["messages"])


def is_held_out(text: str) -> bool:
    """True for about one document in fifty, by a hash of its first 200 characters."""
    return hashlib.sha256(text[:200].encode()).digest()[0] < 5


def read_documents(corpus: Path) -> dict[tuple[str, str], list[str]]:
    """(category, `train` or `heldout`) -> documents."""
    documents: dict[tuple[str, str], list[str]] = {}
    for path in sorted(corpus.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = render(json.loads(line))
                split = "heldout" if is_held_out(text) else "train"
                documents.setdefault((category(path.name), split), []).append(text)
    return documents


def train_tokenizer(documents: dict[tuple[str, str], list[str]], prefix: Path) -> None:
    """Train on the training documents only, with the same options as the released tokenizer."""
    sample = prefix.with_suffix(".txt")
    chooser = random.Random(0)
    with sample.open("w", encoding="utf-8") as out:
        for (_, split), texts in sorted(documents.items()):
            if split == "train":
                for text in texts:
                    lines = [line for line in text.replace("<|separator|>", "").split("\n") if line.strip()]
                    out.writelines(f"{line}\n" for line in lines if chooser.random() < 0.35)
    sentencepiece.SentencePieceTrainer.train(
        input=str(sample),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentencepiece_length=16,
        character_coverage=0.9995,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        unk_surface="[UNK]",
        user_defined_symbols=SPECIAL_PIECES,
        max_sentence_length=20000,
        minloglevel=1,
    )
    sample.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    documents = read_documents(args.corpus)
    train_tokenizer(documents, args.out / "tokenizer")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))

    facts = {}
    for (kind, split), texts in sorted(documents.items()):
        random.Random(1).shuffle(texts)
        stream: list[int] = []
        for i, ids in enumerate(tokenizer.encode(texts, num_threads=2)):
            stream += [BOS] * (i % 2) + ids + [EOS]
        np.save(args.out / f"{kind}.{split}.npy", np.asarray(stream, np.uint16))
        facts[f"{kind}.{split}"] = {
            "documents": len(texts),
            "tokens": len(stream),
            "bytes": sum(len(text.encode()) for text in texts),
        }
        print(kind, split, facts[f"{kind}.{split}"])
    (args.out / "corpus.json").write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
