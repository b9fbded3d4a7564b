"""The engine speaks token ids and arrays; it knows nothing of HTTP or text. `docs/architecture.md` walks through its files."""
