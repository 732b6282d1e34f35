from pathlib import Path

import pytest
import yaml

from nemo_apo.compose import conf_dir
from nemo_apo.config import ConfigError
from nemo_apo.launch.cluster import Cluster, cluster_names, read_cluster

CPU = ["cluster=cpu"]


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        read_cluster(overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


class TestShippedFiles:
    def test_the_default_is_that_of_the_dataclass(self) -> None:
        assert read_cluster([]) == (Cluster(), [])

    @pytest.mark.parametrize("name", cluster_names())
    def test_a_file_holds_every_key_and_composes(self, name: str) -> None:
        text = (conf_dir() / "cluster" / f"{name}.yaml").read_text()
        assert set(yaml.safe_load(text)) == set(vars(Cluster()))
        read_cluster([f"cluster={name}"])

    def test_clusters(self) -> None:
        assert cluster_names() == ["cpu", "gpu", "pyxis"]
        assert read_cluster(CPU)[0].ranks_per_node == 2
        assert read_cluster(["cluster=pyxis"])[0].container is not None


class TestOverrides:
    def test_what_is_not_the_clusters_is_left_over_in_order(self) -> None:
        cluster, others = read_cluster(["run.seed=1", "cluster.nodes=4", "objective=gspo"])
        assert cluster.nodes == 4
        assert cluster.ranks == 32
        assert others == ["run.seed=1", "objective=gspo"]

    def test_an_override_wins_over_the_file_in_any_order(self) -> None:
        assert read_cluster(["cluster.processes_per_node=5", "cluster=cpu"])[0].ranks == 5

    def test_lists(self) -> None:
        text = "cluster.environment=['NCCL_DEBUG=WARN','A=b c']"
        assert read_cluster([text])[0].environment == ("NCCL_DEBUG=WARN", "A=b c")

    def test_a_file_of_ones_own(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        path.write_text("partition: h100\nnodes: 2\n")
        cluster, _ = read_cluster([f"cluster={path}", "cluster.nodes=3"])
        assert (cluster.partition, cluster.nodes) == ("h100", 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.node=4"], r"cluster\.node: there is no such key; did you mean cluster\.nodes"),
        (["cluster=cpuu"], r"cluster=cpuu: must be one of cpu, gpu, pyxis.*did you mean cpu"),
        (["cluster=/nowhere/x.yaml"], "No such file"),
        (["cluster.nodes=0"], r"cluster\.nodes=0: must be at least 1"),
        (["cluster.nodes=two"], r"cluster\.nodes=two: must be a whole number"),
        (["cluster.nodes=1,2"], "takes one value"),
        (["cluster.gpus_per_node=0"], r"cluster\.processes_per_node=null: must say how many"),
        (["cluster.processes_per_node=2"], r"cluster\.processes_per_node=2: must be null"),
        (["cluster.time=4h"], r"cluster\.time=4h: must be as Slurm writes it"),
        (["cluster.time='12:00'x"], "cannot be read"),
        (["cluster.partition='a b'"], "must be one word"),
        (["cluster.gpu=a100"], "must be one of h100, h200"),
        (["cluster.mounts=[/a:/b]"], r"mounts are a container's"),
        (["cluster=pyxis", "cluster.mounts=[data]"], "absolute paths"),
        (["cluster.extra_sbatch=[exclusive]"], "must be options"),
        (["cluster.environment=[A=1]"], "needs quotes inside quotes"),
        (["cluster.environment=['HF_TOKEN=x']"], "HF_TOKEN: looks like a secret"),
        (["cluster.env_file=secrets.env"], "must be an absolute path"),
        (["cluster.env_file=/nowhere/s.env"], "there is no such file"),
        (["cluster.stalled_starts=0"], "must be at least 1"),
        (["cluster.nodes=2", "cluster.master_addr=localhost"], "localhost: leads every node to"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    import re

    assert re.search(message, refusal(*overrides))


def test_a_secret_is_named_but_not_shown() -> None:
    assert "canary" not in refusal("cluster.environment=['MY_API_KEY=canary']")
