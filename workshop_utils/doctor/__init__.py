"""Is this machine ready for the workshop? `python -m workshop_utils doctor`, and notebook 00.

Each check looks at one thing and returns a `Check`; one that fails names its cure. No check changes anything,
none reaches beyond this machine.
"""

import json
import platform
from dataclasses import asdict

from workshop_utils.doctor.check import Check
from workshop_utils.doctor.environment import check_python, check_torch, check_versions, check_widgets
from workshop_utils.doctor.machine import check_cores, check_disk, check_gpu, check_memory, check_ports
from workshop_utils.doctor.trial import check_all_reduce, check_data, check_language_model

CHECKS = [
    check_python,
    check_versions,
    check_torch,
    check_widgets,
    check_cores,
    check_memory,
    check_disk,
    check_gpu,
    check_ports,
    check_data,
    check_language_model,
    check_all_reduce,
]


def run_checks(quick: bool = False) -> list[Check]:
    """Run all checks in order. quick leaves out the two-rank all_reduce, which takes some seconds."""
    checks = []
    for check in CHECKS:
        if quick and check is check_all_reduce:
            continue
        try:
            found = check()
        except Exception as error:  # noqa: BLE001  a check that fails to run must not hide the others
            name = check.__name__.removeprefix("check_").replace("_", " ")
            found = Check(
                name, "fail", f"{type(error).__name__}: {error}", "please report this line as an issue"
            )
        checks += found if isinstance(found, list) else [found]
    return checks


def report(quick: bool = False):
    """Print the checks, one a line, failing ones with their cure. For notebooks."""
    print(as_text(run_checks(quick)))


def as_text(checks: list[Check]) -> str:
    lines = []
    for check in checks:
        mark = check.status.upper() if check.status == "fail" else check.status
        lines.append(f"{mark:<5}{check.name:<14}{check.detail}")
        if check.cure:
            lines.append(f"{'':<19}-> {check.cure}")
    failed = sum(check.status == "fail" for check in checks)
    lines.append("Ready." if not failed else f"{failed} of {len(checks)} checks failed; each names its cure.")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> str:
    """What an instructor collects from a room: one object per machine."""
    ready = not any(check.status == "fail" for check in checks)
    machine = {"host": platform.node(), "system": platform.platform(), "ready": ready}
    return json.dumps(machine | {"checks": [asdict(check) for check in checks]}, indent=1)
