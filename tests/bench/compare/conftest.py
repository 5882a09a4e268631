"""A played server of OpenAI's API, which answers as it is told."""

import asyncio
import json
import threading

import pytest
from aiohttp import web


class Played:
    """`first_s`, `steps_s`: seconds before the first event of an answer and before each further one, also as functions
    of the prompt's tokens and of the number of open answers; `hold`: whether answers wait; `fail`: called with the
    request's body, returns what goes wrong: "status", "error", "short", "cut", "garbage" or None. `most`: the most
    requests at once."""

    def __init__(self):
        self.first_s, self.steps_s, self.fail = 0.0, 0.0, lambda body: None
        self.hold = lambda: False
        self.bodies, self.headers, self.open, self.most = [], [], 0, 0

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        problem = self.fail(body)
        if problem == "status":
            return web.json_response({"error": {"message": "no"}}, status=503)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            return await self.stream(request, len(body["prompt"]), body["max_tokens"], problem)
        finally:
            self.open -= 1

    def wait_s(self, number, prompt):
        if number:
            return self.steps_s(self.open) if callable(self.steps_s) else self.steps_s
        return self.first_s(prompt) if callable(self.first_s) else self.first_s

    async def stream(self, request, prompt, tokens, problem):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if problem == "error":
            await response.write(b'data: {"error": {"message": "it broke"}}\n\n')
        if problem == "garbage":
            await response.write(b"data: {no json\n\n")
        while self.hold():
            await asyncio.sleep(0.005)
        for number in range(tokens):
            await asyncio.sleep(self.wait_s(number, prompt))
            if problem == "cut" and number == 1:
                request.transport.abort()
                return response
            await response.write(b'data: {"id": "x", "choices": [{"text": "t", "finish_reason": null}]}\n\n')
        usage = {"completion_tokens": tokens - (problem == "short"), "prompt_tokens": 1}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def serve():
    """Start a played server: returns it and its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runners = []

    async def start(played):
        app = web.Application()
        app.router.add_post("/v1/completions", played.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return site._server.sockets[0].getsockname()[1]

    def started():
        played = Played()
        port = asyncio.run_coroutine_threadsafe(start(played), loop).result(20)
        return played, f"http://127.0.0.1:{port}"

    yield started
    for runner in runners:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()
