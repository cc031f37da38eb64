"""Connections of the local page: its address, the names that it answers to, and how long a client may be idle."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from longtail.errors import LongtailError

HEADER_SECONDS = 15.0
"""A connection without a request is closed after once to twice this time."""
ANY_ADDRESS = "any address"
"""Among trusted hosts: whatever is an IP address and no name."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_UNSPECIFIED = ("0.0.0.0", "::")  # what a socket is bound to that listens at all addresses

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]@/]+)(?::\d*)?")  # with or without port

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def trusted_hosts(host: str) -> list[str]:
    """Return what a browser may call a server that listens at an address or name.

    At all addresses (``0.0.0.0``) these are the names of this machine and any IP address: no page from elsewhere can
    give itself an address of this machine for a name.
    """
    if host in _UNSPECIFIED:
        return [*_LOOPBACK, socket.gethostname().lower(), socket.getfqdn().lower(), ANY_ADDRESS]
    name = f"[{host}]" if ":" in host else host
    if name in _LOOPBACK or host.startswith("127."):
        return list(dict.fromkeys([name, *_LOOPBACK]))
    return [name.lower()]


class TrustedHosts:
    """ASGI middleware that answers requests to other hosts with 400, as Starlette's ``TrustedHostMiddleware`` does.

    That one knows no IPv6 addresses before version 1, and no set of all addresses. Requests that a browser sends for a
    page of another host are refused too, with 403: any page that a user visits can send an image here.

    Args:
        app: the application.
        hosts: with or without port, IPv6 addresses in brackets; :data:`ANY_ADDRESS` stands for every address.
    """

    def __init__(self, app: _App, hosts: Sequence[str]) -> None:
        named = [(host.lower(), _HOST.fullmatch(host.lower())) for host in hosts]
        self.app, self.hosts = app, [host if matched is None else matched[1] for host, matched in named]

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer a request."""
        if scope["type"] in {"http", "websocket"} and not self._trusts(scope):
            from starlette.responses import JSONResponse

            names = ", ".join(self.hosts)
            refusal = JSONResponse(
                {"error": f"the host name: is not one that this server was started for: {names}"}, 400
            )
            await refusal(scope, receive, send)
            return
        if scope["type"] in {"http", "websocket"} and not self._is_own_page(scope):
            from starlette.responses import JSONResponse

            await JSONResponse({"error": "the request: comes from a page of another host"}, 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_own_page(self, scope: _Message) -> bool:
        """Return whether a request comes from a page of this server, or from no page."""
        headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        if b"origin" not in headers:
            return True
        origin = headers[b"origin"].partition("://")[2]
        matched = _HOST.fullmatch(origin)
        # behind a reverse proxy, Host may be the name by which it reaches this server
        return matched is not None and (origin == headers[b"host"] or matched[1] in self.hosts)

    def _trusts(self, scope: _Message) -> bool:
        named = [value for name, value in scope["headers"] if name == b"host"]
        if len(named) != 1:
            return False
        matched = _HOST.fullmatch(named[0].decode("latin-1").lower())
        if matched is None:
            return False
        host = matched[1]
        if host in self.hosts:
            return True
        if ANY_ADDRESS not in self.hosts:
            return False
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True


def reaping_protocol() -> Any:
    """Return uvicorn's HTTP protocol, with connections closed whose request does not begin or whose header never ends.

    Uvicorn has a time limit between two requests only.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ReapingProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._idle_since: Any = None
            self._reaper = self.loop.call_later(HEADER_SECONDS, self._reap, False)

        def _reap(self, was_idle: bool) -> None:
            cycle = self.cycle
            idle = cycle is None or cycle.response_complete
            if idle and was_idle and self._idle_since is cycle:
                self.transport.close()
                return
            self._idle_since = cycle
            self._reaper = self.loop.call_later(HEADER_SECONDS, self._reap, idle)

        def connection_lost(self, exc: Exception | None) -> None:
            self._reaper.cancel()
            super().connection_lost(exc)

    return ReapingProtocol


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        LongtailError: the address is empty, not this machine's or no name at all, or the port is taken.
    """
    if not host:  # which the system takes for all addresses
        raise LongtailError(
            "--host: is empty, expected an address or a name of this machine, or 0.0.0.0 for all of them"
        )
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # clients that connect as soon as the address is printed wait instead of being refused
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # the last two: a name that IDNA cannot encode
        listening.close()
        raise LongtailError(f"--host {host} --port {port}: cannot be listened at: {error}") from None
    return listening


def is_local(listening: socket.socket) -> bool:
    """Return whether a socket listens at a loopback address, which other machines do not reach."""
    return ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def own_addresses(listening: socket.socket) -> list[str]:
    """Return the addresses at which a socket listens; of all addresses those that this machine's name and its route to
    other networks show, without loopback.
    """
    bound: str = listening.getsockname()[0]
    if bound not in _UNSPECIFIED:
        return [bound]
    families = [listening.family]
    if listening.family == socket.AF_INET6 and not listening.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        families.append(socket.AF_INET)
    addresses: list[str] = []
    for family in families:
        with contextlib.suppress(OSError):  # the machine's name need not resolve
            entries = socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)
            addresses += [str(address[0]) for *_, address in entries]
        # a datagram socket that is connected sends nothing, and has the address that packets to there would come from;
        # these two are reserved for documentation
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as route:
            route.connect(("2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1", 9))
            addresses.append(route.getsockname()[0])
    # a browser does not take a link-local IPv6 address
    parsed = [(each, ipaddress.ip_address(each.partition("%")[0])) for each in dict.fromkeys(addresses)]
    return [each for each, address in parsed if not (address.is_loopback or address.is_link_local)]


def url(address: str, port: int) -> str:
    """Return the URL of an address or name."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
