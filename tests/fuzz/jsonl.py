"""The reader of input files under atheris: `python -m tests.fuzz.jsonl -max_total_time=60`.

Any bytes are requests or a list of faults. Anything else that is raised, a hang or growing memory
is a finding, and libFuzzer writes the bytes that lead to it.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["qlm_batch.intake", "qlm_batch.domain"]):
    from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS
    from qlm_batch.intake.jsonl import FileRefused, LineRules, read_requests

_BOUNDS = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=4096"]
_SEEDS = (
    b'{"custom_id":"a","method":"POST","url":"%s","body":{"model":"m","messages":'
    b'[{"role":"user","content":"hi"}],"max_tokens":3},"deadline":"1h"}\n' % CHAT.encode(),
    b'{"custom_id":"b","method":"POST","url":"%s","body":{"model":"m","prompt":"x","n":2}}'
    % COMPLETIONS.encode(),
    b'{"custom_id":"c","method":"POST","url":"%s","body":{"model":"m","input":["x",[1]]}}'
    % EMBEDDINGS.encode(),
)


def read(data: bytes) -> None:
    """Read a file whose first byte says how; its cut into chunks comes from its second."""
    if len(data) < 2:
        return
    choice, size, content = data[0], 1 + data[1], data[2:]
    rules = LineRules(
        endpoint=(CHAT, COMPLETIONS, EMBEDDINGS)[choice % 3],
        accepted_at=1_800_000_000.0,
        batch_deadline=1_800_086_400.0,
        max_line_bytes=1024,
        max_lines=50,
        strict=bool(choice & 128),
    )
    chunks = [content[at : at + size] for at in range(0, len(content), size)]
    try:
        for _ in read_requests(chunks, rules):
            pass
    except FileRefused as refused:
        assert refused.errors and refused.total >= len(refused.errors)


def main() -> None:
    """Fuzz until told to stop."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(_SEEDS):
            (Path(corpus) / str(number)).write_bytes(bytes([number, 255]) + seed)
        atheris.Setup([sys.argv[0], *_BOUNDS, *sys.argv[1:], corpus], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
