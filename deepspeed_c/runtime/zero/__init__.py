"""deepspeed.zero: parameter sharding as scripts enter it."""
from deepspeed_c import _paths

from .partition_parameters import GatheredParameters, Init, register_external_parameter

__all__ = ["GatheredParameters", "Init", "register_external_parameter"]
__getattr__, __dir__ = _paths.attributes(__name__)
