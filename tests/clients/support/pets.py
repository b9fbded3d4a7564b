"""What structured output is asked for, as pydantic models: each kind of field, a reference, a choice of types.

Every part is bounded, so that an answer ends by itself rather than by its length.
"""

import enum
from typing import Literal

from pydantic import BaseModel, Field


class Size(enum.StrEnum):
    """An enumeration, which goes by reference."""

    SMALL = "small"
    LARGE = "large"


class Owner(BaseModel):
    """A nested model, which goes by reference."""

    name: str = Field(max_length=10, description="What the owner is called")
    age: int = Field(ge=18, le=99)


class Pet(BaseModel):
    """What may be said about a pet."""

    name: str = Field(max_length=12)
    kind: Literal["cat", "dog", "bird"]
    size: Size
    is_tame: bool
    weight_kg: float = Field(ge=0, le=50)
    toys: list[Literal["ball", "bone"]] = Field(max_length=2)
    owner: Owner | None


class Mood(BaseModel):
    """Small enough to be described to the default model: where a schema goes as a tool, it is a part of the prompt."""

    mood: Literal["happy", "sad"]
    is_hungry: bool
    num_legs: int = Field(ge=0, le=4)
