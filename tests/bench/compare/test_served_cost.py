import pytest

from tetri.bench.compare import served_cost as module
from tetri.bench.compare.load import Answer
from tetri.bench.compare.served_cost import LEAST_SLOWER, Seen, mean, of_instance, of_server, seen
from tetri.bench.report import BenchError
from tetri.cost import Cost

STEPS = {1: 0.02, 4: 0.026, 16: 0.05, 32: 0.08}
PROMPTS = {32: 0.05, 128: 0.15, 512: 0.55, 2048: 2.3}


def drawing(drawn):
    def draw(tokens):
        drawn.append(tokens)
        return [7] * tokens

    return draw


@pytest.mark.parametrize("instances", [1, 2])
def test_all_instances_are_as_busy(serve, instances):
    servers, urls = zip(*(serve() for _ in range(instances)), strict=True)
    for server in servers:
        server.first_s, server.steps_s = (lambda prompt: 0.02 + prompt / 5000), (lambda batch: 0.02 + 0.002 * batch)
    found = seen(urls, instances, "m", drawing(drawn := []))
    # Not less than what the server waits; a busy machine adds to it.
    assert found.prompts[512] >= 0.122 and found.steps[1] >= 0.021 and found.steps[32] >= 0.083
    assert {*drawn} == {32, 128, 512, 2048, 1024} and len(drawn) == instances * (4 * 3 + 1 + 4 + 16 + 32 + 8)
    assert [len(server.bodies) for server in servers] == [4 * 3 + 1 + 4 + 16 + 32 + 8] * instances


def test_several_instances_behind_one_address(serve):
    server, url = serve()
    seen([url], 2, "m", drawing(drawn := []))
    assert len(server.bodies) == len(drawn) == 2 * (4 * 3 + 1 + 4 + 16 + 32 + 8)


@pytest.mark.parametrize("output", [1, 32])
def test_a_server_that_does_not_answer_is_said(serve, output):
    (_, good), (server, url) = serve(), serve()
    server.fail = lambda body: "status" if body["max_tokens"] == output else None
    with pytest.raises(BenchError, match=f"{url} does not answer: status 503"):
        seen([good, url], 2, "m", drawing([]))


def test_the_middle_of_what_was_measured_counts(monkeypatch):
    times = iter([0.3, 0.1, 0.2])

    def asked(urls, model, prompts, output):
        answers = [Answer(0.0, next(times, 0.5), 0.0, 1, 1) for _ in prompts]
        return answers, [0.01] * 3 + [0.9] * 2

    monkeypatch.setattr(module, "_asked", asked)
    found = seen([""], 1, "m", drawing([]))
    assert found.prompts == {32: 0.2, 128: 0.5, 512: 0.5, 2048: 0.5}
    assert {*found.steps.values(), found.deep_s} == {0.01}


def test_the_table_of_a_server():
    made = of_server(Seen(PROMPTS, STEPS, 0.034 + 8 * 992 * 1e-5), 8, 1000)
    assert made.prefill == ((32, 0.05), (128, 0.15), (512, 0.55), (2048, 2.3)) and made.decode == tuple(STEPS.items())
    assert (made.kv_token_bytes, made.kv_tokens) == (8, 1000)
    assert made.decode_context_s == pytest.approx(1e-5)
    assert made.prompt_s(2048, 0, 512) == pytest.approx(2.3)


def test_a_curve_never_falls():
    """A machine that becomes faster meanwhile makes no invalid table."""
    made = of_server(Seen({32: 0.3, 128: 0.2, 512: 0.1, 2048: 0.4}, dict.fromkeys(STEPS, 0.1) | {4: 0.2}, 0.1), 8, 9)
    assert [each for _, each in made.prefill] == [0.3, 0.3, 0.3, 0.4]
    assert [each for _, each in made.decode] == [0.1, 0.2, 0.2, 0.2]
    assert made.prefill_start_s == made.decode_context_s == 0.0


def test_the_table_of_an_instance_has_the_chunks_of_its_engine():
    """Here prompts take 1.25 times as long as on the engine alone, and each request 10 ms besides."""
    own = Cost(((1, 0.008), (512, 0.416)), ((1, 0.01), (8, 0.02)), 1e-6, 2e-6, 8, 1000, 256)
    alone = {tokens: own.prompt_s(tokens, 0, 512) for tokens in PROMPTS}
    prompts = {tokens: 0.01 + 1.25 * seconds for tokens, seconds in alone.items()}
    served, delay_s = of_instance(Seen(prompts, STEPS, 0.034 + 8 * 992 * 1e-5), own, 512)
    assert delay_s == pytest.approx(0.01)
    assert served.prompt_s(700, 0, 256) == pytest.approx(1.25 * own.prompt_s(700, 0, 256))
    assert served.decode == tuple(STEPS.items()) and served.decode_context_s == pytest.approx(1e-5)
    assert (served.kv_token_bytes, served.kv_tokens, served.chunk_tokens) == (8, 1000, 256)


def test_no_request_takes_less_than_its_steps():
    own = Cost(((1, 0.008), (512, 0.416)), ((1, 0.01),))
    assert of_instance(Seen(PROMPTS | {32: 0.0}, STEPS, 0.04), own, 512)[1] == 0.0


def test_longer_prompts_are_cut_into_the_chunks_of_the_instance():
    own = Cost(((1, 0.1), (64, 0.1), (128, 0.12)), ((1, 0.01),))  # 128 tokens at once, or 64 twice
    prompts = {tokens: 1.5 * own.prompt_s(tokens, 0, 64) for tokens in PROMPTS}
    served, delay_s = of_instance(Seen(prompts, STEPS, 0.04), own, 64)
    assert served.prompt_s(2048, 0, 64) == pytest.approx(prompts[2048]) and delay_s == pytest.approx(0.0)


@pytest.mark.parametrize("curve, factor", [(((1, 0.1),), 1.0), (((1, 0.1), (512, 51.3)), LEAST_SLOWER)])
def test_noise_makes_no_invalid_table(curve, factor):
    """An engine that takes as long for any prompt, and prompts that take no longer than others."""
    own = Cost(curve, ((1, 0.01),))
    served, _ = of_instance(Seen(dict.fromkeys(PROMPTS, 0.2), STEPS, 0.04), own, 4096)
    assert served.prefill[-1][1] == pytest.approx(factor * curve[-1][1])


def test_the_mean_of_tables():
    one = Cost(((1, 0.1), (2, 0.2)), ((1, 0.3),), 1e-6, 3e-6, 8, 1000)
    two = Cost(((1, 0.3), (2, 0.4)), ((1, 0.5),), 3e-6, 5e-6, 8, 1000)
    made = mean([one, two])
    assert made.prefill == ((1, pytest.approx(0.2)), (2, pytest.approx(0.3))) and made.decode == ((1, 0.4),)
    assert (made.prefill_start_s, made.decode_context_s) == pytest.approx((2e-6, 4e-6)) and made.kv_tokens == 1000
    assert mean([one]) == one
