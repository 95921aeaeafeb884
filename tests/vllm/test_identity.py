"""Workers whose bytes differ never share key and fingerprint; workers on one node never share a port."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.vllm.engine_process import vllm_config
from vllm_rfork.config import parse_config
from vllm_rfork.seed_key import WorkerIdentity, build_fingerprint, build_seed_key
from vllm_rfork.seeding.publication import seed_ports
from vllm_rfork.vllm_compat.fingerprint.facts import fingerprint_facts
from vllm_rfork.vllm_compat.worker_identity import worker_identity

pytestmark = pytest.mark.vllm

MOE = SimpleNamespace(is_moe=True, runner_type="generate")
DENSE = SimpleNamespace(is_moe=False, runner_type="generate")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts this process at a place in vLLM's groups."""
    from vllm.distributed import parallel_state

    def put(*, tp: int = 0, pp: int = 0, ep: int = 0, pcp: int = 0, local: int = 0) -> None:
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: tp)
        monkeypatch.setattr(parallel_state, "get_world_group", lambda: SimpleNamespace(local_rank=local))
        for name, rank in (("pp", pp), ("ep", ep), ("pcp", pcp)):
            group = SimpleNamespace(rank_in_group=rank)
            monkeypatch.setattr(parallel_state, f"get_{name}_group", lambda group=group: group)

    return put


def parallel(**changes: Any) -> Any:
    """A parallel configuration as a worker finds it: sizes and ranks by name."""
    sizes = {f"{name}_size": 1 for name in ("tensor_parallel", "pipeline_parallel", "data_parallel")}
    return SimpleNamespace(
        **{
            **sizes,
            "prefill_context_parallel_size": 1,
            "enable_expert_parallel": False,
            "node_rank": 0,
            "data_parallel_rank": 0,
            "data_parallel_rank_local": None,
            "data_parallel_index": 0,
            "distributed_executor_backend": "mp",
            **changes,
        }
    )


def identity(model: Any = DENSE, *, kv_role: str | None = None, draft: bool = False, **changes: Any) -> WorkerIdentity:
    kv_transfer = None if kv_role is None else SimpleNamespace(kv_role=kv_role)
    speculative = SimpleNamespace(draft_model_config=model if draft else None)
    config = SimpleNamespace(
        parallel_config=parallel(**changes), kv_transfer_config=kv_transfer, speculative_config=speculative
    )
    return worker_identity(config, model)


def key(*args: Any, **kwargs: Any) -> str:
    return build_seed_key("m", "s", identity(*args, **kwargs))


