"""Whom a proxy asks for: what trusted ones have seen counts, what callers make up does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.wire.forwarded import HOPS_MAX, CallerOrigin, TrustedProxies

PROXIES = TrustedProxies(("10.0.0.0/8", "192.0.2.7", "2001:db8:1::/48"))
PROXY, STRANGER = "10.1.2.3", "203.0.113.9"


def told(peer: str, *, addresses: tuple[str, ...] = (), schemes: tuple[str, ...] = (), forwarded: tuple[str, ...] = ()) -> CallerOrigin:
    return PROXIES.origin(peer, addresses=addresses, schemes=schemes, forwarded=forwarded)


@pytest.mark.parametrize("peer", [STRANGER, "2001:db8:2::1", "::1", "", "not an address"])
def test_strangers_are_never_believed(peer: str) -> None:
    found = told(peer, addresses=("198.51.100.1",), schemes=("https",), forwarded=("for=198.51.100.1;proto=https",))
    assert found == CallerOrigin(peer)


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        (("198.51.100.1",), "198.51.100.1"),
        (("6.6.6.6, 198.51.100.1",), "198.51.100.1"),  # what the caller made up stands left of what the proxy saw
        (("6.6.6.6, 198.51.100.1, 10.9.9.9, 192.0.2.7",), "198.51.100.1"),  # a chain of our own proxies
        (("6.6.6.6", "198.51.100.1", "10.9.9.9"), "198.51.100.1"),  # one line a hop is the same list
        (("10.0.0.5, 10.0.0.6",), "10.0.0.5"),  # somebody of our own network
        (("198.51.100.1:4711",), "198.51.100.1"),
        (("[2001:db8:9::1]:4711",), "2001:db8:9::1"),
        (("2001:DB8:9:0::1",), "2001:db8:9::1"),
        (("2001:db8:9::1, 2001:db8:1::5",), "2001:db8:9::1"),
        (("::ffff:198.51.100.1",), "198.51.100.1"),
        (("198.51.100.1, ::ffff:10.2.2.2",), "198.51.100.1"),
        (("198.51.100.1, unknown, 10.0.0.6",), "10.0.0.6"),  # what a hop could not say ends the chain at that hop
        (("198.51.100.1, ",), PROXY),
        (("",), PROXY),
        (("198.51.100.1\u00a0",), "198.51.100.1"),
        (("fe80::1%eth0",), PROXY),
        (("1.2.3.4.5, 256.1.1.1",), PROXY),
        ((", ".join(["6.6.6.6"] * HOPS_MAX + ["198.51.100.1"]),), PROXY),
    ],
)  # fmt: skip
def test_the_right_most_address_that_is_no_proxys_is_the_callers(lines: tuple[str, ...], address: str) -> None:
    assert told(PROXY, addresses=lines).address == address
    assert told(f"::ffff:{PROXY}", addresses=lines).address in (address, f"::ffff:{PROXY}")


@pytest.mark.parametrize(
    ("lines", "address", "scheme"),
    [
        (("for=198.51.100.1",), "198.51.100.1", ""),
        (("for=198.51.100.1;proto=https;by=10.1.2.3",), "198.51.100.1", "https"),
        (('For="[2001:db8:9::1]:4711";Proto=HTTPS',), "2001:db8:9::1", "https"),
        (("for=6.6.6.6;proto=http, for=198.51.100.1;proto=https",), "198.51.100.1", "https"),
        (("for=6.6.6.6", "for=198.51.100.1, for=10.4.4.4"), "198.51.100.1", ""),
        (('for="198.51.100.1, for=6.6.6.6"',), PROXY, ""),  # a comma within quotes is no border
        (('for="\\198.51.100.1"',), "198.51.100.1", ""),
        (("for=_hidden, for=10.4.4.4;proto=https",), "10.4.4.4", "https"),
        (("for=unknown",), PROXY, ""),
        (("proto=https",), PROXY, "https"),
        (("for=198.51.100.1;proto=ftp",), "198.51.100.1", ""),
        (('for="198.51.100.1',), PROXY, ""),
        (("\x00",), PROXY, ""),
        (("",), PROXY, ""),
    ],
)
def test_forwarded_says_the_same_in_its_own_words(lines: tuple[str, ...], address: str, scheme: str) -> None:
    assert told(PROXY, forwarded=lines) == CallerOrigin(address, scheme)


@pytest.mark.parametrize(
    ("addresses", "schemes", "scheme"),
    [
        (("198.51.100.1",), ("https",), "https"),
        (("198.51.100.1, 10.4.4.4",), ("https",), "https"),
        (("6.6.6.6, 198.51.100.1",), ("http, https",), "https"),
        (("198.51.100.1, 10.4.4.4",), ("https, http",), "https"),  # a scheme a hop: that of the caller's own
        (("198.51.100.1",), ("http, HTTPS",), "https"),
        (("198.51.100.1",), ("wss",), ""),
        (("198.51.100.1",), (), ""),
        ((), ("https",), "https"),
    ],
)
def test_the_scheme_is_the_one_that_the_caller_spoke(addresses: tuple[str, ...], schemes: tuple[str, ...], scheme: str) -> None:
    assert told(PROXY, addresses=addresses, schemes=schemes).scheme == scheme


def test_two_headers_that_differ_are_both_left_aside() -> None:
    """A proxy that writes one of them passes the other on as its caller made it up."""
    assert told(PROXY, addresses=("198.51.100.1",), forwarded=("for=6.6.6.6",)) == CallerOrigin(PROXY)
    assert told(PROXY, addresses=("198.51.100.1",), forwarded=("for=198.51.100.1;proto=https",)) == CallerOrigin("198.51.100.1", "https")
    both = told(PROXY, addresses=("198.51.100.1",), schemes=("http",), forwarded=("for=198.51.100.1;proto=https",))
    assert both == CallerOrigin("198.51.100.1")


@given(st.lists(st.text()), st.lists(st.text()), st.lists(st.text(alphabet='for=;,"\\ []:10.proto\x00')))
def test_whatever_is_sent_the_answer_is_an_address(addresses: list[str], schemes: list[str], forwarded: list[str]) -> None:
    found = PROXIES.origin(PROXY, addresses=addresses, schemes=schemes, forwarded=forwarded)
    assert found.scheme in ("", "http", "https")
    assert PROXIES.origin(STRANGER, addresses=addresses, schemes=schemes, forwarded=forwarded) == CallerOrigin(STRANGER)
    assert set(found.address) <= set("0123456789abcdef.:")
