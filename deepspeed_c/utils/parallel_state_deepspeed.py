"""Named parallel states, their making from a configuration, and a function for each getter of one.

A module of such functions has the interface of an mpu, like a ParallelState; what it says is the current instance's.
"""
from .._core import Config
from .parallel_state import ParallelState

__all__ = ["ParallelState", "get_current_parallel_state", "get_parallel_state", "get_parallel_state_instance",
           "initialize_parallel_state_from_config", "set_current_parallel_state"]

_instances = {}  # name, None for the default one -> ParallelState
_current = None  # the name of the instance that getters without a name ask


def get_parallel_state_instance(name=None):
    """The instance of this name, made if there is none yet; None: the default one."""
    if name not in _instances:
        _instances[name] = ParallelState(name)
    return _instances[name]


def get_current_parallel_state():
    """The instance that getters without a name ask: the default one, unless set_current_parallel_state says another."""
    return get_parallel_state_instance(_current)


def get_parallel_state(name=None):
    """The instance of this name, or the current one."""
    return get_current_parallel_state() if name is None else get_parallel_state_instance(name)


class set_current_parallel_state:
    """Makes an instance the current one, at once; as a context manager until its end. name: None is the default one.

    One for the whole process: autograd's threads ask the same getters.
    """

    def __init__(self, name=None):
        global _current
        self._name, self._before, _current = name, _current, name

    def __enter__(self):
        global _current
        _current = self._name
        return get_current_parallel_state()

    def __exit__(self, *exception):
        global _current
        _current = self._before


def initialize_parallel_state_from_config(
        config, name=None, tensor_model_parallel_size=None, pipeline_model_parallel_size=None,
        virtual_pipeline_model_parallel_size=None, pipeline_model_parallel_comm_backend=None,
        context_parallel_size=None, hierarchical_context_parallel_sizes=None, expert_model_parallel_size=None,
        num_distributed_optimizer_instances=None, expert_tensor_parallel_size=None, sequence_parallel_size=None,
        nccl_communicator_config_path=None, distributed_timeout_minutes=None, order=None,
        create_gloo_process_groups=None, high_priority_stream_groups=None):
    """The ParallelState that a configuration asks for, for initialize(mpu=...). Collective over all ranks.

    config: a dict, a path, JSON text, or a parsed configuration (an object with `source` or `_param_dict`). Its
    top-level keys have the arguments' names; tensor_parallel.autotp_size is tensor_model_parallel_size too. An
    argument wins over the configuration, which wins over the defaults of ParallelState.initialize_model_parallel.
    name: of the instance; one that is initialised already is returned as it is.

    Raises what initialize_model_parallel raises; DeepSpeedConfigError for the configuration, and where it gives the
    same ranks two sizes.
    """
    given = {key: value for key, value in locals().items() if value is not None and key not in ("config", "name")}
    state = get_parallel_state_instance(name)
    if not state.is_initialized():
        state.initialize_model_parallel(**{**_asked_of(Config(_source_of(config), 0, {})), **given})
    return state


def _source_of(config):
    """What _core.Config reads."""
    for name in ("source", "_param_dict"):
        if isinstance(getattr(config, name, None), dict):
            return getattr(config, name)
    return config


_KEYS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
         "context_parallel_size", "sequence_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
         "num_distributed_optimizer_instances", "distributed_timeout_minutes", "order", "create_gloo_process_groups",
         "data_parallel_size")


def _asked_of(config):
    """Arguments of initialize_model_parallel that a configuration gives."""
    asked = {key: config.get(key) for key in _KEYS if config.given(key)}
    if config.given("tensor_parallel.autotp_size"):
        asked.setdefault("tensor_model_parallel_size", config.get("tensor_parallel.autotp_size") or 1)
    return asked


# ---- a function for each method of a ParallelState ----

def _forward(method):
    def forward(name=None, *options, **named):
        return getattr(get_parallel_state(name), method)(*options, **named)

    def of_group(group_name=None, name=None):
        return getattr(get_parallel_state(name), method)(*(() if group_name is None else (group_name,)))

    def put(value, name=None):
        getattr(get_parallel_state(name), method)(value)

    function = put if method.startswith("set_") else of_group if method.startswith("_") else forward
    function.__name__ = function.__qualname__ = method
    function.__doc__ = f"{getattr(ParallelState, method).__doc__} name: of the instance; None: the current one."
    return function


for _method in vars(ParallelState):
    if _method.startswith(("get_", "set_", "_get_", "is_initialized")):
        globals()[_method] = _forward(_method)
        __all__.append(_method)
del _method