@pytest.mark.parametrize("rank", range(4))
def test_expert_parallel_ranks_are_told_apart_where_there_are_experts(rank: int, stand: Any) -> None:
    """Two data parallel engines of two tensor parallel ranks: four expert parallel ones."""
    stand(tp=rank % 2, ep=rank)
    place = {"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2}
    assert key(MOE, **place) == f"m$s$kv_both$0${rank % 2}$ep{rank}"
    assert key(MOE, draft=True, **place) == f"m$s$kv_both$0${rank % 2}$ep{rank}$draft"
    assert key(DENSE, **place) == f"m$s$kv_both$0${rank % 2}", "a dense draft beside it has no experts"


def test_pipeline_stages_and_nodes_are_told_apart(stand: Any) -> None:
    found = set()
    for node, stage, rank in itertools.product(range(2), range(2), range(2)):
        stand(tp=rank, pp=stage)
        found.add(key(node_rank=node, pipeline_parallel_size=2, tensor_parallel_size=2))
    assert found == {f"m$s$kv_both${node}$pp{stage}${rank}" for node in (0, 1) for stage in (0, 1) for rank in (0, 1)}


@pytest.mark.parametrize(
    ("role", "said"),
    [(None, "kv_both"), ("kv_both", "kv_both"), ("kv_producer", "kv_producer"), ("kv_consumer", "kv_consumer")],
)
def test_roles_in_kv_transfer_are_told_apart(role: str | None, said: str, stand: Any) -> None:
    stand()
    assert key(kv_role=role) == f"m$s${said}$0$0"


def test_a_draft_is_not_its_target_even_where_it_is_only_known_by_its_runner(stand: Any) -> None:
    stand()
    assert key(draft=True) == "m$s$kv_both$0$0$draft"
    assert key(SimpleNamespace(is_moe=False, runner_type="draft")) == "m$s$kv_both$0$0$draft"
    assert key() == "m$s$kv_both$0$0"


def both(config: Any, context_rank: int = 0) -> str:
    """The fingerprint; the seed key of the ranks in these tests is one and the same."""
    facts = fingerprint_facts(
        config,
        config.model_config,
        layout="checkpoint",
        engine="memory",
        device=torch.device("cpu"),
        dummy=False,
        context_rank=context_rank,
    )
    return build_fingerprint(facts)


def test_experts_cut_across_data_parallel_ranks_are_told_apart(model_a: Path, stand: Any) -> None:
    """Without expert parallelism vLLM cuts each expert across tensor, context and data parallel ranks alike.

    The seed key has no place for the latter two: shapes, names and types are equal, the bytes are others.
    """
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    slices = {
        FusedMoEParallelConfig.flatten_tp_across_dp_and_pcp(1, 2, dp_rank, 2, pcp_rank)
        for dp_rank in range(2)
        for pcp_rank in range(2)
    }
    assert slices == {(4, 0), (4, 1), (4, 2), (4, 3)}, "the test is about this"
    stand()
    config = vllm_config(model_a)
    config.parallel_config.data_parallel_size = 2
    found = set()
    for dp_rank, context_rank in itertools.product(range(2), range(2)):
        config.parallel_config.data_parallel_rank = dp_rank
        found.add(both(config, context_rank))
    assert len(found) == 4


def test_data_parallel_replicas_of_a_dense_model_may_read_each_other(model_a: Path, stand: Any) -> None:
    """vLLM makes each of them an instance of its own."""
    prints, keys = set(), set()
    for index in range(2):
        stand(local=index)
        config = vllm_config(model_a)
        config.parallel_config.data_parallel_size = 2
        config.parallel_config.data_parallel_rank = config.parallel_config.data_parallel_index = index
        config.parallel_config.reconfigure_for_independent_dp_rank()
        prints.add(both(config))
        keys.add(build_seed_key("m", "s", worker_identity(config, config.model_config)))
    assert len(prints) == len(keys) == 1


def of_a_node(model: Path, node: int, **changes: Any) -> Any:
    """As ``vllm serve --nnodes 2 --node-rank`` configures it, on the leader and headless."""
    return vllm_config(
        model,
        nnodes=2,
        node_rank=node,
        master_addr="127.0.0.1",
        master_port=29999,
        distributed_executor_backend="mp",
        **changes,
    )


def test_a_worker_s_key_says_its_node_and_its_rank_in_the_instance(model_a: Path, stand: Any) -> None:
    """Two nodes with one instance of two tensor parallel ranks: the second node's worker has its rank over both."""
    found = []
    for node in range(2):
        config = of_a_node(model_a, node, tensor_parallel_size=2)
        stand(tp=node)
        found.append(build_seed_key("m", "s", worker_identity(config, config.model_config)))
    assert found == ["m$s$kv_both$0$0", "m$s$kv_both$1$1"]


def test_dense_replicas_on_different_nodes_may_read_each_other(model_a: Path, stand: Any) -> None:
    """vLLM counts nodes within a replica before it starts one."""
    prints, keys = set(), set()
    for node in range(2):
        stand()
        config = of_a_node(model_a, node, data_parallel_size=2)
        config.parallel_config.data_parallel_index = node
        config.parallel_config.reconfigure_for_independent_dp_rank()
        prints.add(both(config))
        keys.add(build_seed_key("m", "s", worker_identity(config, config.model_config)))
    assert keys == {"m$s$kv_both$0$0"}
    assert len(prints) == 1


def test_the_rank_in_context_parallelism_is_found(stand: Any) -> None:
    stand(pcp=1)
    assert identity(prefill_context_parallel_size=2).context_rank == 1
    assert identity().context_rank == 0


#: How the worker's number on its node comes about: on GPUs and NPUs vLLM adds the engines before it, on CPU not, and
#: external launchers count for themselves.
NUMBERED = {
    "added up": (lambda dp, rank: 2 * dp + rank, {"distributed_executor_backend": "mp"}),
    "from 0 in each engine": (lambda dp, rank: rank, {"distributed_executor_backend": "mp"}),
    "by a launcher": (lambda dp, rank: 2 * dp + rank, {"distributed_executor_backend": "external_launcher"}),
}


@pytest.mark.parametrize("how", NUMBERED)
@pytest.mark.parametrize("local_is_known", [True, False])
def test_every_worker_and_role_of_a_node_has_its_own_port(how: str, local_is_known: bool, stand: Any) -> None:
    settings = parse_config({"rfork_seed_port_base": 9000}, {}).settings
    number, backend = NUMBERED[how]
    ports = []
    for dp, rank, draft in itertools.product(range(3), range(2), (False, True)):
        stand(tp=rank, local=number(dp, rank))
        known = dp if local_is_known and how != "by a launcher" else None
        place = {"tensor_parallel_size": 2, "data_parallel_rank_local": known, "data_parallel_index": dp, **backend}
        ports.append(seed_ports(settings, identity(draft=draft, **place))[0])
    assert ports == list(range(9000, 9012))
