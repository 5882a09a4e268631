"""A client of the broker that answers from a script."""

from tetri.client import Result
from tetri.client.frames import Event
from tetri.request import Receipt, Usage


def result(reason="length", tokens=2, choice=0):
    return Result(
        rid="r1",
        text="ab",
        token_ids=[1, 2],
        finish_reason=reason,
        usage=Usage(prompt_tokens=3, completion_tokens=tokens),
        timeline={"queued": 0.5},
        ttft_s=0.25,
        jct_s=0.75,
        receipt=Receipt(prompt_tokens=3, adopted=3),
        choice=choice,
    )


def two(choice=0):
    """Two tokens of a choice."""
    return [Event(choice, "a", (1,)), Event(choice, "b", (2,), result(choice=choice))]


class Client:
    """`script`: for each request in turn the events, and errors that are raised in their place; with functions in it,
    which are awaited. `asked`: what was asked for; `dropped`: requests whose stream was dropped before its end."""

    def __init__(self, *script):
        self.script, self.asked, self.dropped = list(script), [], 0

    def events(self, **asked):
        self.asked.append(asked)
        return Stream(self, self.script.pop(0), f"r{len(self.asked)}")


class Stream:
    prompt_tokens = 3

    def __init__(self, client, script, rid):
        self.client, self.script, self.rid = client, list(script), rid

    def __aiter__(self):
        return self

    async def __anext__(self):
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, Exception):
                raise step
            if not callable(step):
                return step
            await step()
        raise StopAsyncIteration

    def __del__(self):
        self.client.dropped += bool(self.script)
