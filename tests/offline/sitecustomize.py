"""Block the network in every Python process that has this folder on PYTHONPATH; tests/conftest.py puts it there.

Unix sockets and the loopback range stay open: Jupyter talks to its kernels over them.
"""

import ipaddress
import socket


def _allowed(address: object) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = address[0]
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse(address: object) -> None:
    if not _allowed(address):
        raise OSError(f"the network is blocked in tests: {address}")


class _Socket(socket.socket):
    def connect(self, address):
        _refuse(address)
        return super().connect(address)

    def connect_ex(self, address):
        _refuse(address)
        return super().connect_ex(address)


_getaddrinfo = socket.getaddrinfo


def _lookup(host, *args, **kwargs):
    _refuse((host.decode() if isinstance(host, bytes) else host or "",))
    return _getaddrinfo(host, *args, **kwargs)


socket.socket = _Socket
socket.getaddrinfo = _lookup
