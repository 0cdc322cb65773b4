"""Files that are whole or not there: made under another name beside it, synced, renamed."""
import contextlib
import os


@contextlib.contextmanager
def made_aside(path):
    """The name to write `path`'s new bytes to; after the block the file has its own name, on the disk, in place of one
    that was there, or where the block raised it is gone and that one is there still. OSError."""
    folder, name = os.path.split(os.path.abspath(path))
    aside = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        yield aside
        _sync(aside)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    _sync(folder)


def _sync(path):
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)
