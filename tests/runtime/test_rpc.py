from __future__ import annotations

import pickle
import socket
import threading
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutset.compiler.ir.errors import InfeasibleError
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.program import Register, Send
from cutset.compiler.ir.types import DTYPE_NAMES, TensorType
from cutset.runtime.rpc import Channel, ConnectionLost, decode, encode

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=10,
)


def travelled(message: object) -> object:
    return decode(b"".join(encode(message)))


@given(PLAIN)
def test_plain_data(message: object) -> None:
    assert travelled(message) == message


@given(SHAPES, st.sampled_from(list(DTYPE_NAMES)), st.booleans())
def test_tensors(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    tensor = tensor.permute(tuple(reversed(range(tensor.ndim)))) if transposed else tensor
    result = travelled({"x": [tensor]})["x"][0]  # type: ignore[index]
    assert (result.dtype, result.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(result, tensor)


def test_special_tensors() -> None:
    complex_view = torch.tensor([1 + 2j, 3j]).conj()
    negative_view = torch.tensor([1 + 2j]).conj().imag
    parameter = torch.nn.Parameter(torch.ones(2))
    meta = torch.empty(3, 10**9, device="meta", dtype=torch.bfloat16)
    a, b, c, d = travelled([complex_view, negative_view, parameter, meta])  # type: ignore[misc]
    assert torch.equal(a, complex_view)
    assert torch.equal(b, negative_view)
    assert torch.equal(c, parameter)
    assert (d.device.type, d.dtype, d.shape) == ("meta", torch.bfloat16, (3, 10**9))


def test_one_tensor_stays_one() -> None:
    tied = torch.randn(3)
    result = travelled({"a": tied, "b": tied, "c": tied.clone()})
    assert result["a"] is result["b"]  # type: ignore[index]
    assert result["a"] is not result["c"]  # type: ignore[index]


def test_values_of_the_compiler_and_of_torch() -> None:
    send = Send(Register("h", 1), 2, 3, TensorType((4,), torch.bfloat16))
    values = [send, torch.float16, torch.device("cuda", 1), OrderedDict(a=1), {1}]
    assert travelled(values) == values


def test_errors_keep_their_parts() -> None:
    error = travelled(InfeasibleError("too big", where="stage 1", ways_out=("buy",)))
    assert isinstance(error, InfeasibleError)
    assert (error.cause, error.where, error.ways_out) == ("too big", "stage 1", ("buy",))


@pytest.mark.parametrize("value", [print, threading.Thread, eval])
def test_code_does_not_travel(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="does not travel"):
        travelled(value)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit",)


def test_pickled_calls_are_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="exec does not travel"):
        travelled(Malicious())


def test_names_reached_through_a_module_of_ours_are_refused() -> None:
    body = b"\x80\x04\x8c\x17cutset.runtime.launcher\x8c\x09os.system\x93."
    message = len(b"[]").to_bytes(8, "little") + len(body).to_bytes(8, "little") + b"[]" + body
    with pytest.raises(pickle.UnpicklingError, match="does not travel"):
        decode(message)


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match="only dense"):
        encode(torch.eye(3).to_sparse())


def test_truncated() -> None:
    with pytest.raises(pickle.UnpicklingError, match="truncated"):
        decode(b"".join(encode(torch.ones(4)))[:-1])


class TestChannel:
    def test_messages_keep_their_order_and_size(self) -> None:
        near, far = map(Channel, socket.socketpair())
        big = torch.arange(3_000_000)
        messages = [1, big, "two", [big[:10], big[:0]]]
        sender = threading.Thread(target=lambda: [near.send(item) for item in messages])
        sender.start()
        received = [far.recv(10.0) for _ in messages]
        sender.join()
        assert (received[0], received[2]) == (1, "two")
        assert torch.equal(received[1], big)
        assert torch.equal(received[3][0], big[:10])
        assert received[3][1].shape == (0,)

    def test_other_end_closed(self) -> None:
        near, far = map(Channel, socket.socketpair())
        far.close()
        with pytest.raises(ConnectionLost):
            near.recv()
        with pytest.raises(ConnectionLost):
            near.send(torch.ones(1 << 20))

    def test_closed_in_the_middle_of_a_message(self) -> None:
        left, right = socket.socketpair()
        left.sendall(b"".join(encode("hello"))[:-2])
        left.close()
        with pytest.raises(ConnectionLost, match="closed by the other end"):
            Channel(right).recv()

    def test_limits(self) -> None:
        near, _far = map(Channel, socket.socketpair())
        with pytest.raises(TimeoutError):
            near.recv(0.01)
        with pytest.raises(TimeoutError):
            near.send(torch.ones(10_000_000), 0.01)

    def test_undecodable_message_is_consumed(self) -> None:
        near, far = map(Channel, socket.socketpair())
        near.send([print, torch.ones(3)])
        near.send("next")
        with pytest.raises(pickle.UnpicklingError):
            far.recv()
        assert far.recv() == "next"


def test_enums_travel_by_value() -> None:
    """Whatever this release of Python would pickle an enum as."""
    pickled = b"".join(bytes(part) for part in encode({"mode": Mode.TRAIN}))
    assert b"getattr" not in pickled
