"""How well the simulated engine foretells a real one; see `fidelity_run`.

vLLM's core process imports this file again, and cannot start where numba is loaded: it looks
through all modules for kernels to replace, and trips over numba's compiler. So nothing is imported
here but by who runs the benchmark.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Not this folder first: its queue.py would hide the standard library's.
    sys.path[0] = str(Path(__file__).parents[1])
    from benchmarks.fidelity_run import main

    main()
