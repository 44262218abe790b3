"""GPUs as their data sheets state them, and what a plan assumes of them; nothing is measured.

Peak rates are dense (without sparsity). Memory is what the driver reports, in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peak rates and memory of a GPU.

    Attributes:
        bf16, fp8: FLOP/s of matrix products, dense.
        memory: bytes.
        hbm: bytes/s of its memory.
        nvlink: bytes/s to GPUs of the node, in one direction.
        network: bytes/s of its share of the node's network, in one direction.
        pcie: bytes/s from and to host memory, in one direction.
    """

    name: str
    bf16: float
    fp8: float
    memory: float
    hbm: float
    nvlink: float
    network: float = 50e9  # 400 Gbit/s a GPU
    pcie: float = 50e9


GPUS = {
    "h100": Gpu("H100 SXM 80GB", 989e12, 1979e12, 79.6 * GIB, 3.35e12, 450e9),
    "h200": Gpu("H200 SXM 141GB", 989e12, 1979e12, 140.4 * GIB, 4.8e12, 450e9),
    # A100 has no fp8 units: 8-bit weights are computed with in bf16
    "a100": Gpu("A100 SXM 80GB", 312e12, 312e12, 80.0 * GIB, 2.04e12, 300e9, 25e9, 25e9),
    "b200": Gpu("B200 SXM 180GB", 2250e12, 4500e12, 179.0 * GIB, 8.0e12, 900e9),
}


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Assumed shares of peaks, and overheads; every report states them. Replace them by your own.

    Attributes:
        training_mfu, forward_mfu, rollout_mfu: share of the peak FLOP/s that matrix products reach
            (Llama 3's report: 38 to 43 % in training on H100 in bf16).
        bandwidth: share of the peak bandwidths.
        decode_overhead_s: seconds of a decoding step beside its FLOPs and bytes.
        reserve: bytes a GPU holds beside tensors: CUDA context, NCCL buffers, fragmentation.
        server_overhead: bytes of vLLM beside weights and KV cache: activations, CUDA graphs.
    """

    training_mfu: float = 0.40
    forward_mfu: float = 0.45
    rollout_mfu: float = 0.30
    bandwidth: float = 0.70
    decode_overhead_s: float = 0.004
    reserve: float = 4 * GIB
    server_overhead: float = 3 * GIB

    def lines(self) -> list[str]:
        """The assumptions as sentences for the report."""
        return [
            f"MFU {self.training_mfu:.0%} in training, {self.forward_mfu:.0%} in the teacher's "
            f"forward, {self.rollout_mfu:.0%} in rollouts; {self.bandwidth:.0%} of the peak "
            "bandwidths; no communication is overlapped",
            f"decoding: the larger of FLOPs and bytes (weights and KV cache), and "
            f"{self.decode_overhead_s * 1e3:g} ms a token step",
            f"{self.reserve / GIB:g} GiB a GPU for CUDA context, NCCL and fragmentation; "
            f"{self.server_overhead / GIB:g} GiB of the rollout server beside weights and KV cache",
        ]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes of alike GPUs.

    Attributes:
        gpus_per_node: GPUs of a node, which NVLink joins.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int = 8

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node
