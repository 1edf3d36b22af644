"""API keys of the in-memory store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from qlm_batch.domain.errors import NotFound, Unauthenticated
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.store.memory.state import Facet, locked


class MemoryKeys(Facet):
    """KeyStore in memory."""

    @locked
    def add_key(self, key: ApiKey, secret: str) -> None:
        """Store a key by the hash of its secret, making the tenant when new."""
        self.state.keys[key.id] = key
        self.state.keys_by_hash[_hash(secret)] = key.id

    @locked
    def key_for(self, secret: str) -> ApiKey:
        """The key with this secret."""
        key = self.state.keys.get(self.state.keys_by_hash.get(_hash(secret), ""))
        if key is None or key.revoked_at is not None:
            raise Unauthenticated(
                "The API key is unknown or was revoked; make one with `qlm keys create`."
            )
        return key

    @locked
    def list_keys(self, tenant: str | None = None) -> Sequence[ApiKey]:
        """Keys of one tenant, or of all."""
        return tuple(key for key in self.state.keys.values() if tenant in (None, key.tenant))

    @locked
    def revoke_key(self, key_id: str) -> ApiKey:
        """End a key at once."""
        key = self.state.keys.get(key_id)
        if key is None:
            raise NotFound(f"No key found with id '{key_id}'.", code="key_not_found", param="id")
        revoked = replace(key, revoked_at=key.revoked_at or self.state.clock())
        self.state.keys[key_id] = revoked
        return revoked


def _hash(secret: str) -> str:
    # 256 random bits need no slow hash.
    return hashlib.sha256(secret.encode()).hexdigest()
