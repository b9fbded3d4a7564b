"""Who may ask: with API keys set, nothing answers without one but liveness and readiness.

`RequireKey` wraps the application outside its router and decides on the path as it came over the wire, before anything decodes or tidies
it: what is not exactly one of `OPEN_PATHS` needs a key, whether there is such a route or not. It also says whose the request is, in
`scope["state"]["key_tenant"]`: that is the tenant for quotas and turns. Without keys that is the empty string and everything is open.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api_keys import ApiKeys
from server.errors import WrongKey, refusal_response

OPEN_PATHS = frozenset({b"/livez", b"/readyz", b"/health"})
OPEN_METHODS = frozenset({"GET", "HEAD"})


class RequireKey:
    """Passes on what has a key, or needs none; answers everything else with 401."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and the end of the application: there are no other connections
            await self.app(scope, receive, send)
            return
        tenant = ""
        if self.keys and not is_open(scope):
            presented = presented_keys(scope)
            tenants = [self.keys.tenant_of(key) for key in presented or [b""]]
            tenant = next((found for found in tenants if found is not None), None)
            if tenant is None:
                await refusal_response(WrongKey(_complaint(presented)), scope)(scope, receive, send)
                return
        scope.setdefault("state", {})["key_tenant"] = tenant
        await self.app(scope, receive, send)


def is_open(scope: Scope) -> bool:
    """Whether a request is one of the few that need no key."""
    return scope["method"] in OPEN_METHODS and scope.get("raw_path") in OPEN_PATHS


def presented_keys(scope: Scope) -> list[bytes]:
    """The key of `Authorization: Bearer`, which OpenAI's clients send, and that of `x-api-key`, Anthropic's; of each header the first."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, value)
    keys: list[bytes] = []
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        keys.append(bearer.strip())
    if b"x-api-key" in headers:
        keys.append(headers[b"x-api-key"].strip())
    return keys


def _complaint(presented: list[bytes]) -> str:
    if presented:
        return "this server does not know the API key that was sent"
    return "no API key was sent; send it in the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
