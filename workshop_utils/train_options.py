"""The command line of workshop_utils.train: its options, and in one line why a run cannot begin."""

import argparse
import os
from pathlib import Path

from workshop_utils.train_tasks import MODELS


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workshop_utils.train",
        usage="%(prog)s [options]\n       torchrun --standalone --nproc-per-node=4 -m workshop_utils.train [options]",
        description="Train a classifier of digits, or SmolLM2 to write JSON records, on one process or on many.",
    )
    add = parser.add_argument
    add("--strategy", choices=["single", "ddp", "fsdp"], default="single", help="who holds what (single)")
    add("--model", choices=list(MODELS), default="mlp", help="what is trained (mlp)")
    add("--steps", type=positive, help="training steps, counted from the beginning (200; smollm2: 40)")
    add("--batch-size", type=positive, help="samples in a step, all ranks together (256; smollm2: 8)")
    add("--learning-rate", type=float, help="Adam's (0.001; smollm2: 0.0004)")
    add("--lora-r", type=positive, metavar="R", help="smollm2: train only a LoRA adapter with this r")
    add("--quantize", choices=["none", "nf4"], default="none", help="smollm2: the frozen layers (none)")
    add("--seed", type=int, default=0, help="of the first weights and of the order of the samples (0)")
    add("--checkpoint-dir", type=Path, help="where checkpoints are; a run goes on from the newest")
    add("--checkpoint-every", type=positive, default=50, metavar="STEPS", help="and one at the end (50)")
    add("--timeout-s", type=positive, default=60, help="how long a rank waits for another (60)")
    add(
        "--report",
        type=Path,
        help="rank 0 writes losses, times, bytes and a hash of the weights there (JSON)",
    )
    options = parser.parse_args(arguments)
    for name, default in MODELS[options.model].DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def problem_with(options: argparse.Namespace) -> str | None:
    """Why this run cannot begin, in one line."""
    world_size = told("WORLD_SIZE", 1)
    if options.strategy == "single" and world_size > 1:
        return f"--strategy single is for one process, and torchrun started {world_size}: choose ddp or fsdp"
    if options.strategy != "single" and "RANK" not in os.environ:
        return (
            f"--strategy {options.strategy} needs torchrun: torchrun --standalone --nproc-per-node=4 "
            f"-m workshop_utils.train --strategy {options.strategy}"
        )
    if options.batch_size < world_size:
        return f"--batch-size {options.batch_size} leaves nothing to do for some of {world_size} ranks"
    if options.model != "smollm2" and (options.lora_r or options.quantize != "none"):
        given = "--lora-r" if options.lora_r else "--quantize"
        return f"{given} is for --model smollm2: {options.model} is small enough to be trained whole"
    if options.quantize != "none" and not options.lora_r:
        return "--quantize freezes the layers, so nothing could learn: give --lora-r too, for instance --lora-r 8"
    try:
        if options.report:
            options.report.open("a").close()
    except OSError as error:
        return f"cannot write --report {options.report} ({error.strerror})"
    return None


def told(name: str, default: int) -> int:
    """A number that torchrun has put into the environment."""
    return int(os.environ.get(name, default))
