"""DeepSpeed's API over unishard's engine: `import unishard.deepspeed as deepspeed`, or the drop-in.

`install()` (or `unishard run --as-deepspeed`) makes `import deepspeed` mean this package. `python -m
unishard.deepspeed` prints which of DeepSpeed's names are supported, partial or absent. Importing this package imports
nothing heavy: names are looked up in `unishard.deepspeed.surface` when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unishard.deepspeed.hook import install, installed, uninstall
from unishard.deepspeed.namespace import become_surface
from unishard.deepspeed.release import VERSION

__version__ = VERSION
__version_major__, __version_minor__, __version_patch__ = map(int, VERSION.split("+")[0].split("."))
__git_hash__ = __git_branch__ = None
dist = None
HAS_TRITON = False

become_surface(__name__)

if TYPE_CHECKING:
    from unishard.deepspeed.parts.engine import DeepSpeedEngine as DeepSpeedEngine
    from unishard.deepspeed.parts.initialize import initialize as initialize

__all__ = ["__version__", "install", "installed", "uninstall"]
