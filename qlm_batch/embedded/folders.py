"""Where the embedded servers keep data and sockets, for root and for plain users alike."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qlm_batch.domain.errors import ConfigurationError

SERVER_ACCOUNT = "nobody"
"""PostgreSQL refuses to run as root; as root it runs under this account."""


@dataclass(frozen=True, slots=True)
class Folders:
    """`data` is the service's folder; the others follow from it and are private.

    `account` is the user PostgreSQL runs as, None for the current one. `postgres` lies inside
    `data` where that account can reach it, and otherwise under /var/lib. `sockets` is short,
    because a socket's path may not pass 107 bytes.
    """

    data: Path
    postgres: Path
    sockets: Path
    account: str | None

    @classmethod
    def under(cls, data_dir: Path) -> Folders:
        """Make the folders for `data_dir`, whose absolute path names them."""
        data = data_dir.absolute()
        # Root's children need to pass through; what is secret inside is 0600 by itself.
        data.mkdir(parents=True, exist_ok=True, mode=0o711 if os.geteuid() == 0 else 0o700)
        tag = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:10]
        account = SERVER_ACCOUNT if os.geteuid() == 0 else None
        sockets = Path(tempfile.gettempdir()) / f"qlm-{os.geteuid()}-{tag}"
        if len(str(sockets)) > 80:
            sockets = Path("/tmp") / sockets.name  # noqa: S108 - private by mode and ownership
        _private(sockets, account)
        if account is None:
            _require_account_name()
            postgres = data / "postgres"
        elif _reachable_by_others(data):
            postgres = data / "postgres"
        else:
            postgres = Path("/var/lib/qlm-batch") / tag / "postgres"
            postgres.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            postgres.parent.mkdir(exist_ok=True, mode=0o755)
            link = data / "postgres"
            if not link.is_symlink():
                link.symlink_to(postgres)
        _private(postgres, account)
        return cls(data=data, postgres=postgres, sockets=sockets, account=account)

    def data_socket(self, name: str) -> Path:
        """A socket path of this service's own, short enough for the kernel."""
        return self.sockets / name

    def remove_sockets(self) -> None:
        """Remove the socket folder once everything has stopped."""
        shutil.rmtree(self.sockets, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove everything, data included, once everything has stopped."""
        self.remove_sockets()
        if self.postgres.parent != self.data:
            shutil.rmtree(self.postgres.parent, ignore_errors=True)
        shutil.rmtree(self.data, ignore_errors=True)


def _private(path: Path, account: str | None) -> None:
    """Make `path` a folder only `account` (and root) can enter, or refuse one that is not ours."""
    import pwd

    owner = os.geteuid() if account is None else pwd.getpwnam(account).pw_uid
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (owner, os.geteuid()):
        raise ConfigurationError(
            f"{path} exists but belongs to somebody else; remove it or choose another --data-dir"
        )
    if found.st_uid != owner:
        os.chown(path, owner, -1)
    path.chmod(0o700)


def _reachable_by_others(path: Path) -> bool:
    return all(
        folder.stat().st_mode & stat.S_IXOTH for folder in (path.resolve(), *path.resolve().parents)
    )


def _require_account_name() -> None:
    import pwd

    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ConfigurationError(
            f"user id {os.geteuid()} has no name on this machine, and PostgreSQL refuses to run "
            "for it; set DATABASE_URL, or add the user to /etc/passwd"
        ) from None
