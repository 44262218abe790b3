"""Machine instructions of the losses' Triton kernels on an H100, counted on any machine.

Triton's wheel holds ptxas and cuobjdump, so a kernel can be compiled for sm_90 and read without a
GPU. Of each kernel the hot loop is taken, the one over whole tiles, and its instructions are
divided by the columns whose logits it loads. Counted, not measured: the rate is what the pipes
would allow with three quarters of their slots used. Opcodes are assigned to pipes by us.

    python benchmarks/sass.py --out benchmarks/results/sass.json
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton import compiler
from triton.backends.compiler import GPUTarget

from nemo_paced.losses import triton_adaptive_kl, triton_kernels
from nemo_paced.losses.kinds import Divergence, DivergenceKind

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SM_90 = GPUTarget("cuda", 90, 32)
# an H100: SMs times clock, and lanes that the SM issues a clock, in all and to its narrower pipes
CLOCKS_PER_S = 132 * 1.75e9
LANES, ALU_LANES, MUFU_LANES = 128, 64, 16
USED = 0.75
ALU = (
    *("FMNMX", "FSEL", "FSETP", "F2FP", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R"),
    *("PLOP3", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD"),
)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel as it is launched for one kind of divergence.

    Attributes:
        reads, writes: elements in the logits' dtype for each column.
    """

    name: str
    jit: Any
    constants: dict[str, Any]
    reads: int = 2
    writes: int = 0
    num_warps: int = triton_kernels.NUM_WARPS


@dataclass(frozen=True, slots=True)
class Count:
    """A kernel's hot loop; ``instructions``, ``alu`` and ``mufu`` are for one column.

    Attributes:
        mufu: of the pipe for exponentials, logarithms and reciprocal roots.
        tb_per_s: of global memory, as the pipes allow.
        spills: instructions that move a register to local memory or back, in the whole kernel.
        barriers, shuffles: in which a thread waits for others.
        wide_loads: the share of loads that take 16 bytes.
        float64: whether the kernel computes in float64 anywhere.
    """

    name: str
    instructions: float
    alu: float
    mufu: float
    tb_per_s: float
    registers: int
    spills: int
    barriers: int
    shuffles: int
    wide_loads: float
    float64: bool


def kernels() -> Iterator[Kernel]:
    """Every kernel, for every kind that makes another one of it."""
    kinds = [Divergence(kind) for kind in DivergenceKind]
    dots = {(kind.needs_forward_kl, kind.needs_reverse_kl): kind for kind in kinds}
    for (forward, reverse), kind in dots.items():
        label = "mixtures" if kind.is_mixture else kind.kind.value
        constants = {"FORWARD": forward, "REVERSE": reverse}
        yield Kernel(f"statistics, {label}", triton_kernels._local_stats_kernel, constants)
    for kind in kinds:
        constants = {"KIND": kind.kind.value}
        if kind.is_mixture:
            yield Kernel(
                f"mixture sums, {kind.kind.value}", triton_kernels._mixture_sums_kernel, constants
            )
        constants |= {"FORWARD": kind.needs_forward_kl, "REVERSE": kind.needs_reverse_kl}
        yield Kernel(
            f"gradient, {kind.kind.value}", triton_kernels._gradient_kernel, constants, writes=1
        )
    yield Kernel("border of the head", triton_adaptive_kl._mass_kernel, {"COUNT": False}, reads=1)
    yield Kernel("gaps of head and tail", triton_adaptive_kl._gaps_kernel, {}, num_warps=1)


def count(chosen: Iterable[Kernel], dtype: str) -> list[Count]:
    """Hot loops of kernels compiled for both models' logits in ``dtype``."""
    built = [(kernel, build(kernel, dtype)) for kernel in chosen]
    with ThreadPoolExecutor() as pool:  # cuobjdump takes as long as the compiler
        return list(pool.map(lambda pair: count_one(pair[0], pair[1], dtype), built))


