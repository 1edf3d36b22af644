"""What is sent to PostgreSQL for rows, without one."""

from __future__ import annotations

from collections.abc import Iterator

from qlm_batch.store.copying import CHUNK_BYTES, chunks_of


def test_no_piece_is_large_however_large_the_rows_are() -> None:
    rows = [bytes([number]) * size for number, size in enumerate((10, 3 * CHUNK_BYTES + 5, 0, 7))]
    pieces = list(chunks_of(rows))
    assert max(map(len, pieces)) <= CHUNK_BYTES
    assert b"".join(rows) in b"".join(pieces)
    assert b"".join(pieces) == b"".join(chunks_of([b"".join(rows)]))


def test_large_rows_are_not_gathered_before_they_are_sent() -> None:
    made = 0

    def rows() -> Iterator[bytes]:
        nonlocal made
        for _ in range(10):
            made += 1
            yield bytes(CHUNK_BYTES)

    sending = chunks_of(rows())
    next(sending)
    assert made == 1


def test_small_rows_are_sent_many_together() -> None:
    assert len(list(chunks_of([b"x"] * 1_000))) < 10
