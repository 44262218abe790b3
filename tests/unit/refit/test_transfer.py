"""Which transport carries the weights, and that vLLM takes what we hand to it."""

import ast
import contextlib
import inspect
import json
import threading

import httpx
import pytest
import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import ipc_engine, m2n_trainer
from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.entrypoints.rl.online import api_router
from vllm.entrypoints.serve.dev.sleep import api_router as sleep_router

from nemo_paced.config import RefitBackend, RolloutConfig, RolloutPlacement, WeightSwap
from nemo_paced.errors import ConfigError, RolloutError, WeightsLost
from nemo_paced.refit import file_sender, gloo_group, gloo_transfer, meeting
from nemo_paced.refit.file_sender import FileSender
from nemo_paced.refit.gloo_transfer import GlooSender
from nemo_paced.refit.server_weights import ServerWeights
from nemo_paced.refit.weight_source import ParamMeta
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.serving import backends
from nemo_paced.serving.backends import choose_backend
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.replicas import Replicas
from nemo_paced.serving.vllm_engine import _json_safe

HERE, ELSEWHERE = ["127.0.0.1"], ["127.0.0.1", "10.0.0.7"]


@pytest.mark.parametrize(
    ("gpus", "hosts", "placement", "packages", "chosen"),
    [
        (0, HERE, "separate", {"vllm"}, "file"),
        (0, ELSEWHERE, "separate", {"vllm"}, "gloo"),
        (8, HERE, "separate", set(), "file"),
        (8, ELSEWHERE, "separate", set(), "gloo"),
        (8, HERE, "separate", {"vllm"}, "nccl"),
        (8, ELSEWHERE, "separate", {"vllm", "nccl.m2n"}, "nccl_m2n"),
        (8, HERE, "colocated", {"vllm", "nccl.m2n"}, "ipc"),
    ],
)
def test_auto_takes_what_hardware_and_packages_allow(
    monkeypatch, gpus, hosts, placement, packages, chosen
):
    monkeypatch.setattr(backends, "importable", lambda package: package in packages)
    config = RolloutConfig(placement=RolloutPlacement(placement))
    assert choose_backend(config, gpus, hosts) is RefitBackend(chosen)


def test_a_transport_that_lacks_something_names_all_of_it(monkeypatch):
    monkeypatch.setattr(backends, "importable", lambda package: False)
    with pytest.raises(ConfigError, match=r"nccl_m2n, which needs a GPU .*; vllm .*nccl4py"):
        choose_backend(RolloutConfig(refit=RefitBackend.nccl_m2n), 0, HERE)
    assert choose_backend(RolloutConfig(refit=RefitBackend.gloo), 0, HERE) is RefitBackend.gloo


def test_the_server_is_started_for_the_transport_and_to_sleep(monkeypatch, tmp_path):
    monkeypatch.setattr("nemo_paced.serving.replicas.gpu_count", lambda: 8)
    config = RolloutConfig(placement=RolloutPlacement.colocated)

    def started(**options):
        replicas = Replicas(
            tmp_path, config, max_model_len=8, dtype="bfloat16", log_path=tmp_path / "l", **options
        )
        (sidecar,) = replicas.sidecars.values()
        engine, served = sidecar.engine, sidecar.served
        return replicas, engine.command(served), engine.environment(served)

    replicas, command, environment = started(trainer_gpus=8)
    assert replicas.sleep and "--enable-sleep-mode" in command
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": "ipc"}
    assert environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    replicas, command, _ = started()  # nobody trains on its GPUs
    assert not replicas.sleep and "--enable-sleep-mode" not in command


def servers(monkeypatch, answers):
    """Two servers' control routes: ``answers(host, path, body)``; returns what they were asked."""
    asked = []

    def respond(request):
        body = json.loads(request.content) if request.content else None
        asked.append((request.url.host, request.url.path, dict(request.url.params), body))
        return httpx.Response(200, json=answers(request.url.host, request.url.path))

    plain = httpx.Client
    monkeypatch.setattr(
        "nemo_paced.serving.client.httpx.Client",
        lambda **options: plain(transport=httpx.MockTransport(respond), **options),
    )
    return RolloutClient(["http://a:1", "http://b:1"], "key"), asked


