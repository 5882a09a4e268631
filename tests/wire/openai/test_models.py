import json

from tetri.wire.openai import model_list, server_version


def test_the_model_has_an_entry_for_each_name_with_what_clients_look_up():
    found = json.loads(model_list(["m", "alias"], 1700000000, "/models/m", 2048))
    assert found["object"] == "list" and [each["id"] for each in found["data"]] == ["m", "alias"]
    for each in found["data"]:
        assert (each["root"], each["max_model_len"], each["created"]) == ("/models/m", 2048, 1700000000)
        assert (each["object"], each["owned_by"], each["parent"]) == ("model", "tetri", None)


def test_the_version_is_told():
    assert json.loads(server_version("1.2")) == {"version": "1.2"}
