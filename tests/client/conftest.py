import asyncio

import pytest

import tetri
from tests.client.script import FAST


@pytest.fixture(params=["sync", "async"])
def call(request):
    """One call of either client."""

    def run(address, method, *arguments, options=FAST, **more):
        if request.param == "sync":
            with tetri.Client(address, **options) as client:
                return getattr(client, method)(*arguments, **more)

        async def main():
            async with tetri.AsyncClient(address, **options) as client:
                return await getattr(client, method)(*arguments, **more)

        return asyncio.run(main())

    return run


@pytest.fixture
def generate(call):
    return lambda address, prompt="hi", **more: call(address, "generate", prompt, **more)
