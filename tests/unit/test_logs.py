"""What a process logs, and what the libraries in it do, in one form."""

from __future__ import annotations

import json
import subprocess
import sys

_SAID = """
import logging, structlog
from qlm_batch.logs import configure_logging
from qlm_batch.settings import Settings
configure_logging(Settings(log_json={log_json}))
structlog.get_logger("ours").warning("ours", lines=3)
try:
    body = "a secret of a caller"
    raise ValueError("broken")
except ValueError:
    logging.getLogger("theirs").exception("theirs %s", "too")
"""


def _logged(*, log_json: bool) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _SAID.format(log_json=log_json)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr


def test_every_line_is_json_where_that_is_asked_for() -> None:
    ours, theirs = map(json.loads, _logged(log_json=True).splitlines())
    assert ours["event"] == "ours" and ours["lines"] == 3
    assert theirs["event"] == "theirs too" and theirs["level"] == "error"
    assert "ValueError: broken" in theirs["exception"]
    assert ours.keys() & theirs.keys() == {"event", "level", "timestamp"}


def test_what_libraries_log_reads_like_the_rest_and_shows_no_variables() -> None:
    text = _logged(log_json=False)
    ours, theirs, *trace = text.splitlines()
    assert "[warning  ] ours" in ours and "[error    ] theirs too" in theirs
    assert trace[-1] == "ValueError: broken"
    assert "a secret of a caller" not in text
