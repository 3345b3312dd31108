"""How a script ends."""

import pytest

from diffusers_eqvae.training_utils.launch import run_script


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("error", [ValueError("--resolution must be 8"), FileNotFoundError("no images")])
def test_what_a_user_can_mend_is_one_sentence(error, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training/train_x.py", "--flag"])
    monkeypatch.delenv("EQVAE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_script(failing(error))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"train_x.py: error: {error}\n") and "Traceback" not in said
    monkeypatch.setenv("EQVAE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_script(failing(error))


def test_other_errors_show_where_they_come_from():
    with pytest.raises(RuntimeError):
        run_script(failing(RuntimeError("shapes")))


def test_success_is_status_0():
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: object())
    assert ended.value.code == 0
