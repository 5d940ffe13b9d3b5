"""Importing this module first lets transformers load tokenizers without torch: a start takes 1 s instead of 5.

transformers 4 has a variable for that, which it reads once. Later ones look for torch themselves and import it, and
torchvision with it: then only the guard is needed.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys

if "torch" not in sys.modules and importlib.metadata.version("transformers").startswith("4."):
    _outside = {name: os.environ.get(name) for name in ("USE_TORCH", "TRANSFORMERS_NO_ADVISORY_WARNINGS")}
    # The warning says that without torch there are no models.
    os.environ.update(USE_TORCH="0", TRANSFORMERS_NO_ADVISORY_WARNINGS="1")
    import transformers  # noqa: F401

    for _name, _value in _outside.items():  # processes that this one starts may want torch
        if _value is None:
            del os.environ[_name]
        else:
            os.environ[_name] = _value
else:
    import _torchvision_guard  # noqa: F401
