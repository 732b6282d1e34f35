"""The host's second kind of DTensor worker, which needs NeMo Automodel, under a probe."""

import ray

from tests.nemo_rl import host_source
from tests.nemo_rl.worker_probe import Probe

# For the process in which the host makes the workers: it does not have their variables.
host_source.show_automodel()
from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import (  # noqa: E402
    DTensorPolicyWorkerV2Impl,
)


@ray.remote
class ProbedWorkerV2(Probe, DTensorPolicyWorkerV2Impl):
    pass
