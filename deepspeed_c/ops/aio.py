"""`AsyncIOBuilder`, by which scripts and tests find out whether states can be offloaded to files. They always can: the
core moves the bytes itself (`csrc/file_io.h`), by io_uring or by threads, and nothing is built.
"""


class AsyncIOBuilder:
    """DeepSpeed's builder of its library for asynchronous I/O, without the library."""

    NAME = "async_io"

    def is_compatible(self, verbose=False):
        """Whether files can be read and written asynchronously here: True. verbose: accepted."""
        return True

    def load(self, verbose=True):
        """NotImplementedError: DeepSpeed's library with `aio_handle` is not there."""
        raise NotImplementedError("AsyncIOBuilder.load: aio_handle is not yet; offload to \"nvme\" works without it")
