"""The rendezvous port: free when it is chosen, and not chosen by two launchers at once."""
import contextlib
import errno
import socket


class PortTaken(ValueError):
    """The port is listened on, or another launcher has just chosen it."""


class Port:
    """A port for rank 0 to listen on. Until `release`, other launchers on this machine leave it alone."""

    def __init__(self, number):
        self.number = number
        self._claim = _claim(number)

    def release(self):
        self._claim.close()


def choose(asked, default):
    """(port, note): the port asked for, or the default, or a free one with a note for the user.

    PortTaken if the port that was asked for is in use.
    """
    if asked is not None:
        return Port(asked), None
    with contextlib.suppress(PortTaken):
        return Port(default), None
    while True:
        with contextlib.suppress(PortTaken), socket.socket() as probe:
            probe.bind(("", 0))
            number = probe.getsockname()[1]
            probe.close()
            return Port(number), f"port {default} is in use: the ranks meet at port {number} (--master_port chooses)"


def _claim(number):
    """Checks that nobody listens, and holds the number against other launchers.

    The hold is a name in the abstract Unix namespace, which the kernel drops with this process; it is scoped to the
    network namespace, as ports are. The port itself stays free for rank 0.
    """
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0deepspeed_c.port.{number}")
        _check_free(number)
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(f"--master_port {number} is in use on this machine: choose another, or leave the option "
                            "out and a free one is taken") from None
        raise
    return claim


def _check_free(number):
    """Binds as torch's store will, to every address, and lets go."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            probe = socket.socket(family)
        except OSError:
            continue  # a kernel without IPv6
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", number))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue
                raise
