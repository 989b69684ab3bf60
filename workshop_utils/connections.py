"""This process's own TCP connections: on a rank they are gloo's, as Jupyter uses Unix sockets.

What each has carried, by the operating system's count, is the bytes on the wire of notebook 02. Closing them is how
`ranks` frees a rank that waits in a collective.
"""

import os
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress


def loopback_connections() -> Iterator[socket.socket]:
    """A duplicate of each connection within this machine. Each is closed again when the next is asked for."""
    for sock, peer in _connections():
        if peer == "::1" or peer.startswith(("127.", "::ffff:127.")):
            yield sock


def _connections() -> Iterator[tuple[socket.socket, str]]:
    """A duplicate of each connection, and the address at its other end. The connection itself stays open."""
    for name in os.listdir("/dev/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # closed since it was listed
        with sock:
            if peer := _peer(sock):
                yield sock, peer


def _peer(sock: socket.socket) -> str:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
        with suppress(OSError):  # a listener has no peer
            return sock.getpeername()[0]
    return ""


def connection_bytes() -> dict[int, tuple[int, int]] | None:
    """{inode: (bytes sent, bytes received)} of each connection; None where the system does not tell (not Linux)."""
    if not hasattr(socket, "TCP_INFO") or not os.path.isdir("/proc"):
        return None
    found = {}
    for sock, _ in _connections():
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        if len(info) < 216:
            return None  # a kernel before 4.19 does not tell
        # struct tcp_info in linux/tcp.h: tcpi_bytes_received; tcpi_notsent_bytes, which wait in the buffer;
        # tcpi_bytes_sent and tcpi_bytes_retrans. A byte that was sent again counts once.
        (received,), (waiting,) = struct.unpack_from("Q", info, 128), struct.unpack_from("I", info, 144)
        sent, sent_again = struct.unpack_from("QQ", info, 200)
        found[os.fstat(sock.fileno()).st_ino] = (sent - sent_again + waiting, received)
    return found
