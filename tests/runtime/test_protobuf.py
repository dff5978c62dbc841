"""Messages as fields: what is read is what was written, and nothing is read past an end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_runtime.protobuf import BYTES, FIXED32, FIXED64, VARINT, fields, message, varint

contents = st.one_of(
    st.tuples(st.just(BYTES), st.binary(max_size=300)),
    st.tuples(st.just(FIXED32), st.binary(min_size=4, max_size=4)),
    st.tuples(st.just(FIXED64), st.binary(min_size=8, max_size=8)),
    st.tuples(st.just(VARINT), st.sampled_from([b"\x00", b"\x7f", b"\x80\x01", b"\xff\xff\x03"])),
)


@given(st.lists(st.tuples(st.integers(1, 5000), contents)))
def test_fields_come_back_as_they_were_written(
    written: list[tuple[int, tuple[int, bytes]]],
) -> None:
    parts = [(number, wire, value) for number, (wire, value) in written]
    assert list(fields(message(parts))) == parts


def test_message_of_the_specification_is_read() -> None:
    # The examples of protobuf.dev/programming-guides/encoding.
    assert list(fields(b"\x08\x96\x01\x12\x07testing")) == [
        (1, VARINT, b"\x96\x01"),
        (2, BYTES, b"testing"),
    ]
    assert varint(b"\x96\x01", 0) == (150, 2)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"\x12\x05test", "field 2 ends after its message"),
        (b"\x0d\x00\x00", "field 1 ends after its message"),
        (b"\x0b", "field 1 has wire type 3"),
    ],
)
def test_damaged_message_is_refused(encoded: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(fields(encoded))


def test_message_that_ends_within_a_number_is_refused() -> None:
    with pytest.raises(IndexError, match="out of range"):
        list(fields(b"\x08\x96"))
