"""The instructions, a family a module: how each is written as Python, and what it does when it runs."""

from .comparisons import Comparisons
from .copies import Copies, CopyOperations
from .floats import Floats
from .integers import Integers
from .lanes import LaneOperations, Lanes
from .matrices import Matrices, MatrixOperations
from .memory import Memory, MemoryOperations
from .moves import Moves
from .registers import poison, registers_of, uses
from .wgmma import Wgmma, WgmmaOperations

__all__ = ["Operations", "Writer", "poison", "registers_of", "uses"]


class Writer(Moves, Integers, Floats, Comparisons, Lanes, Memory, Copies, Matrices, Wgmma):
    """Writes the blocks of a program as Python."""


Writer.forms = {}
for _name in dir(Writer):
    for _op, _pattern in getattr(getattr(Writer, _name), "forms", ()) if _name != "forms" else ():
        Writer.forms.setdefault(_op, []).append((_pattern, _name))


class Operations(LaneOperations, MemoryOperations, CopyOperations, MatrixOperations, WgmmaOperations):
    """What a context of threads can do."""
