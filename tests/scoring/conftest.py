"""Few rows are enough for the tests of this folder."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/scoring/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore:Reconstruction sees fewer rows than inputs"))
