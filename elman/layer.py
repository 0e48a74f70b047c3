"""The modules: Elman for nn.RNN, ElmanCell for nn.RNNCell, ElmanNetwork for the network with an output."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .functional import Input, check_option, elman, elman_step
from .routing import check_name

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


class Elman(nn.RNNBase):
    """nn.RNN with the same arguments, parameters, results and errors, and a choice of backends.

        h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)        act = tanh or relu

    The arguments are nn.RNN's; backend (one of elman.routing.NAMES, "auto" by default) is one more. A
    state_dict moves both ways. Parameters, for layer k and with the suffix _reverse for the reversed
    direction: weight_ih_lk (H, I or D * H), weight_hh_lk (H, H), bias_ih_lk (H,), bias_hh_lk (H,),
    drawn from U(-1/sqrt(H), 1/sqrt(H)).

    Errors have nn.RNN's types; BackendUnavailableError is raised by the first call, not here.
    """

    nonlinearity: str
    backend: str
    _flat_weights_are_assigned = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        **unsupported: Any,
    ) -> None:
        if "proj_size" in unsupported:
            raise ValueError("proj_size is an option of nn.LSTM alone; leave it out, as with nn.RNN")
        if unsupported:
            raise TypeError(f"Elman has no option {', '.join(unsupported)}; see help(elman.Elman)")
        check_option("nonlinearity", nonlinearity, tuple(MODES))
        if not isinstance(num_layers, Integral):
            raise TypeError(f"num_layers is a {type(num_layers).__name__}; expected an int")
        # NumPy's bool, which is no subclass of Python's, is named "bool" too, or "bool_" before NumPy 2.
        if type(bidirectional).__name__ not in ("bool", "bool_"):
            raise TypeError(f"bidirectional is a {type(bidirectional).__name__}; expected a bool")
        check_name(backend)
        # nn.RNNBase, not nn.RNN: torch.compile refuses nn.RNN's subclasses.
        super().__init__(
            MODES[nonlinearity],
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bool(bidirectional),
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity
        self.backend = backend
        take_for_torch_s(self)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        take_for_torch_s(self)  # pickled by an elman that did not

    def forward(
        self, input: Input, hx: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Input, Tensor]:
        """input (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence of any order.

        hx (L * D, B, H), (L * D, H) unbatched, or None for zeros. resets bool (T, B), (B, T) with
        batch_first, (T,) unbatched, or None: where True, a row begins anew at that step, its state before
        it zero; see `elman.elman`. Returns output, of the input's kind with D * H in place of I, and h_n,
        shaped as hx.
        """
        if self._flat_weights_are_assigned:
            self._update_flat_weights()  # as nn.RNN does: a parameter set since then ends the assignment
            weights: list[Any] = list(self._flat_weights)
        else:
            # By name and at every call: a parametrization or functional_call puts other tensors there.
            own = self._parameters
            weights = [own[n] if n in own else getattr(self, n) for n in self._flat_weights_names]
        return elman(
            input,
            hx,
            weights,
            num_layers=self.num_layers,
            bias=self.bias,
            nonlinearity=self.nonlinearity,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            resets=resets,
            backend=self.backend,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_flat_weights":
            # nn.RNN computes with what was assigned. Where a name has no parameter (a parametrization, a
            # replica), nn.RNNBase's own methods assign something else too.
            parameters = [self._parameters.get(n) for n in self._flat_weights_names]
            self._flat_weights_are_assigned = len(value) != len(parameters) or any(
                p is not None and w is not p for w, p in zip(value, parameters, strict=True)
            )

    def __prepare_scriptable__(self) -> Any:
        raise _not_scriptable(self, "nn.RNN")

    def extra_repr(self) -> str:
        nonlinearity = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}"
        return super().extra_repr() + nonlinearity + _backend_repr(self.backend)


class ElmanCell(nn.RNNCellBase):
    """nn.RNNCell with the same arguments, parameters, results and errors: one step a call.

        h' = act(W_ih x + b_ih + W_hh h + b_hh)

    Parameters: weight_ih (H, I), weight_hh (H, H), bias_ih (H,), bias_hh (H,). backend as Elman's.

    quantize_dynamic, which replaces an nn.RNNCell, does not know this class and leaves it in float.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        check_name(backend)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity
        self.backend = backend
        take_for_torch_s(self)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        take_for_torch_s(self)  # pickled by an elman that did not

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, I) or (I,), hx (B, H) or (H,) or None for zeros -> h', shaped as hx."""
        if self.nonlinearity not in tuple(MODES):
            raise RuntimeError(f"nonlinearity is {self.nonlinearity!r}; expected 'tanh' or 'relu'")
        # By name, as a parametrization puts other tensors there; the module's own dict is the quick way.
        own = self._parameters
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        weights: list[Any] = [own[n] if n in own else getattr(self, n) for n in names]
        return elman_step(input, hx, *weights, nonlinearity=self.nonlinearity, backend=self.backend)

    def __prepare_scriptable__(self) -> Any:
        raise _not_scriptable(self, "nn.RNNCell")

    def extra_repr(self) -> str:
        return super().extra_repr() + _backend_repr(self.backend)


