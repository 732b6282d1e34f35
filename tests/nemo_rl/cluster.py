"""A Ray of the tests' own on this machine, and the host's policy on it."""

import gc
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.nemo_rl import cpu_host, host_config, host_source
from tests.nemo_rl.tiny_model import load_tokenizer

# Slots, not cores or devices: the host asks for one per worker and per environment. There is room
# for two policies at a time.
_CPU_SLOTS = 16
_GPU_SLOTS = 2 * host_config.WORKERS
_OBJECT_STORE_BYTES = 200 * 2**20
_IN_EVERY_PROCESS = {
    # Ray hands out what it finds here, devices or not.
    "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(_GPU_SLOTS))),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(host_source.python_path()) if not host_source.missing() else "",
    # Without it Ray hides the devices of actors that ask for none, and warns that it will not.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray would make a token and keep it in the home folder.
    "RAY_AUTH_TOKEN": secrets.token_hex(16),
    # The driver has nothing to do but wait for them.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TENSORBOARD_NO_TF": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_WORKER_CLASSES = {
    1: "tests.nemo_rl.probed_worker_v1.ProbedWorkerV1",
    2: "tests.nemo_rl.probed_worker_v2.ProbedWorkerV2",
}


@contextmanager
def running_ray() -> Iterator[None]:
    """Ray, started and ended; its processes put the CPU shims in place before anything else."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _IN_EVERY_PROCESS.items():
            patch.setenv(name, value)
        _run_every_actor_here()
        # Sockets are made below it, and their paths may not be long.
        with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder, cpu_host.in_driver():
            started = ray.init(
                address="local",
                num_cpus=_CPU_SLOTS,
                num_gpus=_GPU_SLOTS,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                runtime_env={
                    "env_vars": _IN_EVERY_PROCESS,
                    "worker_process_setup_hook": cpu_host.install_in_worker,
                },
                _temp_dir=folder,
            )
            # The host asks for it by what the environment says, and fails if there are several.
            patch.setenv("RAY_ADDRESS", started.address_info["gcs_address"])
            try:
                yield
            finally:
                # The host's clusters remove their placement groups when they are collected.
                gc.collect()
                ray.shutdown()


def _run_every_actor_here() -> None:
    """The host would make an environment per kind of actor."""
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY

    for name in (*ACTOR_ENVIRONMENT_REGISTRY, *_WORKER_CLASSES.values()):
        ACTOR_ENVIRONMENT_REGISTRY[name] = sys.executable


@contextmanager
def policy(config: Any, base: type | None = None) -> Iterator[Any]:
    """A policy of the host on two workers, which are ended with it.

    Args:
        config: the host's ``MasterConfig``.
        base: its ``Policy`` unless given, or a class derived from it.
    """
    from nemo_rl.distributed.virtual_cluster import RayVirtualCluster
    from nemo_rl.models.policy.lm_policy import Policy

    placed = RayVirtualCluster(
        bundle_ct_per_node_list=[host_config.WORKERS],
        use_gpus=True,
        num_gpus_per_node=host_config.WORKERS,
        max_colocated_worker_groups=1,
        name=f"tests-{secrets.token_hex(4)}",
    )
    made = None
    try:
        made = probed(base or Policy)(
            cluster=placed,
            config=config.policy,
            tokenizer=load_tokenizer(config.policy["model_name"]),
            init_reference_model=False,
        )
        yield made
    finally:
        if made is not None:
            made.shutdown()
        placed.shutdown()


def probed(base: type) -> type:
    """A policy class of the host whose workers can be looked into."""

    class Probed(base):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            version = 2 if kwargs["config"]["dtensor_cfg"]["_v2"] else 1
            names = {"name_prefix": f"policy-{secrets.token_hex(4)}"}
            super().__init__(**names, **kwargs, worker_extension_cls_fqn=_WORKER_CLASSES[version])
            self._on_all("watch_optimizer")

        def gradients(self) -> list[dict[str, Any]]:
            """Those of every optimizer step since the last call."""
            return self._on_all("take_gradients")

        def weights(self) -> dict[str, Any]:
            return self._on_all("weights")

        def put_weights(self, weights: dict[str, Any]) -> None:
            self._on_all("put_weights", weights=weights)

        def use_dynamic_batching(self, enabled: bool) -> None:
            """Of a policy that was made with it."""
            self.use_dynamic_batches = enabled
            self._on_all("use_dynamic_batching", enabled=enabled)

        def _on_all(self, method: str, **kwargs: Any) -> Any:
            """A method of the probe on all workers; what the first of them returns."""
            return self.run_all_workers_single_data(method, **kwargs)[0]

    return Probed
