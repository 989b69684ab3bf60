"""`python -m workshop_utils.train`, alone and under torchrun: same losses, checkpoints that survive, clear refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from workshop_utils import train as script
from workshop_utils import train_tasks
from workshop_utils.checkpoints import KEEP
from workshop_utils.data import MNIST

pytestmark = pytest.mark.timeout(240)
LIMIT_S = 120


@pytest.fixture
def one_process(train_here, monkeypatch):
    monkeypatch.setattr(train_tasks, "load_data", lambda device: few_images())
    return train_here


def few_images() -> MNIST:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(64, 784, generator=generator), torch.arange(64) % 10
    return MNIST(images, labels, images[:30], labels[:30], "noise")


def torchrun(processes: int, *arguments, restarts: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m", "workshop_utils.train"),
            *map(str, arguments),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def alone(report, *arguments) -> dict:
    """The same script in one process of its own; its report."""
    command = [sys.executable, "-m", "workshop_utils.train", "--report", report, *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return read(report)


def read(report) -> dict:
    return json.loads(report.read_text())


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said[-4000:]
    return said


# ----------------------------------------------------------------------------- one process and many


@pytest.mark.slow
def test_ddp_trains_as_one_process_does_also_on_uneven_shares(tmp_path):
    common = ("--steps", 6, "--batch-size", 100)  # 34, 33 and 33 images
    one = alone(tmp_path / "one.json", *common)
    said = finish(torchrun(3, "--strategy", "ddp", "--report", tmp_path / "many.json", *common))
    many = read(tmp_path / "many.json")
    assert many["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert abs(many["accuracy"] - one["accuracy"]) < 0.005
    assert many["world_size"] == len(many["bytes_sent"]) == 3 and many["backend"] == "gloo"
    assert said.count("ms a step") == 1  # rank 0 speaks, and only it
    if sys.platform == "linux":
        expected = 2 * 2 / 3 * 199_210 * 4 * 6
        assert all(expected < sent < 1.1 * expected for sent in many["bytes_sent"])


@pytest.mark.slow
def test_fsdp_does_too_and_goes_on_with_another_number_of_ranks(tmp_path):
    common = ("--model", "vit", "--batch-size", 100)
    one = alone(tmp_path / "one.json", "--steps", 5, *common)
    sharded = ("--strategy", "fsdp", "--checkpoint-dir", tmp_path / "c", *common)
    finish(torchrun(2, "--steps", 3, "--report", tmp_path / "two.json", *sharded))
    finish(torchrun(3, "--steps", 5, "--report", tmp_path / "three.json", *sharded))
    two, three = read(tmp_path / "two.json"), read(tmp_path / "three.json")
    assert three["resumed_at"] == 3
    assert two["losses"] + three["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert (
        alone(tmp_path / "1.json", "--steps", 6, "--checkpoint-dir", tmp_path / "c", *common)["resumed_at"]
        == 5
    )


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_checkpoint_and_nothing_else(tmp_path):
    common = ("--strategy", "ddp", "--steps", 150, "--checkpoint-every", 10)
    finish(torchrun(3, *common, "--report", tmp_path / "calm.json"))
    folder = tmp_path / "checkpoints"
    process = torchrun(
        3, *common, "--checkpoint-dir", folder, "--report", tmp_path / "killed.json", restarts=1
    )
    give_up_s = time.monotonic() + LIMIT_S
    while not list(folder.glob("step_*.pt")) and time.monotonic() < give_up_s:
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.01)
    workers = [p for p in psutil.Process(process.pid).children() if "workshop_utils.train" in p.cmdline()]
    assert len(workers) == 3
    workers[1].send_signal(signal.SIGKILL)
    said = finish(process)
    calm, killed = read(tmp_path / "calm.json"), read(tmp_path / "killed.json")
    assert killed["resumed_at"] >= 10 and killed["resumed_at"] % 10 == 0, said[-2000:]
    assert killed["losses"] == calm["losses"][killed["resumed_at"] :]
    assert killed["weights_sha256"] == calm["weights_sha256"]


# ----------------------------------------------------------------------------- checkpoints, in one process


def test_a_second_start_goes_on_and_ends_with_the_same_weights(tmp_path, one_process):
    common = ("--batch-size", 16, "--checkpoint-every", 3)
    one_process("--steps", 10, "--report", tmp_path / "whole.json", *common)
    one_process("--steps", 7, "--checkpoint-dir", tmp_path / "c", *common)
    status, said = one_process(
        "--steps", 10, "--checkpoint-dir", tmp_path / "c", "--report", tmp_path / "parts.json", *common
    )
    assert status == 0 and "from 7 on" in said
    whole, parts = read(tmp_path / "whole.json"), read(tmp_path / "parts.json")
    assert parts["weights_sha256"] == whole["weights_sha256"] and parts["losses"] == whole["losses"][7:]
    assert len(list((tmp_path / "c").iterdir())) == KEEP  # the newest, nothing unfinished


def test_a_run_that_is_complete_says_so_again(tmp_path, one_process):
    arguments = ("--steps", 3, "--batch-size", 16, "--checkpoint-dir", tmp_path)
    _, first = one_process(*arguments)
    status, again = one_process(*arguments)
    assert status == 0 and first.split("weights ")[1] == again.split("weights ")[1]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, one_process):
    arguments = ("--batch-size", 16, "--checkpoint-every", 2, "--checkpoint-dir", tmp_path)
    one_process("--steps", 4, *arguments)
    newest = max(tmp_path.glob("step_*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    status, said = one_process("--steps", 5, *arguments)
    assert status == 0 and "from 2 on" in said
    assert "damaged" in said and newest.name in said


@pytest.mark.parametrize(
    "other, named",
    [
        (("--model", "vit"), "model mlp, not vit"),
        (("--seed", 5), "seed 0, not 5"),
        (("--batch-size", 8), "batch_size 16, not 8"),
        (("--learning-rate", 0.5), "learning_rate 0.001, not 0.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(other, named, tmp_path, one_process):
    arguments = ("--steps", 1, "--batch-size", 16, "--checkpoint-dir", tmp_path)
    one_process(*arguments)
    status, said = one_process(*arguments, *other)
    assert status == 2 and named in said and "Traceback" not in said and said.strip().count("\n") == 0


def test_a_checkpoint_of_other_images_is_refused(tmp_path, one_process, monkeypatch):
    """Another number of images has another order of batches: MNIST downloaded in between, for instance."""
    arguments = ("--steps", 2, "--batch-size", 16, "--checkpoint-dir", tmp_path)
    one_process(*arguments)
    more = few_images()
    more = MNIST(
        more.train_images.repeat(2, 1),
        more.train_labels.repeat(2),
        more.test_images,
        more.test_labels,
        "noise",
    )
    monkeypatch.setattr(train_tasks, "load_data", lambda device: more)
    status, said = one_process(*arguments)
    assert status == 2 and "num_images 64, not 128" in said


def test_fewer_steps_than_the_checkpoint_has_is_an_error(tmp_path, one_process):
    arguments = ("--batch-size", 16, "--checkpoint-dir", tmp_path)
    one_process("--steps", 5, *arguments)
    status, said = one_process("--steps", 3, *arguments)
    assert status == 2 and "is at step 5 already, and --steps is 3" in said


# ----------------------------------------------------------------------------- what cannot run


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("--strategy", "zero"), "invalid choice: 'zero'"),
        (("--strategy", "ddp"), "needs torchrun: torchrun --standalone"),
        (("--model", "gpt"), "invalid choice: 'gpt'"),
        (("--steps", "0"), "0 is below 1"),
        (("--steps", "many"), "invalid positive value: 'many'"),
        (("--report", "/no/such/folder/report.json"), "cannot write --report /no/such/folder/report.json"),
        (("--checkpoint-dir", "/dev/null/inside"), "cannot write to /dev/null/inside (Not a directory)"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments, complaint, one_process):
    status, said = one_process(*arguments)
    assert status == 2 and complaint in said.splitlines()[-1] and "Traceback" not in said


def test_single_refuses_several_processes(one_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, said = one_process("--strategy", "single")
    assert status == 2 and "torchrun started 2" in said


def test_a_full_disk_ends_the_run_and_names_what_is_left(one_process, tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device", "step_00000002.unfinished")

    one_process("--steps", 1, "--batch-size", 16, "--checkpoint-dir", tmp_path)
    monkeypatch.setattr(script, "save_checkpoint", no_space)
    status, said = one_process("--steps", 2, "--batch-size", 16, "--checkpoint-dir", tmp_path)
    assert status == 1 and "No space left" in said and "start the same command again" in said
    assert [file.name for file in tmp_path.glob("step_*.pt")] == ["step_00000001.pt"]


def test_a_mistake_in_the_model_keeps_its_traceback(one_process, monkeypatch):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, images):
            return images @ self.weight

    monkeypatch.setitem(train_tasks.DIGIT_MODELS, "mlp", (Broken, "Linear"))
    with pytest.raises(RuntimeError):
        script.main(["--steps", "1"])
