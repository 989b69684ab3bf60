"""Checks of the machine: cores, memory, disk, GPU, ports."""

import os
import shutil
import socket
import subprocess
import tempfile
import warnings
from pathlib import Path

import psutil

from workshop_utils.doctor.check import GB, ROOT, Check

LEAST_MEMORY_GB, GOOD_MEMORY_GB = 2.0, 4.0  # four ranks hold 1.4 GB together before they do anything
LEAST_DISK_GB = 1.0


def check_cores() -> Check:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    if count < 2:
        cure = "works, slowly; give the container or virtual machine two cores if you can"
        return Check("cores", "warn", "1 core for 4 ranks", cure)
    return Check("cores", "ok", f"{count}")


def check_memory() -> Check:
    memory = psutil.virtual_memory()
    total_bytes, free_bytes = memory.total, memory.available
    limit = _cgroup("memory.max")
    if limit.isdigit() and int(limit) < total_bytes:
        total_bytes = int(limit)
        free_bytes = min(free_bytes, total_bytes - int(_cgroup("memory.current") or 0))
    detail = f"{free_bytes / GB:.1f} of {total_bytes / GB:.1f} GB free"
    cure = "close other programs and other notebooks' kernels, or start 2 ranks instead of 4"
    status = (
        "fail" if free_bytes < LEAST_MEMORY_GB * GB else "warn" if free_bytes < GOOD_MEMORY_GB * GB else "ok"
    )
    return Check("memory", status, detail, "" if status == "ok" else cure)


def check_disk() -> Check:
    folders = {"the workshop's folder": ROOT, "the folder for temporary files": Path(tempfile.gettempdir())}
    for called, folder in folders.items():
        free_gb = shutil.disk_usage(folder).free / GB
        if free_gb < LEAST_DISK_GB:
            cure = f"free {LEAST_DISK_GB:.0f} GB there (TMPDIR moves temporary files elsewhere)"
            return Check("disk", "fail", f"{free_gb:.1f} GB free in {called}", cure)
    return Check("disk", "ok", f"{shutil.disk_usage(ROOT).free / GB:.0f} GB free")


def check_gpu() -> Check:
    """A GPU is welcome and nowhere needed."""
    try:
        import torch
    except (ImportError, OSError):
        return Check("gpu", "skip", "torch cannot be imported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CUDA build without a driver says so at length
        usable = torch.cuda.is_available()
    names = _nvidia_names()
    if usable:
        return Check("gpu", "ok", ", ".join(names) or f"{torch.cuda.device_count()} CUDA device(s)")
    if names:
        cure = "nothing needs it; to use it: `rm -rf .venv && make setup`, and a driver that fits torch"
        return Check("gpu", "warn", f"{', '.join(names)}, but torch {torch.__version__} cannot use it", cure)
    if torch.backends.mps.is_available():
        return Check("gpu", "ok", "Apple's, through mps")
    return Check("gpu", "ok", "none, and none is needed")


def _nvidia_names() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip().replace(",", "") for line in listed.splitlines() if line.strip()]


def check_ports() -> Check:
    """A socket on 127.0.0.1 can be opened and reached: JupyterLab and gloo need that."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=3) as client:
                server.settimeout(3)
                connection, _ = server.accept()
                with connection:
                    client.sendall(b"x")
                    connection.settimeout(3)
                    connection.recv(1)
    except OSError as error:
        cure = "allow local connections for Python in the firewall; on Linux: ip link set lo up"
        return Check("ports", "fail", f"127.0.0.1 cannot be reached: {error}", cure)
    return Check("ports", "ok", "127.0.0.1 can be reached")


def _cgroup(name: str) -> str:
    """A limit that a container sets (cgroup v2); "" where there is none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""
