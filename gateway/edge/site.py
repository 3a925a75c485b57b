"""This gateway as browsers know it, and the proxies between them and us."""

from __future__ import annotations

from multidict import CIMultiDictProxy

from gateway.domain.errors import Unauthenticated
from gateway.domain.keys import digest
from gateway.domain.sessions import require_csrf_token, require_own_page, session_name, session_secret
from gateway.settings import Server
from gateway.wire.forwarded import CallerOrigin, TrustedProxies


class Site:
    """Who asks, when it is not a key that tells."""

    def __init__(self, settings: Server) -> None:
        self._origin = settings.public_origin
        self._proxies = TrustedProxies(settings.trusted_proxies)

    def caller(self, headers: CIMultiDictProxy[str], peer: str) -> CallerOrigin:
        """Whom `peer` asks for: itself, unless it is a proxy that we trust."""
        return self._proxies.origin(
            peer,
            addresses=headers.getall("X-Forwarded-For", ()),
            schemes=headers.getall("X-Forwarded-Proto", ()),
            forwarded=headers.getall("Forwarded", ()),
        )

    def session(self, headers: CIMultiDictProxy[str], peer: str) -> str:
        """The name of the session that a request for inference presents. Raises Unauthenticated, Forbidden."""
        secret = session_secret(headers.get)
        if not secret:
            raise Unauthenticated("No auth credentials found")
        require_own_page(headers.get, origin=self._origin, scheme=self.caller(headers, peer).scheme, has_body=True)
        require_csrf_token(headers.get, secret)
        return session_name(digest(secret))
