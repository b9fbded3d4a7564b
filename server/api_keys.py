"""The API keys that a server takes: read once, kept as digests alone, compared without telling how near a guess was.

Text comes from `server/settings.py` (flag, environment, YAML) or from a file; what asks is `server/auth.py`. Knows nothing of HTTP.
"""

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ConfigError

MAX_KEY_CHARS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """One key: what it hashes to, and whose it is. Two keys of the same name are one tenant's, so that a key can be replaced by and by."""

    digest: bytes = field(repr=False)
    tenant: str

    @classmethod
    def of(cls, key: str, *, name: str | None = None) -> "ApiKey":
        """Raises `ValueError`, which does not repeat the key, for what no header could carry."""
        if not re.fullmatch(r"[!-+\--~]+", key) or len(key) > MAX_KEY_CHARS:
            raise ValueError(f"an API key is 1 to {MAX_KEY_CHARS} visible ASCII characters without spaces and commas")
        digest = _digest(key.encode())
        return cls(digest=digest, tenant=f"name:{name}" if name is not None else f"key:{digest.hex()[:12]}")


class ApiKeys:
    """All keys of one server. False where there are none, and everything is open."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def tenant_of(self, presented: bytes) -> str | None:
        """Whose key this is, None for nobody's. Compares the digest with every key's, whichever fits, so the time says nothing."""
        digest, found = _digest(presented), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key.tenant
        return found


def read_key_file(path: Path) -> tuple[ApiKey, ...]:
    """One key a line, after it, if wanted, a space and whose it is; empty lines and lines that begin with # are skipped.

    Raises `ConfigError` for a file that cannot be read, holds no key, or a wrong line, which is named by its number alone.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}") from None
    keys: list[ApiKey] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, _, name = line.strip().partition(" ")
        try:
            keys.append(ApiKey.of(key, name=name.strip() or None))
        except ValueError as error:
            raise ConfigError(f"--api-key-file: line {number} of {path}: {error}") from None
    if not keys:
        raise ConfigError(f"--api-key-file: {path} holds no key; write one a line, or leave the setting out")
    return tuple(keys)


def is_open_to_others(path: Path) -> bool:
    """Whether every user of this machine may read the file."""
    return bool(os.stat(path).st_mode & stat.S_IROTH)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
