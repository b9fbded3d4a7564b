"""What can go wrong below the HTTP layer.

    EngineError
    ├── ConfigError         a configuration that cannot work: unknown key, wrong type, impossible size
    │   └── DoesNotFitError one that needs more memory than there is, with the plan that says so
    ├── CheckpointError     files that do not hold the weights the configuration asks for
    ├── TokenizerError      no tokenizer, or a file that is none
    ├── RequestError        a request that the engine refuses; the message is for the client
    ├── GrammarError        a grammar that does not compile within its limits; the message is for the client
    ├── TransportError      bytes between the two processes that are no frame or no message
    └── EngineDiedError     a generation that no engine survives
        └── NoEngineError   there is no engine for it: none yet, or none any more

The first three stop a start with exit status 2 and their message, without a traceback.
"""


class EngineError(Exception):
    """Base of everything the engine raises on purpose; `str(error)` is one line that says what, where and what to do."""


class ConfigError(EngineError):
    """A configuration that cannot work."""


class DoesNotFitError(ConfigError):
    """A configuration that needs more memory than there is. `plan` is what `grok-server plan` would answer, as JSON."""

    def __init__(self, message: str, *, plan: str) -> None:
        super().__init__(message)
        self.plan = plan


class CheckpointError(EngineError):
    """Files that do not hold the weights that the configuration asks for."""


class TokenizerError(EngineError):
    """The tokenizer is missing or unreadable."""


class RequestError(EngineError):
    """A request the engine refuses."""


class GrammarError(EngineError):
    """A grammar that does not compile within its limits."""


class TransportError(EngineError):
    """Server and engine process do not understand each other, or one of them stopped reading."""


class EngineDiedError(EngineError):
    """This generation ended the engine process each time it ran, the last time alone."""


class NoEngineError(EngineDiedError):
    """There is no engine for this generation: none yet, or none any more."""