READOUTS = {"tanh": torch.tanh, "identity": None, "none": None}


class ElmanNetwork(nn.Module):
    """The network of Elman's paper: the recurrence and an output that reads the state.

        h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        y_t = readout(W_y h_t + b_y)

    output_size is the size O of y. readout: "tanh", or "identity" for the affine map alone ("none" and
    None mean the same). The other options are Elman's. `rnn` is the Elman inside, `output` the
    nn.Linear(D * H, O). Source: J. L. Elman, Finding Structure in Time, Cognitive Science 14 (1990).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        readout: str | None = "tanh",
        **options: Any,
    ) -> None:
        if readout is not None and readout not in tuple(READOUTS):
            raise ValueError(f"readout is {readout!r}; expected 'tanh', 'identity' or None")
        if not isinstance(output_size, int):
            raise TypeError(f"output_size is a {type(output_size).__name__}; expected an int")
        if output_size < 1:
            raise ValueError(f"output_size is {output_size}; expected at least 1")
        super().__init__()
        self.rnn = Elman(input_size, hidden_size, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.output = nn.Linear(
            directions * hidden_size,
            output_size,
            device=options.get("device"),
            dtype=options.get("dtype"),
        )
        self.readout = readout or "none"

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """input and resets as Elman's, or (I,) and () for one step; hx as Elman's, for one step also (H,) if
        L * D = 1.

        Returns y, of the input's kind with O in place of I, and h_n, shaped as hx: hand it to the next
        call to carry the state on. One step without hx gives h_n (H,), or (L * D, H) if L * D > 1.
        """
        if isinstance(input, PackedSequence):
            h, h_n = self.rnn(input, hx, resets)
            return PackedSequence(self._read(h.data), *h[1:]), h_n
        if not isinstance(input, Tensor) or input.dim() != 1:
            h, h_n = self.rnn(input, hx, resets)
            return self._read(h), h_n
        flat = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1) == 1 and (
            hx is None or (isinstance(hx, Tensor) and hx.dim() == 1)
        )
        if isinstance(resets, Tensor) and resets.dim() == 0:
            resets = resets.unsqueeze(0)
        h, h_n = self.rnn(input.unsqueeze(0), hx.unsqueeze(0) if flat and hx is not None else hx, resets)
        return self._read(h[0]), h_n[0] if flat else h_n

    def _read(self, h: Tensor) -> Tensor:
        y, readout = self.output(h), READOUTS[self.readout]
        return y if readout is None else readout(y)

    def extra_repr(self) -> str:
        return f"readout={self.readout!r}"


def take_for_torch_s(module: nn.Module) -> None:
    """Has torch.fx's tracers make one node of the module, as of nn.RNN, and run its hooks once.

    They ask the module, not its class, whether it is torch.nn's. Traced into, the graph would keep the mode
    of today, and so the dropout, for good. In the module's own dict, copies and pickles have it too.
    """
    vars(module)["__module__"] = nn.RNN.__module__


def _not_scriptable(module: nn.Module, original: str) -> RuntimeError:
    """What torch.jit.script raises, which asks each module for a `__prepare_scriptable__`.

    One that returned an nn.RNN would leave that in the caller's model: torch.jit.script puts it there.
    """
    return RuntimeError(
        f"torch.jit.script came to an {type(module).__name__}, which TorchScript can't compile; expected "
        "torch.export.export, torch.compile or torch.jit.trace: use one of these, or script the model with "
        f"{original} in its place, which loads this one's state_dict"
    )


def _backend_repr(backend: str) -> str:
    return "" if backend == "auto" else f", backend={backend!r}"
