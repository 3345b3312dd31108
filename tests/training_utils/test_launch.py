"""How a script ends."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from diffusers_eqvae.training_utils import launch
from diffusers_eqvae.training_utils.arguments import RunArguments
from diffusers_eqvae.training_utils.launch import build_accelerator, build_state, run_script


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


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_device_that_cannot_be_used_is_named(name):
    with pytest.raises(ValueError, match=f"The device {name} cannot be used: "):
        launch.require_device(name)


LAUNCHED = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SHARDED = [
    pytest.param({"ACCELERATE_USE_FSDP": "true"}, "FSDP is not supported", id="fsdp"),
    pytest.param({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported", id="deepspeed"),
    pytest.param({"ACCELERATE_MIXED_PRECISION": "fp16"}, "or no on older cards", id="fp16"),
]


@pytest.mark.parametrize("build", [build_state, lambda: build_accelerator(RunArguments(output_dir="x"))])
def test_a_launcher_that_starts_one_process_for_two_is_refused(build, monkeypatch):
    """What `accelerate launch --cpu --num_processes 2` sets; one process, and torchrun, set less or more."""
    for name in launch.PROCESS_COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2"):
        build()


@pytest.mark.parametrize(("environment", "said"), SHARDED)
def test_what_a_launcher_promises_and_no_run_keeps_is_refused_by_name(environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        build_accelerator(RunArguments(output_dir="x", report_to="none"))


@pytest.mark.slow
def test_accelerate_still_starts_one_process_with_these_signs(tmp_path):
    (tmp_path / "show.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "show.py"]
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    (line,) = said.splitlines()
    assert LAUNCHED.keys() <= json.loads(line).keys() and not set(launch.PROCESS_COUNTS) & json.loads(line).keys()


def test_the_gradients_of_a_compiled_module_are_read_before_its_backward(monkeypatch):
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_with(self, backend="aot_eager"))
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    launch.compile_in_place(module)
    output = module(torch.randn(2, 4, requires_grad=True)).square().sum()
    (first,) = torch.autograd.grad(output, [module[0].weight], retain_graph=True)
    output.backward()
    assert torch.equal(module[0].weight.grad, first)
