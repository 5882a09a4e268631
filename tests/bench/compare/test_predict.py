from pathlib import Path

import pytest

from tetri import cost
from tetri.bench.compare.arrangements import arrangements
from tetri.bench.compare.load import Answer
from tetri.bench.compare.predict import predicted
from tetri.bench.compare.servers import tetri_config
from tetri.bench.compare.store import Table
from tetri.config import load
from tetri.request import Slo

CONF = Path(__file__).parents[3] / "conf" / "default.toml"
CONFIG, TABLE, SLO = load(CONF), cost.load("cpu-smollm2"), Slo(ttft_s=1.0, tpot_s=0.1)
KNOWN = arrangements(CONFIG)


def sent(count, every_s, prompt=512, output=20):
    return [Answer(every_s * number, 0.0, 0.0, prompt, output) for number in range(count)]


def of(name, answers, tmp_path, delay_s=0.0):
    arrangement = KNOWN[name]
    config = tetri_config(arrangement, CONF, tmp_path, ()) if arrangement.is_tetri else CONFIG
    return predicted(arrangement, config, Table(name, TABLE, delay_s), answers, SLO)


@pytest.mark.parametrize("name", [*KNOWN])
def test_a_request_alone_takes_its_prefill_and_its_steps(name, tmp_path):
    (answer,) = of(name, sent(1, 0.0), tmp_path)
    assert answer.ttft_s == pytest.approx(TABLE.prompt_s(512, 0, 512), rel=0.05)
    assert answer.tpot_s == pytest.approx(TABLE.decode_s(1, 522), rel=0.15)
    assert (answer.prompt, answer.output, answer.error) == (512, 20, "")


@pytest.mark.parametrize("name", ["tetri-auto", "vllm-2-least"])
def test_what_a_request_takes_besides_its_steps_comes_before_its_first_token(name, tmp_path):
    (plain,), (late,) = (of(name, sent(1, 0.0), tmp_path, delay_s) for delay_s in (0.0, 0.125))
    assert late.ttft_s == pytest.approx(plain.ttft_s + 0.125) and late.tpot_s == pytest.approx(plain.tpot_s)


def test_the_requests_stay_in_order_of_their_times(tmp_path):
    answers = of("vllm-2-least", sent(6, 0.3)[::-1], tmp_path)
    assert [answer.sent_s for answer in answers] == [each.sent_s for each in sent(6, 0.3)]


def test_two_servers_share_the_load_and_one_has_all_of_it(tmp_path):
    one, two = (of(name, sent(8, 0.0), tmp_path) for name in ("vllm", "vllm-2-least"))
    assert max(answer.jct_s for answer in one) > 1.5 * max(answer.jct_s for answer in two)


def test_round_robin_is_blind(tmp_path):
    """Every second request is long: round robin sends all of these to the same server."""
    mixed = [Answer(0.01 * i, 0.0, 0.0, 2000 if i % 2 else 10, 100 if i % 2 else 2) for i in range(12)]
    blind, seeing = (of(f"vllm-2-{routing}", mixed, tmp_path) for routing in ("rr", "least"))
    assert max(answer.jct_s for answer in blind) > 1.2 * max(answer.jct_s for answer in seeing)


def test_a_small_step_shortens_the_stalls_of_decodes(tmp_path):
    mixed = [Answer(0.0, 0.0, 0.0, 10, 60), Answer(0.0, 0.0, 0.0, 10, 60), *sent(4, 0.2, 2000, 2)]
    default, small = (of(name, mixed, tmp_path) for name in ("vllm-2-least", "vllm-2-512-least"))
    assert small[0].jct_s == pytest.approx(default[0].jct_s, rel=0.3) and small != default