def test_workers_of_several_servers_are_numbered_one_after_another(monkeypatch):
    sizes = {"a": 2, "b": 4}
    client, asked = servers(monkeypatch, lambda host, path: {"world_size": sizes[host]})
    sync = WeightSync(client, WeightSwap.between_requests)
    sync.init_weight_transfer_engine({"rank_offset": 3, "world_size": 9})
    joined = {
        host: body["init_info"]
        for host, path, _, body in asked
        if path == "/init_weight_transfer_engine"
    }
    assert joined == {
        "a": {"rank_offset": 3, "world_size": 9},
        "b": {"rank_offset": 5, "world_size": 9},
    }


@pytest.mark.parametrize(
    ("endpoints", "towards"),
    [
        (["http://127.0.0.1:1", "http://localhost:2"], "127.0.0.1"),
        (["http://127.0.0.1:1", "http://node2:2"], "address towards node2"),
        (["http://node1:1", "http://127.0.0.1:2"], "address towards node1"),
    ],
)
def test_servers_meet_the_trainer_where_each_of_them_reaches_it(monkeypatch, endpoints, towards):
    monkeypatch.setattr(meeting, "_address_towards", lambda host: f"address towards {host}")
    monkeypatch.setattr(meeting, "free_ports", lambda address, count: [7])
    sync = WeightSync(RolloutClient(endpoints, "key"), WeightSwap.between_requests)
    monkeypatch.setattr(sync, "num_workers", lambda: [1] * len(endpoints))
    assert meeting.meeting(RefitBackend.gloo, sync).address == towards


@pytest.mark.parametrize(("swap", "mode"), [("between_requests", "wait"), ("in_flight", "keep")])
def test_requests_under_way_are_finished_or_held(monkeypatch, swap, mode):
    client, asked = servers(monkeypatch, lambda host, path: {})
    sync = WeightSync(client, WeightSwap(swap))
    sync.pause()
    sync.resume()
    assert {(path, *params.items()) for _, path, params, _ in asked} == {
        ("/pause", ("mode", mode), ("clear_cache", "true")),
        ("/reset_prefix_cache", ("reset_running_requests", "true")),
        ("/resume",),
    }


def test_servers_that_hold_different_weights_are_named(monkeypatch):
    sums = {"a": {"x": "1", "y": "2"}, "b": {"x": "1", "y": "3"}}
    client, _ = servers(monkeypatch, lambda host, path: {"checksums": sums[host]})
    with pytest.raises(RolloutError, match=r"b:1 and http://a:1 hold different weights .*\(y, 1"):
        WeightSync(client, WeightSwap.between_requests).check_same_weights()
    sums["b"]["y"] = "2"
    WeightSync(client, WeightSwap.between_requests).check_same_weights()


def test_vllms_engines_find_the_methods_that_they_call():
    client = WeightSync(RolloutClient(["http://a:1"], "k"), WeightSwap.between_requests)
    assert isinstance(client, VLLMWeightSyncClient)
    for method in ("init_weight_transfer_engine", "update_weights", "finish_weight_update"):
        ours = inspect.signature(getattr(WeightSync, method)).parameters
        theirs = inspect.signature(getattr(VLLMWeightSyncClient, method)).parameters
        assert list(ours) == list(theirs), method
    # we renumber what they hand over under this name
    assert "rank_offset" in inspect.signature(NCCLWeightTransferInitInfo).parameters
    assert '"rank_offset"' in inspect.getsource(m2n_trainer)


def test_cuda_handles_travel_as_vllm_reads_them(monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    handles = [{"GPU-1": (1, b"\x00", "x")}]
    info = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]], "ipc_handles": handles}
    sent = json.loads(json.dumps(_json_safe({**info, "ipc_handles_pickled": None})))
    assert ipc_engine.IPCWeightTransferUpdateInfo(**sent).ipc_handles == handles


def test_the_routes_that_we_call_are_in_vllm():
    def routes(module):
        return {
            node.value
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.Constant) and str(node.value).startswith("/")
        }

    assert {"/pause", "/resume", "/weight_checker", "/get_world_size", "/weight_info"} <= routes(
        api_router
    )
    assert {"/sleep", "/wake_up"} <= routes(sleep_router)
    taken = inspect.signature(sleep_router.sleep).parameters
    assert {"level", "mode"} <= taken.keys()


class OneSender:
    """A sender that ends, well or with an error, when it is let go."""

    again = None

    def __init__(self, error=None):
        self.error = error
        self.sends, self.let_go = threading.Event(), threading.Event()

    def send_weights(self):
        self.sends.set()
        assert self.let_go.wait(10)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, RolloutError("lost")])
