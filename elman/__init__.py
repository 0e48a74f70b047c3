"""Elman RNN layers: nn.RNN's drop-in replacement on Triton, cuDNN or plain torch.

>>> from elman import Elman
>>> layer = Elman(input_size=64, hidden_size=128)      # nn.RNN's arguments, parameters and results
"""

from torch.serialization import add_safe_globals

from . import reference
from .errors import DeviceHangError, synchronize
from .functional import elman, elman_step
from .initialization import initialize
from .layer import Elman, ElmanCell, ElmanNetwork
from .routing import BackendUnavailableError, Route, available_backends, explain, use_backend
from .stream import Stream
from .swap import replace

__all__ = [
    "BackendUnavailableError",
    "DeviceHangError",
    "Elman",
    "ElmanCell",
    "ElmanNetwork",
    "Route",
    "Stream",
    "available_backends",
    "elman",
    "elman_step",
    "explain",
    "initialize",
    "reference",
    "replace",
    "synchronize",
    "use_backend",
]

# For torch.load of a whole module, whose default is weights_only=True: these hold tensors and options alone.
add_safe_globals([Elman, ElmanCell, ElmanNetwork, Stream])

__version__ = "0.1.0"
