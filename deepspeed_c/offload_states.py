"""engine.offload_states and reload_states: states that a script puts aside, for generation between steps for example.

Everything lies in CPU memory already, so nothing moves and no bit changes. Invariant: what was put aside cannot be used
until reload_states(), as where it is in fact elsewhere, so that a script that forgets it fails here too.
"""
from .runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from .utils.logging import logger

# What a call needs.
EVERYTHING = frozenset(OffloadStateTypeEnum)
STATES = frozenset({OffloadStateTypeEnum.optim_states})
MASTERS = frozenset({OffloadStateTypeEnum.hp_params})
PARAMETERS = frozenset({OffloadStateTypeEnum.lp_params})
GRADIENTS = frozenset({OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer})


def _words(kind):
    return ", ".join(repr(item.value) for item in kind)


def _one(kind, value, argument):
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"offload_states: {argument} is {value!r}; allowed: {_words(kind)}") from None


class EngineOffload:
    """A base of DeepSpeedEngine, which has: _needs_core, _config."""

    _offloaded = frozenset()

    def offload_states(self, include=None, device=OffloadDeviceEnum.cpu, pin_memory=True, non_blocking=False):
        """Puts states aside until reload_states().

        include: members of OffloadStateTypeEnum or their names; None: all, except masters and optimizer states where
        zero_optimization.offload_optimizer keeps them elsewhere already. device: "cpu"; "none" does nothing but a
        warning. pin_memory, non_blocking: accepted, nothing is copied. Call it on all ranks. ValueError for other
        words and where offload_param keeps parameters elsewhere; RuntimeError without an optimizer.
        """
        self._needs_core("offload_states")
        device = _one(OffloadDeviceEnum, device, "device")
        kept = self._config.get("zero_optimization.offload_param.device")
        if kept != "none":
            raise ValueError(f"offload_states: zero_optimization.offload_param.device is {kept!r}; allowed: 'none'")
        if device is OffloadDeviceEnum.nvme:
            raise ValueError("offload_states: device is 'nvme'; allowed: 'cpu', 'none'")
        if include is None:
            wanted = EVERYTHING
        else:
            wanted = {_one(OffloadStateTypeEnum, item, "include") for item in
                      ([include] if isinstance(include, str) else include)}
        if device is OffloadDeviceEnum.none:
            logger.warning("offload_states: device is 'none', so nothing is put aside")
            return
        if self.zero_use_cpu_optimizer():
            wanted -= MASTERS | STATES
        self._offloaded = self._offloaded | wanted

    def reload_states(self, non_blocking=False):
        """Takes everything back that offload_states() put aside."""
        self._needs_core("reload_states")
        self._offloaded = frozenset()

    def _refuse_offloaded(self, call, needed):
        """RuntimeError where one of these states is put aside."""
        aside = self._offloaded & needed
        if aside:
            raise RuntimeError(f"{call}: offload_states() put {_words(sorted(aside))} aside; call reload_states() "
                               "first")
