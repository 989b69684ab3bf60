"""An answer that does not wait for its all-reduces leaves none behind: they would mix with the next check's."""

import time
from unittest.mock import patch

from workshop_utils.checks import replicas
from workshop_utils.collectives import ring_all_reduce_


def slowly(tensor):
    time.sleep(0.01)
    ring_all_reduce_(tensor)


def on_rank_waits_for_nothing():
    """(all-reduces started in the last step, how many of them still run when the check is over) on this rank."""
    jobs = []

    def install(module, start):
        for parameter in filter(lambda p: p.requires_grad, module.parameters()):
            parameter.register_post_accumulate_grad_hook(lambda p: jobs.append(start(p.grad.clone())))
        return lambda: None

    with patch.object(replicas, "ring_all_reduce_", slowly):
        seen = replicas.on_rank_train(install, lambda step, rank: True)
        running = sum(not job.done() for job in jobs)
        for job in jobs:
            job.result()
    return seen["steps"][-1]["unfinished"], running


def test_what_an_answer_did_not_wait_for_has_ended_when_the_check_is_over(ranks5):
    for unfinished, running in ranks5.run(on_rank_waits_for_nothing, timeout_s=20):
        assert unfinished > 0, "the answer is meant to leave some"
        assert running == 0
