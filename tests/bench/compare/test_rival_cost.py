import pytest

from tetri.bench.compare import rival_cost as module
from tetri.bench.compare.rival_cost import rival_cost
from tetri.bench.report import BenchError


def measured(url, drawn=None):
    def draw(tokens):
        drawn.append(tokens)
        return [7] * tokens

    drawn = [] if drawn is None else drawn
    return rival_cost(url, "m", draw, 8, 1000)


def test_the_table_has_what_prompts_and_steps_take(serve):
    server, url = serve()
    server.first_s, server.steps_s = (lambda prompt: 0.02 + prompt / 5000), (lambda batch: 0.02 + 0.002 * batch)
    made = measured(url, drawn := [])
    # Not less than what the server waits; a busy machine adds to it.
    assert made.prompt_s(512, 0, 512) >= 0.122 and made.decode_s(1, 0) >= 0.021 and made.decode_s(32, 0) >= 0.083
    assert (made.kv_token_bytes, made.kv_tokens) == (8, 1000)
    assert {*drawn} == {32, 128, 512, 2048, 1024} and len(drawn) == 4 * 3 + 1 + 4 + 16 + 32 + 8


def test_a_curve_never_falls(serve, monkeypatch):
    """A machine that becomes faster meanwhile makes no invalid table."""
    seconds = {32: 0.3, 128: 0.2, 512: 0.1, 2048: 0.4}
    monkeypatch.setattr(module, "_prompt_s", lambda url, model, ids: seconds[len(ids)])
    monkeypatch.setattr(module, "_step_s", lambda url, model, prompts: 0.1 / len(prompts))
    made = measured("")
    assert [each for _, each in made.prefill] == [0.3, 0.3, 0.3, 0.4] and {each for _, each in made.decode} == {0.1}
    assert made.prefill_start_s == made.decode_context_s == 0.0


def test_context_and_what_comes_before_a_chunk_cost(monkeypatch):
    monkeypatch.setattr(module, "_prompt_s", lambda url, model, ids: 1e-3 * len(ids) + 1e-7 * len(ids) ** 2)
    monkeypatch.setattr(
        module, "_step_s", lambda url, model, prompts: 0.01 * len(prompts) + 1e-5 * sum(map(len, prompts))
    )
    made = measured("")
    assert made.decode_context_s == pytest.approx(1e-5, rel=0.1)
    assert made.prompt_s(2048, 0, 512) == pytest.approx(2.048 + 0.419, rel=0.01)


@pytest.mark.parametrize("output", [1, 32])
def test_a_server_that_does_not_answer_is_said(serve, output):
    server, url = serve()
    server.fail = lambda body: "status" if body["max_tokens"] == output else None
    with pytest.raises(BenchError, match=f"{url} does not answer: status 503"):
        measured(url)
