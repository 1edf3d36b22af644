"""The policies by name: who runs where, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.scheduling.policies.base import Policy
from qlm_batch.scheduling.policies.listing import EDF, EDF_SHED, FCFS, LLF_SHED, PRIORITY
from qlm_batch.scheduling.policies.oracle import OraclePolicy
from qlm_batch.scheduling.policies.paper import PAPER
from qlm_batch.scheduling.policies.qlm import QLM
from qlm_batch.scheduling.policies.shepherd import SHEPHERD

POLICIES: Final[Mapping[str, Policy]] = {
    policy.name: policy
    for policy in (FCFS, PRIORITY, EDF, EDF_SHED, LLF_SHED, SHEPHERD, PAPER, QLM)
}


def policy(name: str) -> Policy:
    """The policy of this name; ConfigurationError when there is none."""
    try:
        return POLICIES[name]
    except KeyError:
        known = ", ".join(POLICIES)
        raise ConfigurationError(
            f"No policy is named {name!r}; set QLM_POLICY to one of {known}.", param="policy"
        ) from None


__all__ = ["POLICIES", "OraclePolicy", "Policy", "policy"]
