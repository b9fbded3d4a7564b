"""The wire types of `GET /v1/models`."""

import msgspec


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One served model. `max_model_len` is an extra that clients of other servers look for; null until the engine is ready."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "grok-server"
    max_model_len: int | None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All served models: one."""

    object: str = "list"
    data: list[ModelCard]
