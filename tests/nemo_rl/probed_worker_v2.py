"""The host's second kind of DTensor worker, which needs NeMo Automodel, under a probe."""

import ray
from nemo_rl.models.policy.workers.dtensor_policy_worker_v2 import DTensorPolicyWorkerV2Impl

from tests.nemo_rl.worker_probe import Probe


@ray.remote
class ProbedWorkerV2(Probe, DTensorPolicyWorkerV2Impl):
    pass
