"""The handle of asynchronous operations, with torch.distributed's methods."""
import torch


class Work:
    """One or more operations under way.

    Tensors that they read or write belong to them until it is done, and are kept alive until then. What goes wrong
    with an operation is raised by wait() and by every later call on its group.
    """

    def __init__(self, works, result, finish=None):
        """works: _core.Work objects. result: the tensors that are written. finish: called once all have ended well."""
        self._works = works
        self._result = result
        self._finish = finish
        self._on_end = None

    def wait(self, timeout=None):
        """Returns True once all have ended. timeout (timedelta or seconds): TimeoutError when it has passed, and the
        operations go on; without one the group's own time-out ends them. Ctrl-C ends the wait, not the operations."""
        seconds = timeout.total_seconds() if hasattr(timeout, "total_seconds") else timeout or 0.0
        for work in self._works:
            work.wait(seconds)
        self._end()
        return True

    def _end(self):
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        told, self._on_end = self._on_end, None
        if told is not None:
            told()

    def is_completed(self):
        """Whether all have ended, well or not."""
        if not all(work.done() for work in self._works):
            return False
        if self.exception() is None:
            self._end()
        return True

    def is_success(self):
        """Whether all have ended well."""
        return self.is_completed() and self.exception() is None

    def exception(self):
        """What the first operation that failed raises in wait(); None while there is none."""
        for work in self._works:
            if work.done():
                try:
                    work.wait()
                except Exception as error:  # it is the answer
                    return error
        return None

    def source_rank(self):
        """The sender of a message that has been received, as a rank of all."""
        return self._works[0].peer

    def result(self):
        """The tensors that were written, in a list."""
        return list(self._result)

    def get_future(self):
        """A torch.futures.Future of result(). Waits: there is no thread of Python's that could complete it later."""
        future = torch.futures.Future()
        try:
            self.wait()
            future.set_result(self.result())
        except Exception as error:  # a future carries its error
            future.set_exception(error)
        return future
