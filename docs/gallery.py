"""Take the pictures of docs/GALLERY.md out of the executed notebooks: `python docs/gallery.py`, part of `make solutions`.

A picture is named by its notebook, by a line of the cell that drew it, and by its number among that cell's pictures.
"""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "gallery"
PICTURES = {
    "dependencies": ("01_single_device_mlp", "plot_dependencies()", 0),
    "all_reduce_of_digits": ("02_all_reduce", 'show_collective("all-reduce"', 1),
    "ring": ("02_all_reduce", 'all_reduce_stepper("ring"', 0),
    "cost_of_64_ranks": ("02_all_reduce", "alpha_beta(64", 0),
    "overlap": ("03_distributed_data_parallel", "bucket_timeline(step_s", 0),
    "memory_bill": ("04_fully_sharded_data_parallel", "memory_bill(7_500_000_000", 1),
    "live_bytes": ("04_fully_sharded_data_parallel", '"One unit at a time', 0),
    "lora_accuracy": ("05_lora", '"Even or odd: full fine-tuning', 0),
    "intrinsic_dimension": (
        "06_intrinsic_dimension",
        'intrinsic_dimension(percent=90, definition="global")',
        0,
    ),
    "lora_as_subspace": ("06_intrinsic_dimension", "plot_convergence(compared", 0),
    "nf4_levels": ("07_qlora", "plot_levels(formats)", 0),
    "qlora_bill": ("07_qlora", '"Training with Adam, activations left out"', 1),
    "fsdp_switches": ("08_fsdp_and_qlora", '"FSDP with LoRA on SmolLM2', 0),
    "planner": ("08_fsdp_and_qlora", 'planner("llama-8b"', 0),
}


def picture(notebook: str, line: str, number: int) -> bytes:
    """The PNG that the solution of `notebook` shows: picture `number` of the one cell whose source has `line`."""
    cells = json.loads((ROOT / "notebooks" / "solutions" / f"{notebook}.ipynb").read_text("utf-8"))["cells"]
    found = [cell for cell in cells if cell["cell_type"] == "code" and line in "".join(cell["source"])]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} code cells of {notebook} have {line!r}, expected one: see docs/gallery.py"
        )
    shown = [output.get("data", {}).get("image/png") for output in found[0]["outputs"]]
    pictures = [base64.b64decode(data) for data in shown if data]
    if number >= len(pictures):
        raise ValueError(
            f"the cell of {notebook} with {line!r} shows {len(pictures)} pictures, no number {number}"
        )
    return pictures[number]


def main():
    for name, place in PICTURES.items():
        (FOLDER / f"{name}.png").write_bytes(picture(*place))


if __name__ == "__main__":
    main()