def test_a_thread_that_samples_waits_for_an_update_and_no_longer(monkeypatch, tmp_path, error):
    client, asked = servers(
        monkeypatch, lambda host, path: {"weight_version": "3", "checksums": {}}
    )
    weights = ServerWeights(client, RefitBackend.gloo, WeightSwap.between_requests, tmp_path)
    weights._sent = "3"
    assert weights.begin("3") is None, "the group stands"
    assert weights.usable() == client.endpoints, "it is not paused yet"
    sender, looked = OneSender(error), []

    def update():
        with contextlib.suppress(RolloutError):
            weights.update(sender)

    threads = [
        threading.Thread(target=update),
        threading.Thread(target=lambda: looked.append(weights.usable())),
    ]
    threads[0].start()
    assert sender.sends.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert not looked, "it waits"
    sender.let_go.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert looked == [client.endpoints]
    resumed = "/resume" in [path for _, path, _, _ in asked]
    assert resumed is (error is None), "servers with half an update stay paused"


@pytest.fixture
def sent_files(monkeypatch):
    """A sender of files of two servers, and what these were asked to load, in contents."""
    client, asked = servers(monkeypatch, lambda host, path: {"weight_version": "default"})
    sync = WeightSync(client, WeightSwap.between_requests)
    loaded = []

    def update_weights(info):
        loaded.append(load_file(info["path"]))

    monkeypatch.setattr(sync, "update_weights", update_weights)
    return sync, loaded, asked


def test_files_hold_every_tensor_of_the_source_and_the_last_version_stays(
    monkeypatch, tmp_path, sent_files
):
    monkeypatch.setattr(file_sender, "FILE_BYTES", 20)
    sync, loaded, _ = sent_files
    weights = {name: torch.full((3,), float(n)) for n, name in enumerate("abc")}
    sender = FileSender(sync, weights.items(), tmp_path)
    sender.prepare()
    sender.send_weights()
    assert [list(part) for part in loaded] == [["a", "b"], ["c"]], "a file ends at FILE_BYTES"
    weights["c"] = torch.full((3,), 7.0)
    sender.prepare()  # and meanwhile a server asks for what was sent last
    loaded.clear()
    sender.again(sync)
    assert loaded[1]["c"].tolist() == [2.0] * 3
    sender.send_weights()
    assert loaded[-1]["c"].tolist() == [7.0] * 3
    loaded.clear()
    sender.send_weights()  # repeated: a server was lost on the way
    assert {name for part in loaded for name in part} == set("abc")
    assert len(list(tmp_path.iterdir())) == 1, "files of earlier versions are gone"
    sender.shutdown()
    assert not list(tmp_path.iterdir())


def test_ranks_without_servers_take_part_and_write_nothing():
    passes = []

    class Source:
        def __iter__(self):
            passes.append(1)
            return iter([("a", None)])

    sender = FileSender(None, Source(), None)
    sender.prepare()
    sender.send_weights()
    sender.shutdown()
    assert passes == [1]


def test_servers_without_the_weights_are_left_out_until_none_has_them(monkeypatch, tmp_path):
    versions = {"a": "3", "b": "default"}
    client, _ = servers(monkeypatch, lambda host, path: {"weight_version": versions[host]})
    weights = ServerWeights(client, RefitBackend.gloo, WeightSwap.between_requests, tmp_path)
    assert weights.usable() == client.endpoints, "none was ever sent"
    weights._sent = "3"
    assert weights.usable() == ["http://a:1"]
    assert weights.current("http://a:1") and not weights.current("http://b:1")
    versions["a"] = "default"
    with pytest.raises(WeightsLost, match="lost the weights of step 3"):
        weights.usable()


class GlooServer:
    """A real end of a gloo group, in place of a server's worker.

    ``lost_after``: how many parameters it receives before it is lost.
    """

    def __init__(self, monkeypatch, sync, lost_after=None):
        self.lost_after = lost_after
        self.received = []
        for name in ("start_weight_update", "pause", "resume"):
            monkeypatch.setattr(sync, name, lambda: None)
        monkeypatch.setattr(sync, "finish_weight_update", lambda: None)
        monkeypatch.setattr(sync, "init_weight_transfer_engine", self.join)
        monkeypatch.setattr(sync, "update_weights", self.load)

    def join(self, info):
        self.group = gloo_group.join_group(
            **{k: v for k, v in info.items() if k != "rank_offset"}, rank=info["rank_offset"]
        )

    def load(self, info):
        for name, shape in zip(info["names"], info["shapes"], strict=True):
            if len(self.received) == self.lost_after:
                self.group = None
                raise RolloutError("http://a:1/update_weights: ReadError")
            gloo_group.broadcast(self.group, tensor := torch.empty(shape))
            self.received.append((name, tensor.tolist()))


