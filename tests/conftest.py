"""What all folders of tests share: no test reads or writes the prices that this user's engines keep."""

from collections.abc import Iterator

import hypothesis
import pytest

hypothesis.settings.register_profile("shared", deadline=None)  # a neighbour on the machine makes any example slow
hypothesis.settings.load_profile("shared")


@pytest.fixture(autouse=True, scope="session")
def _prices_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines in processes of their own inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADWAY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
