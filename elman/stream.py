"""Stream: a layer that keeps its state from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from . import routing
from .functional import Input
from .layer import ElmanNetwork


class Stream(nn.Module):
    """A recurrent layer whose calls continue each other: each begins with the state that the last left.

    layer is any module with nn.RNN's call, (input, hx) -> (output, h_n), of one direction: Elman,
    ElmanNetwork, nn.RNN, nn.GRU, a model of your own. A call of the stream is the layer's without hx. Calls
    on the windows of a sequence give what one call on the whole sequence does.

    The state that is kept is h_n, detached from the graph: gradients reach back to the beginning of their
    own window and no further, which is truncated backpropagation through time. Nothing writes into an
    earlier state, so the backward passes of several windows may wait and run in any order.

    Training on long texts, whose rows end at different times:

    >>> import torch
    >>> from torch import nn
    >>> from elman import Elman, ElmanNetwork, Stream
    >>> rnn, head = Stream(Elman(input_size=5, hidden_size=16)), nn.Linear(16, 5)
    >>> parameters = [*rnn.parameters(), *head.parameters()]
    >>> optimizer = torch.optim.SGD(parameters, lr=0.1)
    >>> texts = torch.randint(5, (41, 3))                     # (time, batch)
    >>> for t in range(0, 40, 10):
    ...     characters = nn.functional.one_hot(texts[t : t + 10], 5).float()
    ...     h, _ = rnn(characters)                            # begins where the last window ended
    ...     loss = nn.functional.cross_entropy(head(h).flatten(0, 1), texts[t + 1 : t + 11].flatten())
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    ...     optimizer.step()
    ...     ended = torch.tensor([False, t == 20, False])     # these rows go on with a new text
    ...     rnn.reset(ended)

    Generation, one character a call:

    >>> network = Stream(ElmanNetwork(input_size=5, hidden_size=16, output_size=5, readout="identity"))
    >>> text = [0, 3, 1]
    >>> with torch.no_grad():
    ...     y, _ = network(nn.functional.one_hot(torch.tensor(text), 5).float())
    ...     for _ in range(20):
    ...         text.append(y[-1].softmax(0).multinomial(1).item())
    ...         y, _ = network(nn.functional.one_hot(torch.tensor(text[-1:]), 5).float())
    >>> len(text)
    23

    Rows that end within a window are `resets`'s matter, an option of Elman's call; it is handed on. Call
    reset() before other text, of a validation for instance, or give that to `stream.layer`.

    `state` is shaped as hx: (L, B, H), or (L, H) without a batch; None before the first call and after
    reset(), for zeros. It may be set, to begin from given values; gradients flow into a tensor that was
    set, but where the stream is static. It shares its memory with the h_n that the call returned. It moves
    and is cast with the module, is copied and pickled with it (for that, one that was set must be a leaf),
    and is neither a parameter nor a buffer: no state_dict holds it, and DistributedDataParallel, which gives
    every process the buffers of the first, leaves it alone.

    static: keep the state at one place in memory and write each new one there, as a CUDA graph needs, which
    reads and writes the addresses that it was captured with. The first call makes the state, so it comes
    before the capture; reset() and setting a state of that shape write there too, as copies. One more copy
    a call, with gradients two. `state = None`, or one of another shape, gives the place up, and with it
    the graphs that were captured.

    Rows of a PackedSequence keep the order they had before packing, and each row's state is that of its own
    last step. A row whose text is over can't be left out, as the state's rows are those of the batch: give
    it one step of anything and reset it.

    torch.compile takes a stream whole, one graph for the first call and one for the others. Compiled, a
    state of torch.inference_mode can't go on into training: use no_grad, or reset(). What runs a call twice,
    such as torch.utils.checkpoint, belongs inside the layer, not around the stream.
    """

    _state: Tensor | None

    def __init__(self, layer: nn.Module, *, static: bool = False) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer is a {type(layer).__name__}; expected a module such as elman.Elman")
        rnn = layer.rnn if isinstance(layer, ElmanNetwork) else layer
        if getattr(rnn, "bidirectional", False):
            raise ValueError(
                "layer is bidirectional; expected one direction: the reversed one begins with the last step, "
                "which a stream has not seen yet"
            )
        self.layer = layer
        self.static = static
        self._state = None
        # Where the batch is in a 3-D input, or None for a module that knows that only itself.
        self._batch_at = (0 if rnn.batch_first else 1) if isinstance(rnn, nn.RNNBase) else None

    @property
    def state(self) -> Tensor | None:
        return self._state

    @state.setter
    def state(self, value: Tensor | None) -> None:
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"state is a {type(value).__name__}; expected a torch.Tensor, or None for zeros")
        if value is None or not self.static:
            self._state = value
        else:
            self._write(value.detach())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state" and isinstance(value, nn.Parameter):
            value = value.view_as(value)  # a parameter of the model that owns it, not of the stream
        super().__setattr__(name, value)

    def forward(self, input: Input, **options: Any) -> tuple[Input, Tensor]:
        """input and options (such as `resets`) as the layer's. Returns output and h_n, as the layer does.

        RuntimeError where the input's batch size, dtype or device is not the state's.
        """
        if "hx" in options:
            raise TypeError("hx came with the call; expected none, it is the state: set stream.state = hx")
        state, layer = self._state, self.layer
        self._check_mode(input)
        if state is not None:
            self._check(input, state)
            if _is_sealed(state) or (self.static and torch.is_grad_enabled()):
                state = state.clone()  # for a graph to save: no inference tensor, nor what is written into
        result = layer(input, state, **options)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Tensor):
            raise TypeError(
                f"{type(layer).__name__} returned {_kinds(result)}; expected (output, h_n), with h_n one "
                "tensor, as nn.RNN returns"
            )
        h_n = result[1]
        if state is not None and h_n.shape != state.shape:
            raise RuntimeError(
                f"{type(layer).__name__} made h_n of shape {tuple(h_n.shape)} of a state of shape "
                f"{tuple(state.shape)}; expected one shape: {self._remedy()}"
            )
        if self.static:
            self._write(h_n.detach())
        else:
            object.__setattr__(self, "_state", h_n.detach())  # nn.Module's own is the slowest line here
        return result

    def reset(self, rows: Tensor | int | None = None) -> None:
        """The rows' state becomes zero; None for all rows: the next batch may have any size, unless static.

        rows: bool (B,), True for a row to reset; or int64 of any shape, their numbers; or one number.
        """
        state = self._state
        if rows is None:
            if self.static and state is not None:
                self._write(torch.zeros_like(state))
            else:
                self._state = None
            return
        if isinstance(rows, bool) or not isinstance(rows, (int, Tensor)):
            raise TypeError(
                f"rows is a {type(rows).__name__}; expected None, an int or a tensor, bool (B,) or int64: "
                "convert it with torch.tensor()"
            )
        if state is None:
            return
        if state.dim() != 3:
            raise RuntimeError(
                f"rows came for a state without a batch, shape {tuple(state.shape)}; expected none: reset() "
                "clears it"
            )
        B = state.shape[1]
        if isinstance(rows, Tensor) and rows.dtype == torch.bool:
            if rows.shape != (B,):
                raise RuntimeError(
                    f"rows is a mask of shape {tuple(rows.shape)}; expected {(B,)}, as the state has rows"
                )
            ended = rows.to(state.device)
        else:
            if isinstance(rows, Tensor):
                if rows.dtype != torch.int64:
                    raise TypeError(f"rows is {rows.dtype}; expected torch.bool or torch.int64")
                rows = rows.to(state.device)
            elif not -B <= rows < B:
                raise IndexError(f"rows is {rows}; expected {-B} to {B - 1}, as the state has {B} rows")
            ended = torch.zeros(B, dtype=torch.bool, device=state.device)
            ended[rows] = True
        # Out of place: an earlier window's graph may have saved the state.
        state = state.masked_fill(ended[:, None], 0)
        if self.static:
            self._write(state)
        else:
            self._state = state

    def extra_repr(self) -> str:
        return "static=True" if self.static else ""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stream:
        # As to a buffer: .to(), .cuda(), .half() and their like all come here.
        super()._apply(fn, recurse)
        if self._state is not None:
            self._state = fn(self._state)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "nn.DataParallel makes a copy of the stream for each call and drops it, with its state; expected "
            "one process for each device: use nn.parallel.DistributedDataParallel"
        )

    def _write(self, state: Tensor) -> None:
        """Puts a state where the last one is, or, where none of its shape is, in memory of its own."""
        kept = self._state
        if kept is None or (kept.shape, kept.device) != (state.shape, state.device):
            self._state = state.clone()
        elif _is_sealed(kept):
            with torch.inference_mode():  # who made it in inference mode can only write it there
                kept.copy_(state)
        else:
            kept.copy_(state)

    def _check_mode(self, input: Tensor | PackedSequence) -> None:
        """Raises where a state could not outlive the call."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() and (_TELLS or not torch.compiler.is_dynamo_compiling()):
                raise RuntimeError(_OUTSIDE.format("exported"))
            if self.static and torch.is_grad_enabled():
                # torch.compile saves the state and makes the clone again, after the state was written over.
                raise RuntimeError(
                    "the stream is static, compiled and training, which gives gradients of another state; "
                    "expected two of the three at most: compile stream.layer instead"
                )
        elif torch.jit.is_tracing() or isinstance(input, Proxy):
            raise RuntimeError(_OUTSIDE.format("traced"))
        elif torch._C._are_functorch_transforms_active():
            raise RuntimeError(_OUTSIDE.format("called within a transform of torch.func"))
        elif (self._state is None or not self.static) and _is_capturing(input):
            raise RuntimeError(
                f"the state is {'None' if self._state is None else 'not static'} while a CUDA graph is "
                "captured, which would begin with the same one at every replay; expected memory of its own: "
                "make it with Stream(layer, static=True) and call it once before the capture"
            )

    def _check(self, input: Tensor | PackedSequence, state: Tensor) -> None:
        """Raises unless the input goes with the state; a module that is not torch's or ours checks itself."""
        if self._batch_at is None or not isinstance(input, (Tensor, PackedSequence)):
            return
        data = input if isinstance(input, Tensor) else input.data
        rows = tuple(state.shape[1:-1])
        batch: tuple[int, ...]
        if data is input:
            batch = (data.shape[self._batch_at],) if data.dim() == 3 else ()
        elif torch.compiler.is_compiling():
            batch = rows  # a number that a graph does not have
        else:
            batch = (int(input.batch_sizes[0]),)  # type: ignore[union-attr]
        if rows != batch:
            raise RuntimeError(
                f"the input has {_batch(batch)} and the state of the call before {_batch(rows)}, shape "
                f"{tuple(state.shape)}; expected the same rows: {self._remedy()}"
            )
        if state.device != data.device:
            raise RuntimeError(
                f"the input is on {data.device} and the state of the call before on {state.device}; expected "
                f"one: move the stream with .to(), or {self._remedy()}"
            )
        if state.dtype != data.dtype and not routing.is_autocast(data.device.type):
            raise RuntimeError(
                f"the input is {data.dtype} and the state of the call before {state.dtype}; expected one "
                f"dtype: convert the stream with .to(), or {self._remedy()}"
            )

    def _remedy(self) -> str:
        return (
            "set stream.state = None first, and capture CUDA graphs anew"
            if self.static
            else "call stream.reset() first"
        )


# Of every graph that dynamo traces torch 2.11 says that it is exported; 2.12 was not tried. There a strict
# torch.export warns of side effects itself, and the state is lost.
_TELLS = torch.__version__ >= "2.13"  # not a comparison of texts: torch's class for versions
_OUTSIDE = (
    "the stream is {}, and the state of such a call does not stay; expected a plain call: use stream.layer "
    "there, with stream.state as its hx"
)


def _is_capturing(input: Tensor | PackedSequence) -> bool:
    # Only then: asking may make a context on a device that the process does not use.
    return getattr(input, "is_cuda", False) and torch.cuda.is_current_stream_capturing()


def _is_sealed(state: Tensor) -> bool:
    """Whether it was made in inference mode, which is over: no graph may save it, nothing write into it."""
    if torch.compiler.is_compiling():
        return False  # torch.compile can't ask; such a state fails loudly
    return state.is_inference() and not torch.is_inference_mode_enabled()


def _batch(batch: tuple[int, ...]) -> str:
    return f"a batch of {batch[0]}" if batch else "no batch"


def _kinds(result: object) -> str:
    kinds = [type(r).__name__ for r in result] if isinstance(result, tuple) else []
    return f"({', '.join(kinds)})" if kinds else f"a {type(result).__name__}"
