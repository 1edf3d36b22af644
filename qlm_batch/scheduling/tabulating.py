"""Durations of many groups at once, as a table of what they take at every instance."""

from __future__ import annotations

import numpy as np

from qlm_batch.scheduling.fleet import Fleet
from qlm_batch.scheduling.flows import fews
from qlm_batch.scheduling.steady import Steady, distinct, stretches
from qlm_batch.scheduling.worktable import EXCESS, Floats, Ints, WorkTable


def tabulated(work: Steady, fleet: Fleet) -> WorkTable:
    """What this work would take at each instance."""
    rows, flows = work.rows, work.flows
    tail_kind, tails = _tails(work)
    each = np.where(flows.served, flows.request_s, np.inf)
    hosts = np.array([fleet.hosting(model) for model, _, _ in rows.sources], dtype=np.bool_)
    of_row = np.repeat(np.arange(len(rows.sources)), np.diff(rows.bounds))
    served = hosts.reshape(len(rows.sources), len(fleet.instances))[of_row]
    beyond = _likely(work) - rows.mean[:, None]
    excess = beyond[:, None, :] * flows.step_s[:, :, None]
    return WorkTable(
        work.kind,
        np.maximum(1.0, work.requests) * work.factor,
        np.where(served, each[:, fleet.classes] * fleet.slow, np.inf),
        np.where(served, flows.request_var[:, fleet.classes] * fleet.slow**2, np.inf),
        tail_kind,
        tails,
        np.where(flows.served[:, :, None], excess, np.inf),
        fleet.classes,
        fleet.slow,
    )


def _tails(work: Steady) -> tuple[Ints, Floats]:
    """For each work its row of tails, and the tails by row and class of instances."""
    flows = work.flows
    largest = np.ceil(np.where(flows.served, flows.running, 1.0).max(axis=1, initial=1.0))
    last = fews(np.minimum(work.requests, largest[work.kind]))
    first, which = distinct(work.kind, last)
    shape = (first.size, flows.served.shape[1])
    row, count, place = (
        np.broadcast_to(column, shape).ravel()
        for column in (work.kind[first, None], last[first, None], np.arange(shape[1]))
    )
    return which, work.tails(row, place, count).reshape(shape)


def _likely(work: Steady) -> Floats:
    """By row, EXCESS equally likely lengths."""
    rows = work.rows
    likely = np.empty((rows.limit.size, EXCESS))
    for own, source in stretches(rows.sources, rows.bounds):
        lengths = work.expected.of(*source).equally_likely
        likely[own] = np.minimum(lengths, rows.limit[own, None])
    return likely
