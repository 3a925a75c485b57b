"""Where a request comes from, as proxies in front of us tell it: X-Forwarded-For, X-Forwarded-Proto and Forwarded (RFC 7239).

Anybody can send these headers. What they say counts from a trusted proxy alone, and of what it says only what it or
another trusted one has seen with its own eyes: the right-most address that is none of theirs.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence

import msgspec

HOPS_MAX = 32  # read of one chain; longer ones are nobody's

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PAIR = re.compile(r'\s*([A-Za-z0-9!#$%&\'*+.^_`|~-]+)=("(?:[^"\\]|\\.)*"|[^";,\s]*)\s*')
_PORT = re.compile(r"\[(.*)\](?::\w+)?|([^:]*):\w+")
_SCHEMES = ("http", "https")


class CallerOrigin(msgspec.Struct, frozen=True):
    """Who asked, as far as anybody we trust knows."""

    address: str
    scheme: str = ""  # "http" or "https", as the caller spoke to the first proxy; "": not told


class TrustedProxies:
    """Decides by networks in CIDR form. Raises ValueError for what is none."""

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)

    def origin(self, peer: str, *, addresses: Sequence[str], schemes: Sequence[str], forwarded: Sequence[str]) -> CallerOrigin:
        """Whom `peer` asks for. `addresses`, `schemes`, `forwarded`: the lines of the three headers, in order."""
        if not self._networks or not self._is_trusted(_address(peer)):
            return CallerOrigin(peer)
        # A proxy that writes one of the two headers lets the other through as its caller made it up: where they differ, neither counts.
        found = [
            *([self._right_most(peer, _hops(addresses, schemes))] if addresses or schemes else []),
            *([self._right_most(peer, _elements(forwarded))] if forwarded else []),
        ]
        if len({origin.address for origin in found}) != 1:
            return CallerOrigin(peer)
        told = {origin.scheme for origin in found} - {""}
        return CallerOrigin(found[0].address, told.pop() if len(told) == 1 else "")

    def _right_most(self, peer: str, chain: list[tuple[str, str]]) -> CallerOrigin:
        """The first from the right that is no trusted proxy; what a hop says that is no address ends the search at the hop that said it."""
        if len(chain) > HOPS_MAX:
            return CallerOrigin(peer)
        origin = CallerOrigin(peer, _scheme(chain[-1][1]) if chain else "")
        for text, scheme in reversed(chain):
            address = _address(text)
            if address is None:
                break
            origin = CallerOrigin(str(address), _scheme(scheme))
            if not self._is_trusted(address):
                break
        return origin

    def _is_trusted(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def _scheme(text: str) -> str:
    return text if text in _SCHEMES else ""


def _address(text: str) -> Address | None:
    """Of `1.2.3.4`, `1.2.3.4:5678`, `::1`, `[::1]:5678`; an IPv4 address within IPv6 is itself."""
    if text.count(":") == 1 or text.startswith("["):
        found = _PORT.fullmatch(text)
        text = (found[1] or found[2] or "") if found else ""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or (None if address.scope_id else address)
    return address


def _hops(addresses: Sequence[str], schemes: Sequence[str]) -> list[tuple[str, str]]:
    """(address, scheme) of each hop. One scheme a hop, or one for all of them: most proxies replace what came."""
    hops, told = _split(addresses) if addresses else [""], [scheme.lower() for scheme in _split(schemes)]
    return list(zip(hops, told if len(told) == len(hops) else [told[-1]] * len(hops), strict=True))


def _split(lines: Sequence[str]) -> list[str]:
    return [part.strip() for part in ",".join(lines).split(",")]


def _elements(lines: Sequence[str]) -> list[tuple[str, str]]:
    """(for, proto) of each hop; a chain that cannot be read says nothing."""
    text = ",".join(lines)
    elements: list[dict[str, str]] = [{}]
    at = 0
    while at < len(text):
        if text[at] in ",;":
            if text[at] == ",":
                elements.append({})
            at += 1
            continue
        pair = _PAIR.match(text, at)
        if pair is None or pair.end() == at:
            return [("", "")]
        value = pair[2]
        elements[-1][pair[1].lower()] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
        at = pair.end()
    return [(element.get("for", ""), element.get("proto", "").lower()) for element in elements]
