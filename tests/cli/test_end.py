"""tetri-cli end against a fake broker."""

import pytest
from fake_broker import done

from tests.cli.fakes import refuse


def test_a_request_of_any_client_ends(run, broker):
    fake = broker(lambda message: [done("r9", "cancelled")])
    assert run("end", "r9") == (0, "r9 has ended\n", "")
    assert fake.seen == [{"type": "end_request", "rid": "r9"}]


@pytest.mark.parametrize(
    ("reply", "status", "says"),
    [(refuse, 1, "the prompt is empty"), (lambda message: [], 3, "no answer from the broker")],
)
def test_what_is_refused_or_not_answered_is_one_line(run, broker, reply, status, says):
    broker(reply)
    found, out, err = run("end", "r9", "--timeout", "0.2")
    assert (found, out) == (status, "") and says in err and err.count("\n") == 1
