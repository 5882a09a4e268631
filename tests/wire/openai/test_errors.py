import json

import pytest

from tetri.wire.openai.errors import ApiError, end_problem


def test_the_body_has_the_shape_that_clients_know():
    error = ApiError(400, "n is wrong", param="n")
    body = {"message": "n is wrong", "type": "BadRequestError", "param": "n", "code": 400}
    assert json.loads(error.body()) == {"error": body} and str(error) == "n is wrong"
    assert json.loads(ApiError(418, "no", type="Tea", code="pot").body())["error"] == {
        "message": "no",
        "type": "Tea",
        "param": None,
        "code": "pot",
    }


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_an_end_with_a_complete_answer_is_no_problem(reason):
    assert end_problem(reason, None) is None


@pytest.mark.parametrize(
    ("reason", "error", "status", "line"),
    [
        ("deadline", None, 504, "the deadline"),
        ("cancelled", None, 499, "was cancelled"),
        ("error", "d0 is lost", 500, "d0 is lost"),
        ("error", None, 500, "the request failed"),
    ],
)
def test_other_ends_are_errors(reason, error, status, line):
    problem = end_problem(reason, error)
    assert problem.status == status and line in problem.message
