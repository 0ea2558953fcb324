"""Print, as JSON, what touching unishard's two front doors adds to `import torch`.

Run in a fresh interpreter: `python scripts/import_cost.py`. The count of modules is what tests hold, since it
does not depend on the machine; the seconds are reported.
"""

from __future__ import annotations

import json
import sys
import time

import torch  # noqa: F401 - the baseline


def main() -> None:
    before = set(sys.modules)
    started = time.perf_counter()
    import unishard

    _ = unishard.initialize
    _ = unishard.fully_shard
    seconds = time.perf_counter() - started
    added = sorted(set(sys.modules) - before)
    print(json.dumps({"seconds": round(seconds, 4), "modules": added}))


if __name__ == "__main__":
    main()
