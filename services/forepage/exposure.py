"""Whether a listener can be reached from elsewhere: what is open to a network is said at the start."""

import ipaddress

import structlog


def is_loopback(listen: str) -> bool:
    """Whether only this host reaches `host:port`, or `host`."""
    host = listen.rpartition(":")[0] if listen.count(":") == 1 or "]" in listen else listen
    host = host.strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warn_if_open(listen: str, *, lacks: str | None) -> None:
    """Log a warning for a listener that others reach and that lacks a guard; None: it lacks none."""
    if lacks is not None and not is_loopback(listen):
        structlog.get_logger("forepage").warning(
            "open to the network: whoever reaches this address is let in", listen=listen, lacks=lacks
        )
