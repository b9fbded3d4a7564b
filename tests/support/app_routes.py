"""What an application answers at all, as its router sees it."""

from fastapi import FastAPI
from starlette.routing import BaseRoute, Route


def routes_of(app: FastAPI) -> dict[str, set[str]]:
    """The methods of every path, those of included routers among them."""
    methods: dict[str, set[str]] = {}
    for route in _routes_below(app.routes):
        methods.setdefault(route.path, set()).update(route.methods or ())
    return methods


def _routes_below(routes: list[BaseRoute]) -> list[Route]:
    found: list[Route] = []
    for route in routes:
        if isinstance(route, Route):
            found.append(route)
        else:
            found += _routes_below(route.original_router.routes)  # pyright: ignore[reportAttributeAccessIssue]
    return found
