from __future__ import annotations

from integration.conftest import corpus  # noqa: F401  (a fixture)
