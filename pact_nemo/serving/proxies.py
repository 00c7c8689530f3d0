"""Which requests go through the proxy that the environment names, and what to say when one is in the way.

Chat endpoints (teachers, evaluated servers) may be out on the internet: they are asked through the proxy, unless their
address is this machine's or a private one. Rollout servers are never asked through one: token ids, log-probs and
weights of every step are no traffic for it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import urllib.request
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Proxy:
    """A proxy of the environment.

    Attributes:
        url: its address; may hold a password, so it is never shown.
        variable: the environment variable that names it.
    """

    url: str
    variable: str

    def __str__(self) -> str:
        parts = urlsplit(self.url if "//" in self.url else f"//{self.url}")
        try:
            port = f":{parts.port}" if parts.port else ""
        except ValueError:
            port = ""
        return f"{parts.hostname or 'without a host'}{port} ({self.variable})"


def named_proxy(url: str) -> Proxy | None:
    """The proxy that the environment names for an address of this scheme, ``no_proxy`` aside."""
    scheme = urlsplit(url).scheme.lower()
    for kind in (scheme, "all"):
        found = urllib.request.getproxies().get(kind)
        if found:
            variable = next(
                (name for name in (f"{kind}_proxy", f"{kind}_proxy".upper()) if os.environ.get(name)),
                "the system's settings",
            )
            return Proxy(found, variable)
    return None


def proxy_for(url: str) -> Proxy | None:
    """The proxy that a chat endpoint is asked through; None: directly, as ``no_proxy`` says or because the address is
    near.
    """
    proxy, host = named_proxy(url), urlsplit(url).hostname or ""
    return None if proxy is None or urllib.request.proxy_bypass(host) or near(host) else proxy


def near(host: str) -> bool:
    """Whether a host is this machine or of a private network: no proxy leads there. A name that can't be looked up is
    far.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_global
    except ValueError:
        pass
    try:
        found = {str(row[4][0]).partition("%")[0] for row in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(not ipaddress.ip_address(address).is_global for address in found)


def opener(url: str, *handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """Asks ``url`` through :func:`proxy_for`'s proxy, or directly."""
    proxy = proxy_for(url)
    through = urllib.request.ProxyHandler({} if proxy is None else {urlsplit(url).scheme.lower(): proxy.url})
    return urllib.request.build_opener(through, *handlers)


def in_between(url: str) -> str:
    """For the error of a request that went through a proxy: which one, and how to go without. Empty where it went
    directly.
    """
    proxy = proxy_for(url)
    if proxy is None:
        return ""
    return (
        f"; the request went through the proxy {proxy}: to ask directly, set no_proxy={urlsplit(url).hostname}, else"
        " see to the proxy"
    )


def left_aside(url: str) -> str:
    """For the error of a rollout server that is not of this machine: it isn't asked through the proxy that the
    environment names.
    """
    proxy, host = named_proxy(url), urlsplit(url).hostname or ""
    if proxy is None or host == "localhost" or host.startswith("127.") or host == "::1":
        return ""
    return (
        f" (rollout servers are asked directly, not through the proxy {proxy}: it has to be reachable from this machine"
        " without one)"
    )