def count_one(kernel: Kernel, built: Any, dtype: str) -> Count:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        command = (str(TOOLS / "cuobjdump"), "-sass", "--dump-resource-usage", cubin.name)
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loop = hot_loop(dump)
    opcodes = Counter(name.partition(".")[0] for name in loop)
    bytes_read = kernel.reads * BYTES[dtype]
    columns = bytes_loaded(loop) / bytes_read
    loads = [name for name in loop if name.startswith("LDG")]
    alu = sum(opcodes[name] for name in ALU)
    taken = {LANES: len(loop), ALU_LANES: alu, MUFU_LANES: opcodes["MUFU"]}
    clocks = max(slots / columns / lanes for lanes, slots in taken.items())
    moved = bytes_read + kernel.writes * BYTES[dtype]
    return Count(
        name=kernel.name,
        instructions=round(len(loop) / columns, 1),
        alu=round(alu / columns, 1),
        mufu=round(opcodes["MUFU"] / columns, 2),
        tb_per_s=round(USED * CLOCKS_PER_S / clocks * moved / 1e12, 1),
        registers=int(re.search(r"\bREG:(\d+)", dump)[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", dump)),
        barriers=opcodes["BAR"],
        shuffles=opcodes["SHFL"],
        wide_loads=sum(".128" in name for name in loads) / len(loads),
        float64=".f64" in built.asm["ptx"],
    )


def build(kernel: Kernel, dtype: str, **given: int) -> Any:
    """The kernel compiled for sm_90 with the launch's options.

    Args:
        given: arguments whose value the kernel is compiled for, as Triton does with 1.
    """
    constants = (
        kernel.constants
        | given
        | {
            "THREADS": triton_kernels.WARP * kernel.num_warps,
            "EACH": triton_kernels.LOAD_BYTES // BYTES[dtype],
        }
    )
    logits = dict.fromkeys(("student", "teacher", "out"), f"*{dtype}")
    types = logits | dict.fromkeys(("stride", "width", "valid"), "i32")
    types |= dict.fromkeys(("per", "share"), "fp32") | {"taken": "*i32"}
    names = kernel.jit.arg_names
    signature = {name: types.get(name.partition("_")[0], "*fp32") for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    # as a launch finds them: pointers, and rows of a vocabulary that is a multiple of 16
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name][0] == "*"
        or (signature[name] == "i32" and name.startswith(("stride", "width")))
    }
    source = compiler.ASTSource(kernel.jit, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": kernel.num_warps, "enable_fp_fusion": True}
    return compiler.compile(source, target=SM_90, options=options)


def hot_loop(sass: str) -> list[str]:
    """Opcodes of the loop over whole tiles: the one with the fewest for each byte that it loads."""
    lines = [
        (int(line[1], 16), line[2])
        for line in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(.*?);", sass, re.M)
    ]
    loops = []
    for end, text in lines:
        begin = re.match(r"BRA.*?0x([0-9a-f]+)", text)
        if begin and int(begin[1], 16) < end:  # backward
            loop = [text.split()[0] for at, text in lines if int(begin[1], 16) <= at <= end]
            loops += [loop] if bytes_loaded(loop) else []
    return min(loops, key=lambda loop: len(loop) / bytes_loaded(loop))


def bytes_loaded(loop: list[str]) -> int:
    """Bytes that a thread loads from global memory in one turn."""
    loads = (name.split(".") for name in loop if name.startswith("LDG"))
    return sum(next((WIDTHS[part] for part in load if part in WIDTHS), 4) for load in loads)


def table_of(counts: list[Count], dtype: str) -> Table:
    table = Table(title=f"Triton {triton.__version__}, {dtype}: a column's instructions on sm_90")
    columns = ("kernel", "all", "ALU", "MUFU", "TB/s", "registers")
    for name in (*columns, "spills", "barriers", "shuffles", "16-byte loads"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for one in counts:
        figures = (one.instructions, one.alu, one.mufu, one.tb_per_s, one.registers)
        waits = (one.spills, one.barriers, one.shuffles, f"{one.wide_loads:.0%}")
        table.add_row(one.name, *map(str, (*figures, *waits)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=tuple(BYTES), default="bf16", help="of the logits")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    args = parser.parse_args()
    counts = count(kernels(), args.dtype)
    Console().print(table_of(counts, args.dtype))
    if args.out:
        report = {"triton": triton.__version__, "dtype": args.dtype, "target": "sm_90"}
        report["kernels"] = [asdict(one) for one in counts]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
