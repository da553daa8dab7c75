"""Where task code may connect to: public addresses, and the networks the operator opened.

The decision falls on the address actually connected to, in the socket factory of the HTTP client:
names, redirects, DNS answers that change between look and use, odd spellings of an address: all
end there. Proxies from the environment would hide the address, so they are never used.

Tables: IANA special-purpose registries for IPv4 and IPv6, typed in here because
ipaddress.is_global calls NAT64, 6to4, site-local and multicast addresses global (3.11).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any, Final

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from zmqcluster.errors import ConfigError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NOT_PUBLIC_V4: Final[tuple[tuple[IPv4Network, str], ...]] = tuple(
    (IPv4Network(network), what)
    for network, what in (
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "carrier-grade NAT"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local, where clouds keep their secrets"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "protocol assignments"),
        ("192.0.2.0/24", "documentation"),
        ("192.88.99.0/24", "6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved or broadcast"),
    )
)

# What is not global unicast (2000::/3) is refused as a whole; these lie inside of it.
_GLOBAL_UNICAST_V6: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_V6: Final[tuple[tuple[IPv6Network, str], ...]] = tuple(
    (IPv6Network(network), what)
    for network, what in (
        ("2001::/23", "protocol assignments, Teredo among them"),
        ("2001:db8::/32", "documentation"),
        ("3fff::/20", "documentation"),
    )
)
# Only for a better sentence.
_NAMED_V6: Final[tuple[tuple[IPv6Network, str], ...]] = tuple(
    (IPv6Network(network), what)
    for network, what in (
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)

NAMES_MAX: Final = 10_000

_V4_COMPATIBLE: Final = IPv6Network("::/96")
_NAT64: Final = IPv6Network("64:ff9b::/96")
_SIX_TO_FOUR: Final = IPv6Network("2002::/16")
_TEREDO: Final = IPv6Network("2001::/32")


class EgressRefused(OSError):
    """This address is not one we connect to. An OSError, so the HTTP client lets it through.

    sentence: names the address, why, and the config key that would change it.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(errno.EACCES, sentence)
        self.sentence = sentence


class Egress:
    """The operator's rule on where tasks may connect to.

    allow: networks opened beside the public ones. contact: goes into the user agent; without
    one, public addresses are refused too, for nobody crawls strangers anonymously.
    """

    def __init__(self, allow: Sequence[str] = (), contact: str = "") -> None:
        self._allow = tuple(_network(text) for text in allow)
        self._contact = contact
        self.problem_with = lru_cache(maxsize=4096)(self._problem_with)

    def check(self, address: str) -> None:
        """Raises EgressRefused unless this IP address may be connected to."""
        if problem := self.problem_with(address):
            raise EgressRefused(problem)

    def is_opened(self, text: str) -> bool:
        """Is it an address in one of the networks the operator opened?"""
        try:
            address = ip_address(text)
        except ValueError:
            return False
        return any(_holds(network, form) for network in self._allow for form in _forms(address))

    def _problem_with(self, text: str) -> str:
        """ "" when the address is fine, else the sentence for the user."""
        try:
            address = ip_address(text)
        except ValueError:
            return f"will not connect to {text!r}: not an IP address"
        forms = _forms(address)
        opened = [any(_holds(network, form) for network in self._allow) for form in forms]
        for form, is_open in zip(forms, opened, strict=True):
            kind = "" if is_open else _kind(form)
            if kind:
                width = 32 if form.version == 4 else 128
                return (
                    f"will not connect to {text} ({kind}): not a public address. To allow it, "
                    f"add its network to egress_allow (--egress-allow {form}/{width})"
                )
        if any(opened):
            return ""
        if not self._contact:
            return (
                f"will not connect to {text}: crawling public sites needs a contact in the user "
                "agent. Set contact (--contact you@example.com)"
            )
        return ""


def _network(text: str) -> Network:
    try:
        return ip_network(text.strip(), strict=False)
    except ValueError:
        raise ConfigError(
            "egress_allow", f"{text!r} is not a network; give one like 127.0.0.0/8 or fd00::/8"
        ) from None


def _holds(network: Network, address: Address) -> bool:
    return network.version == address.version and address in network


def _forms(address: Address) -> tuple[Address, ...]:
    """The address, or the IPv4 addresses a translator or tunnel would make of it."""
    if isinstance(address, IPv4Address):
        return (address,)
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        # The kernel itself unwraps these: it is the IPv4 address, nothing else.
        return (address.ipv4_mapped,)
    if address in _NAT64 or (address in _V4_COMPATIBLE and int(address) > 1):
        return (low, address)
    if address in _SIX_TO_FOUR:
        return (IPv4Address(int(address) >> 80 & 0xFFFFFFFF), address)
    if address in _TEREDO:
        return (IPv4Address(int(low) ^ 0xFFFFFFFF), address)
    return (address,)


def _kind(address: Address) -> str:
    """What makes this address non-public, or ""."""
    if isinstance(address, IPv4Address):
        return next((what for network, what in _NOT_PUBLIC_V4 if address in network), "")
    if address in _NAT64:
        return ""  # As public as the IPv4 address inside, which is judged on its own.
    for network, what in _NOT_PUBLIC_V6 + _NAMED_V6:
        if address in network:
            return what
    return "" if address in _GLOBAL_UNICAST_V6 else "not global unicast"


class GuardedResolver(AbstractResolver):
    """DNS, minus the addresses we would refuse: a name with one public address stays usable."""

    def __init__(self, egress: Egress, inner: AbstractResolver | None = None) -> None:
        self._egress = egress
        self._inner = inner
        self._opened: dict[str, bool] = {}

    def is_opened(self, host: str) -> bool:
        """Did its last look-up give only addresses the operator opened?"""
        return self._opened.get(host, False)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of host that may be connected to. Raises EgressRefused when none may."""
        if self._inner is None:
            self._inner = ThreadedResolver()
        found = await self._inner.resolve(host, port, family)
        good = [entry for entry in found if not self._egress.problem_with(entry["host"])]
        if found and not good:
            raise EgressRefused(f"{host}: {self._egress.problem_with(found[0]['host'])}")
        if len(self._opened) > NAMES_MAX:
            self._opened.clear()
        self._opened[host] = all(self._egress.is_opened(entry["host"]) for entry in good)
        return good

    async def close(self) -> None:
        """Release the resolver inside."""
        if self._inner is not None:
            await self._inner.close()


def guarded_socket(egress: Egress, addr_info: tuple[Any, ...]) -> socket.socket:
    """Make the socket for one connection attempt, or raise EgressRefused: the last word."""
    family, kind, proto, _, address = addr_info
    egress.check(address[0])
    return socket.socket(family=family, type=kind, proto=proto)
