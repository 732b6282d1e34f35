"""The host's first kind of DTensor worker under a probe. For the processes of the workers only."""

import ray
from nemo_rl.models.policy.workers.dtensor_policy_worker import DTensorPolicyWorkerImpl

from tests.nemo_rl.worker_probe import Probe


@ray.remote
class ProbedWorkerV1(Probe, DTensorPolicyWorkerImpl):
    pass
