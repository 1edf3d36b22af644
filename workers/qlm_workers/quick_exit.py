"""Importing this makes a process that loaded vLLM end within a fraction of a second.

Python's last garbage collection walks everything torch and vLLM left behind. That takes seconds in
each of an engine's processes; meanwhile they heed no SIGTERM, so that whoever ends them waits, then
kills. All that outlives a process was given back before: nothing is worth that walk.
"""

from __future__ import annotations

import atexit
import gc

atexit.register(gc.freeze)


class QuickExit:
    """Named as vLLM's `worker_extension_cls`, brings the above into its worker processes."""
