"""A gateway in front of a scripted server."""

import pytest
from scripted_gateway import scripted_gateway


@pytest.fixture
def scripted():
    with scripted_gateway() as gateway:
        yield gateway
