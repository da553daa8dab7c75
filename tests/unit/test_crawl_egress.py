"""Which addresses task code may connect to."""

from __future__ import annotations

import asyncio
import socket

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from executors.egress import Egress, EgressRefused, GuardedResolver, guarded_socket
from zmqcluster.errors import ConfigError

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "192.175.48.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]
NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.7",
    "203.0.113.7",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "::8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:db8::1",
    "2001:20::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "4000::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_fine_with_a_contact(address: str) -> None:
    assert Egress(contact="a@b.example").problem_with(address) == ""


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_everything_else_is_refused_by_name(address: str) -> None:
    problem = Egress(contact="a@b.example").problem_with(address)

    assert address in problem
    assert "egress_allow" in problem


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_need_a_contact(address: str) -> None:
    assert "--contact" in Egress().problem_with(address)


@pytest.mark.parametrize(
    ("allow", "address", "is_fine"),
    [
        ("127.0.0.0/8", "127.0.0.1", True),
        ("127.0.0.0/8", "::ffff:127.0.0.1", True),
        ("127.0.0.0/8", "10.0.0.1", False),
        ("127.0.0.0/8", "::1", False),
        ("::1", "::1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("fd00::/8", "fd12::1", True),
        ("0.0.0.0/0", "169.254.169.254", True),
        # A tunnel address is not the address inside of it: both have to be fine.
        ("2002::/16", "2002:7f00:1::", False),
        ("127.0.0.0/8", "::127.0.0.1", False),
        ("8.8.8.0/24", "8.8.8.8", True),
    ],
)
def test_the_operator_opens_networks(allow: str, address: str, is_fine: bool) -> None:
    assert (Egress((allow,)).problem_with(address) == "") is is_fine


def test_a_wrong_network_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="egress_allow: 'localhost' is not a network"):
        Egress(("localhost",))


def test_no_socket_is_made_for_a_refused_address() -> None:
    info = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("169.254.169.254", 80))

    with pytest.raises(EgressRefused, match=r"169\.254\.169\.254"):
        guarded_socket(Egress(contact="a@b.example"), info)


class StubResolver(AbstractResolver):
    """Answers with these addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0
            )
            for address in self.addresses
        ]

    async def close(self) -> None:
        pass


def test_a_name_with_only_private_addresses_is_refused() -> None:
    resolver = GuardedResolver(Egress(contact="c"), StubResolver("10.0.0.1", "127.0.0.1"))

    with pytest.raises(EgressRefused, match=r"inside\.example: will not connect to 10\.0\.0\.1"):
        asyncio.run(resolver.resolve("inside.example"))


def test_the_private_addresses_of_a_mixed_name_are_never_tried() -> None:
    resolver = GuardedResolver(Egress(contact="c"), StubResolver("10.0.0.1", "8.8.8.8"))

    found = asyncio.run(resolver.resolve("mixed.example"))

    assert [entry["host"] for entry in found] == ["8.8.8.8"]
    assert not resolver.is_opened("mixed.example")


def test_a_name_is_opened_when_all_its_addresses_are() -> None:
    resolver = GuardedResolver(Egress(("10.0.0.0/8",)), StubResolver("10.0.0.1"))

    asyncio.run(resolver.resolve("inside.example"))

    assert resolver.is_opened("inside.example")
    assert not resolver.is_opened("other.example")