class GatheredWeights:
    """A source of three parameters that tells how far each of its passes came."""

    def __init__(self):
        self.weights = {name: torch.full((3,), float(n)) for n, name in enumerate("abc")}
        self.passes = []

    def metadata(self):
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.weights.items()]

    def __iter__(self):
        self.passes.append([])
        for name, tensor in self.weights.items():
            self.passes[-1].append(name)
            yield name, tensor


def gloo_update(monkeypatch, tmp_path, server_lost_after, replicas):
    """A sampler's update over gloo of one server; returns sampler, server and source."""
    client, _ = servers(monkeypatch, lambda host, path: {"weight_version": "default"})
    client = client.only("http://a:1", timeout_s=10)
    sampler = object.__new__(Sampler)  # of its servers and store none is there
    sampler.replicas, sampler.notify = replicas, None
    weights = ServerWeights(client, RefitBackend.gloo, WeightSwap.between_requests, tmp_path)
    sampler.weights, weights.sync.version = weights, "5"
    source = GatheredWeights()
    server = GlooServer(monkeypatch, weights.sync, server_lost_after)
    (port,) = meeting.free_ports("127.0.0.1", 1)
    where = meeting.Meeting(RefitBackend.gloo, "127.0.0.1", port, (1,))
    return sampler, server, source, GlooSender(where, weights.sync, source)


class OneReplica:
    """In place of Replicas of one server, which has ended or is well."""

    def __init__(self, *ended):
        self._ended, self.restarted = list(ended), 0

    def ended(self, within_s):
        return self._ended

    def restart_all(self, progress):
        self.restarted += 1


def test_gloo_brings_every_parameter(monkeypatch, tmp_path):
    sampler, server, source, sender = gloo_update(monkeypatch, tmp_path, None, OneReplica())
    for _ in range(2):
        sampler.update(sender)
    assert server.received == 2 * [("a", [0.0] * 3), ("b", [1.0] * 3), ("c", [2.0] * 3)]
    assert source.passes == [["a", "b", "c"]] * 2
    assert sampler.weights.version == "5"


@pytest.mark.parametrize("lost_after", [0, 1, 2])
def test_a_server_that_dies_in_an_update_is_replaced_and_its_weights_are_asked_for(
    monkeypatch, tmp_path, lost_after
):
    replicas = OneReplica("http://a:1")
    sampler, _, source, sender = gloo_update(monkeypatch, tmp_path, lost_after, replicas)
    sampler.update(sender)
    assert source.passes == [["a", "b", "c"]], "rank 0 takes part in the gathers to their end"
    assert replicas.restarted == 1
    with pytest.raises(WeightsLost, match="lost the weights of step 5"):
        sampler.weights.usable()


def test_a_server_that_dies_before_it_joins_is_replaced_too(monkeypatch, tmp_path):
    replicas = OneReplica("http://a:1")
    sampler, _, source, sender = gloo_update(monkeypatch, tmp_path, None, replicas)
    monkeypatch.setattr(gloo_transfer, "JOIN_TIMEOUT_S", 1.0)
    monkeypatch.setattr(gloo_group, "JOIN_TIMEOUT_S", 1.0)

    def refuse(info):
        raise RolloutError("http://a:1/init_weight_transfer_engine: ReadError")

    monkeypatch.setattr(sampler.weights.sync, "init_weight_transfer_engine", refuse)
    sampler.update(sender)
    assert source.passes == [["a", "b", "c"]] and replicas.restarted == 1
    with pytest.raises(WeightsLost):
        sampler.weights.usable()


def test_a_server_that_refuses_an_update_and_lives_ends_it(monkeypatch, tmp_path):
    replicas = OneReplica()
    sampler, _, _, sender = gloo_update(monkeypatch, tmp_path, 1, replicas)
    with pytest.raises(RolloutError, match="did not reach the rollout servers"):
        sampler.update(sender)
    assert replicas.restarted == 0


def test_a_server_that_hangs_while_its_group_breaks_is_told_of_as_such(monkeypatch):
    monkeypatch.setattr(gloo_transfer, "JOIN_TIMEOUT_S", 0.1)
    hangs = threading.Event()

    def breaks():
        raise RuntimeError("Connection closed by peer")

    with pytest.raises(RolloutError, match="did not reach the rollout servers: Connection closed"):
        gloo_transfer._beside(hangs.wait, breaks)
    hangs.set()
