"""The application that edges relay callers to: the table of routes, with everything that holds for all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from gateway.control.api.auth import Authentication
from gateway.control.api.http import decoded, errors, queried
from gateway.control.api.route import API_BASES, NOTHING, OWN_PAGES, Call, Nothing, Route
from gateway.log import Log

# Any page may call the API with a key of its own; cookies never come along, since no origin is named.
CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "X-Generation-Id, Retry-After, X-RateLimit-Limit, X-RateLimit-Remaining, X-RateLimit-Reset",
}
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PATCH, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",  # the star does not cover Authorization
    "Access-Control-Max-Age": "86400",
}
PROTECTION = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
PUBLIC_CACHE = "no-cache"
BODY_BYTES_MAX = 256 * 1024  # none of ours is longer: two lists of 200 names


def public_application(routes: Sequence[Route], *, authentication: Authentication, log: Log) -> web.Application:
    """All routes at all their bases; the first of two that match answers."""
    app = web.Application(middlewares=[_protection(routes), errors(log)], client_max_size=BODY_BYTES_MAX)
    for route in routes:
        handler = _handler(route, authentication)
        for base in route.bases:
            if route.method == "GET":
                app.router.add_get(base + route.path, handler)
            else:
                app.router.add_route(route.method, base + route.path, handler)
    return app


def _handler(route: Route, authentication: Authentication) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        caller = await authentication.caller(request, route.access)
        query = queried(request.query, route.query) if route.query is not Nothing else NOTHING
        body = await decoded(request, route.body) if route.body is not Nothing else NOTHING
        response = await route.handler(Call(request, caller, query, body))
        if route.access == "public":
            response.headers.setdefault("Cache-Control", PUBLIC_CACHE)
        return response

    return handle


def _protection(routes: Sequence[Route]) -> Middleware:
    """Pages of other origins may read the API, but not what is for our own pages; and headers that every answer has."""
    own = tuple({base + route.path.partition("{")[0] for route in routes if route.access in OWN_PAGES for base in route.bases})
    bases = tuple(f"{base}/" for base in API_BASES)

    @web.middleware
    async def protected(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.path.startswith(bases) and not request.path.startswith(own)
        if is_open and request.method == "OPTIONS":
            return web.Response(status=204, headers={**CORS, **PREFLIGHT})
        response = await handler(request)
        for name, value in PROTECTION.items():
            response.headers.setdefault(name, value)
        if is_open:
            response.headers.update(CORS)
        return response

    return protected
