from tetri.sim.sweep.arrangements import fixed, named


def test_few_instances_are_split_in_every_way():
    names = [each.name for each in fixed(4)]
    assert len(names) == len(set(names)) == 3 * (2 + 3)
    assert {"coupled-rr-256", "coupled-ll-2048", "split-3+1-512"} < set(names)


def test_many_instances_are_split_in_four_ways():
    splits = {(each.prefill, each.decode) for each in fixed(32) if each.kind == "split"}
    assert splits == {(4, 28), (8, 24), (16, 16), (24, 8)}


def test_a_name_stands_for_one_arrangement():
    assert all(named(each.name, 8) == each for each in fixed(8))
    assert named("auto", 8).kind == "auto"
