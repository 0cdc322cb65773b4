"""Training in 16 bits, seen from Python: the loss scaler."""
from deepspeed_c import _paths

__getattr__, __dir__ = _paths.attributes(__name__)
