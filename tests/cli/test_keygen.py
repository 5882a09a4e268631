def test_a_key_is_made_once_and_in_a_folder_that_exists(run, tmp_path):
    path, nowhere = tmp_path / "key", tmp_path / "no" / "key"
    assert run("keygen", path) == (0, "", f"{path}: a new key, for its owner alone (0600)\n")
    status, _, err = run("keygen", path)
    assert status == 2 and "never overwritten" in err
    assert run("keygen", nowhere)[2] == f"tetri-cli: {nowhere}: cannot be made (no such file or directory)\n"
