"""COPY in PostgreSQL's binary form, from and to numpy arrays: no row and no number passes through Python or text.

A row on the wire is a field count, then for each field its length and its big-endian bytes (PostgreSQL manual, COPY,
"Binary Format"). A structured numpy array with that layout is the message; fields that are NULL lose their bytes.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from psycopg2 import sql
from sqlalchemy import Connection, Table

Kind = Literal["time", "double", "real", "smallint", "boolean"]
_DTYPES: dict[Kind, str] = {"time": ">i8", "double": ">f8", "real": ">f4", "smallint": ">i2", "boolean": "?"}

# What a reader gets for NULL.
_NULLS: dict[Kind, str] = {
    "time": "'-infinity'",
    "double": "'NaN'",
    "real": "'NaN'",
    "smallint": "0",
    "boolean": "false",
}

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"
_EPOCH_MS = 946_684_800_000  # PostgreSQL counts microseconds from 2000-01-01
_CHUNK_ROWS = 16_384


@dataclass(frozen=True)
class Block:
    """Neighbouring columns of one kind."""

    names: tuple[str, ...]
    kind: Kind


def copy_in(
    connection: Connection,
    table: str,
    text_columns: Sequence[tuple[str, str]],
    blocks: Sequence[Block],
    arrays: Sequence[np.ndarray],
    nulls: Sequence[np.ndarray | None],
) -> None:
    """Appends rows to a table within the connection's transaction.

    `text_columns` hold one text for all rows (name, text). Each array is [n] or [n, columns of its block]; `nulls` has
    the shape of its array, or [n] for whole rows of a block, True where NULL is stored. Times are milliseconds.
    """
    names = [name for name, _ in text_columns] + [name for block in blocks for name in block.names]
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, names))
    )
    texts = [text.encode() for _, text in text_columns]
    with _cursor(connection) as cursor:
        cursor.copy_expert(statement, _Stream(_encode(texts, blocks, arrays, nulls)), size=1 << 20)


def copy_out(
    connection: Connection,
    table: Table,
    keys: Mapping[str, str],
    blocks: Sequence[Block],
    start_ms: int | None = None,
    end_ms: int | None = None,
) -> list[np.ndarray]:
    """Rows with these keys by rising `open_time`, from `start_ms` up to but without `end_ms`: an array for each block.

    Arrays are [n] for one column, else [n, columns]; NULL becomes NaN, 0 or False. All but times are views of the
    message in its byte order: the caller copies them once, into the type that it wants.
    """
    columns = [
        sql.SQL("coalesce({}, {}::{})").format(
            sql.Identifier(name), sql.SQL(_NULLS[block.kind]), sql.SQL(table.c[name].type.compile(connection.dialect))
        )
        if table.c[name].nullable
        else sql.Identifier(name)
        for block in blocks
        for name in block.names
    ]
    conditions = [sql.SQL("{} = {}").format(sql.Identifier(name), sql.Literal(key)) for name, key in keys.items()]
    for operator, time_ms in ((">=", start_ms), ("<", end_ms)):
        if time_ms is not None:
            conditions.append(
                sql.SQL("open_time {} to_timestamp({}::double precision)").format(
                    sql.SQL(operator), sql.Literal(int(time_ms) / 1000)
                )
            )
    statement = sql.SQL("COPY (SELECT {} FROM {} WHERE {} ORDER BY open_time) TO STDOUT (FORMAT binary)").format(
        sql.SQL(", ").join(columns), sql.Identifier(table.name), sql.SQL(" AND ").join(conditions)
    )
    buffer = io.BytesIO()
    with _cursor(connection) as cursor:
        cursor.copy_expert(statement, buffer)
    return _decode(buffer.getbuffer(), blocks)


def _cursor(connection: Connection):  # type: ignore[no-untyped-def]
    """A cursor of the psycopg2 connection beneath, in the same transaction."""
    return connection.connection.cursor()


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file that can be read."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = memoryview(next(self._chunks, b""))
        part, self._rest = self._rest[:size], self._rest[size:]
        return bytes(part)


def _row_dtype(texts: Sequence[bytes], blocks: Sequence[Block], length: str, fields: str | None = None) -> np.dtype:
    """The layout of a row; with `fields="?"` the same layout in booleans, one for each byte."""
    mask = fields is not None
    parts: list[tuple] = [("count", np.dtype((np.bool_, 2)) if mask else ">i2")]
    for number, text in enumerate(texts):
        kind = (
            np.dtype((np.bool_, 4 + len(text))) if mask else np.dtype([("length", length), ("value", f"S{len(text)}")])
        )
        parts.append((f"text{number}", kind))
    for number, block in enumerate(blocks):
        value = np.dtype(_DTYPES[block.kind])
        pair = (
            [("length", np.bool_, 4), ("value", np.bool_, value.itemsize)]
            if mask
            else [("length", length), ("value", value)]
        )
        parts.append((f"block{number}", pair, (len(block.names),)))
    return np.dtype(parts)


def _encode(
    texts: Sequence[bytes],
    blocks: Sequence[Block],
    arrays: Sequence[np.ndarray],
    nulls: Sequence[np.ndarray | None],
) -> Iterator[bytes]:
    layout = _row_dtype(texts, blocks, ">i4")
    keep_layout = _row_dtype(texts, blocks, ">i4", fields="?")
    columns = [
        np.asarray(array).reshape(len(array), len(block.names)) for array, block in zip(arrays, blocks, strict=True)
    ]
    yield _HEADER
    for first in range(0, len(columns[0]), _CHUNK_ROWS):
        rows = slice(first, first + _CHUNK_ROWS)
        image = np.empty(len(columns[0][rows]), layout)
        image["count"] = len(texts) + sum(len(block.names) for block in blocks)
        for number, text in enumerate(texts):
            image[f"text{number}"] = (len(text), text)
        cut = np.zeros(len(image), bool)  # rows with a NULL
        missing: dict[str, np.ndarray] = {}
        for number, (block, column, null) in enumerate(zip(blocks, columns, nulls, strict=True)):
            part = image[f"block{number}"]
            values = column[rows]
            part["length"] = part["value"].dtype.itemsize
            part["value"] = (values.astype(np.int64) - _EPOCH_MS) * 1000 if block.kind == "time" else values
            if null is not None and null[rows].any():
                absent = np.broadcast_to(null[rows].reshape(len(image), -1), values.shape)
                part["length"][absent] = -1
                missing[f"block{number}"] = absent
                cut |= absent.any(axis=1)
        if not missing:
            yield image.tobytes()
            continue
        cut_rows = np.flatnonzero(cut)
        keep = np.ones(len(cut_rows), keep_layout)
        for name, absent in missing.items():
            keep[name]["value"][absent[cut_rows]] = False
        yield _without_nulls(image, cut_rows, keep.view(np.bool_).reshape(len(cut_rows), -1))
    yield _TRAILER


def _without_nulls(image: np.ndarray, cut_rows: np.ndarray, keep: np.ndarray) -> bytes:
    """The rows' bytes; of `cut_rows` only those that `keep` [cut rows, bytes] names, the runs between them whole."""
    size = image.itemsize
    cut_bytes = image[cut_rows].view(np.uint8).reshape(len(cut_rows), size)[keep].tobytes()
    bounds = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).tolist()
    whole = memoryview(image.tobytes())
    parts: list[bytes | memoryview] = []
    first = 0
    for number, row in enumerate(cut_rows.tolist()):
        parts += (whole[first * size : row * size], cut_bytes[bounds[number] : bounds[number + 1]])
        first = row + 1
    return b"".join((*parts, whole[first * size :]))


def _decode(message: memoryview, blocks: Sequence[Block]) -> list[np.ndarray]:
    layout = _row_dtype([], blocks, ">i4")
    body = message[len(_HEADER) : -len(_TRAILER)]
    assert bytes(message[: len(_HEADER)]) == _HEADER, "not a binary COPY"
    assert len(body) % layout.itemsize == 0, "rows of another layout"
    image = np.frombuffer(body, layout)
    arrays = []
    for number, block in enumerate(blocks):
        values = image[f"block{number}"]["value"]
        if len(block.names) == 1:
            values = values[:, 0]
        arrays.append(values // 1000 + _EPOCH_MS if block.kind == "time" else values)
    return arrays
