"""Which kind of Home serves a communicator."""
from .shared import SharedHome

_KEYS = {"prefetch": "prefetch_bucket_size", "max_live": "max_live_parameters", "max_reuse": "max_reuse_distance"}
_DEFAULTS = {"prefetch": 50_000_000, "max_live": 1_000_000_000, "max_reuse": 1_000_000_000}


def _folder(config, device):
    """Where files of parameters go; None where parameters are in memory."""
    if device is None:
        device = "none" if config is None else config.get("zero_optimization.offload_param.device")
    if device != "nvme":
        return None
    folder = None if config is None else config.get("zero_optimization.offload_param.nvme_path")
    if not folder:
        raise ValueError("parameters go to files (device nvme) and zero_optimization.offload_param.nvme_path of the "
                         "configuration is not given; it names the folder for them")
    return folder


class Homes:
    """The Homes of parameters that are placed together, one for each communicator. config: a _core.Config, or None.
    device: in place of the configuration's offload_param.device."""

    def __init__(self, config=None, device=None):
        self._settings = dict(_DEFAULTS)
        if config is not None:
            self._settings = {name: config.get(f"zero_optimization.stage3_{key}") for name, key in _KEYS.items()}
        self._settings["folder"] = _folder(config, device)
        self._homes = {}

    def of(self, comm):
        """The Home of this communicator. Collective over its ranks where it is new."""
        if id(comm) not in self._homes:
            self._homes[id(comm)] = self._make(comm)
        return self._homes[id(comm)]

    def _make(self, comm):
        if comm.backend in ("self", "shm"):
            return SharedHome(comm, self._settings)
        from .remote import RemoteHome  # few need it

        return RemoteHome(comm, self._settings)

    def settle(self):
        """All ranks see the values of what was added. Collective."""
        for home in self._homes.values():
            home.settle()
