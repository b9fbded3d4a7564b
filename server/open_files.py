"""How many connections the operating system leaves room for: each is an open file, and a process may have only so many.

A server that runs out of them cannot even refuse. Asked once, before anything is started.
"""

import resource

from engine.errors import ConfigError

OTHER_FILES = 128  # sockets, logs, pipes, libraries, and connections beyond the limit that are told so


def connections_within(wanted: int) -> int:
    """`wanted`, or as many as there may be: the process's own limit is raised for it, as far as it may be.

    Raises `ConfigError` where not even one is left.
    """
    needed = wanted + OTHER_FILES
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft is not None and soft < needed:
        soft = needed if hard is None else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.RLIM_INFINITY if hard is None else hard))
    allowed = wanted if soft is None else min(wanted, soft - OTHER_FILES)
    if allowed < 1:
        raise ConfigError(f"the process may have {soft} files open, which leaves none for connections; allow at least {OTHER_FILES + 64}")
    return allowed
