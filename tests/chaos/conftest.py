from __future__ import annotations

from pathlib import Path

import pytest

from chaos.survival import Survivor
from integration.conftest import corpus  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Survivor:  # noqa: F811
    """A run that nothing happened to, with its checkpoints on both tiers; not to be changed."""
    run = Survivor(tmp_path_factory.mktemp("chaos") / "undisturbed", corpus)
    run.finish()
    run.check_samples()
    return run
