"""Ids of purchases: in the order of time, none twice, none that another process gives out as well."""

from __future__ import annotations

import os
import time
from uuid import RFC_4122, UUID

from producers.purchase_ids import new_purchase_id


def ms_of(purchase_id: str) -> int:
    return int(purchase_id[:12], 16)


def test_an_id_is_a_uuid_of_version_7_and_tells_its_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_purchase_id() for _ in range(1_000)]
    after = time.time_ns() // 1_000_000
    assert {(UUID(each).version, UUID(each).variant, len(each)) for each in ids} == {(7, RFC_4122, 32)}
    times = [ms_of(each) for each in ids]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= after


def test_every_other_bit_is_random() -> None:
    ids = [int(new_purchase_id()[12:], 16) for _ in range(2_000)]
    assert len(set(ids)) == len(ids)
    fixed = 0xF << 76 | 0b11 << 62
    for bit in range(80):
        ones = sum(each >> bit & 1 for each in ids)
        # Nine standard deviations off a half: one run in 10^17 by chance.
        assert fixed >> bit & 1 or 800 < ones < 1_200, bit


def test_a_forked_process_gives_out_others() -> None:
    new_purchase_id()  # drawn ahead, by the parent
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, new_purchase_id()[12:].encode())
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reading, 64).decode()
    os.close(reading)
    os.close(writing)
    assert len(told) == 20
    assert told not in {new_purchase_id()[12:] for _ in range(1_000)}
