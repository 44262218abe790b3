"""What one GPU without a network and without vLLM can show of this project, part by part.

    python scripts/first_light.py --out DIR                     # all parts, 13 minutes at most
    python scripts/first_light.py --out DIR --parts step fp8    # some of them
    python scripts/first_light.py --out DIR --device cpu        # tiny shapes: any mistakes left?

Each part runs in a process of its own under a time limit and leaves DIR/PART.json and DIR/PART.log
as soon as it ends; one that is cut off costs itself alone. Parts that have passed are not run
again (--again runs them), so the same command goes on. A table of all parts comes last, and
DIR/everything.json holds all figures and the ends of all logs: the one file to carry away.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "tests" / "models"  # config.json of public models
REAL, TINY = "real", "tiny"
# of Qwen3-1.7B and 8B; tokens of a packed row, of a response and of a prompt
ROW = {REAL: 16_384, TINY: 128}
RESPONSE, PROMPT = {REAL: 1536, TINY: 24}, {REAL: 512, TINY: 8}
TEACHER_LAYERS = 12  # of the FP8 comparison: rates and drifts need no more
LOG_LINES = 200  # of a part's log that everything.json keeps
OUTLIERS = 8  # channels that norms amplify, as trained models have them


@dataclass(frozen=True)
class Part:
    """A part by what runs it.

    Attributes:
        limit_s: after which it is ended, on a GPU.
        command: arguments of Python; ``None``: the function of its name, in this script.
    """

    limit_s: int
    says: str
    command: Callable[[argparse.Namespace], list[str]] | None = None


def _pytest(*paths: str) -> Callable[[argparse.Namespace], list[str]]:
    return lambda args: ["-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]


def _losses(args: argparse.Namespace) -> list[str]:
    shape = ["--tokens", "8192", "--dtype", "bf16", "--hidden", "2048", "4096"]
    if args.device == "cpu":
        shape = ["--tokens", "8", "--vocab", "512", "--hidden", "16", "32", "--repeats", "1"]
    out = ["--out", str(args.out / "losses_benchmark.json")]
    return ["benchmarks/losses.py", "--device", args.device, *shape, *out]


PARTS = {
    "losses": Part(90, "tests of the losses and their kernels", _pytest(
        "tests/gpu/test_losses_gpu.py", "tests/gpu/test_linear_divergence_gpu.py")),
    "benchmark": Part(120, "losses beside Liger and PyTorch, the copy and the GEMMs", _losses),
    # a rank imports for 17 s on a machine that has just started, and each test starts one
    "training": Part(240, "tiny steps beside the CPU's", _pytest("tests/gpu/test_training_gpu.py")),
    "fp8_tests": Part(60, "the FP8 teacher's tests", _pytest("tests/gpu/test_fp8_gpu.py")),
    "checkpoint": Part(90, "written and resumed with the Adam that is there"),
    "step": Part(100, "Qwen3-8B to 1.7B at full size, beside plan's figures"),
    "fp8": Part(75, "each FP8 recipe of this GPU: rate, memory, certificate"),
}  # fmt: skip


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        _inside(args)
        return 0
    for name in args.parts:
        if not args.again and _read(args.out, name).get("passed"):
            continue
        print(f"{name}: {PARTS[name].says}", flush=True)
        _run(name, args)
    return _table(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(name: str, args: argparse.Namespace) -> None:
    """Run a part in a process of its own and write what became of it."""
    part, began = PARTS[name], time.monotonic()
    own = [str(Path(__file__)), "--out", str(args.out), "--device", args.device, "--inside", name]
    command = [sys.executable, *(part.command(args) if part.command else own)]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "COLUMNS": "200",  # tables in logs are to be read
    }
    limit_s = part.limit_s if args.device == "cuda" else 600
    (args.out / f"{name}.json").unlink(missing_ok=True)
    with (args.out / f"{name}.log").open("wb") as log:
        try:
            status: int | str = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit_s
            ).returncode
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit_s} s"
    skipped = status == 0 and _last_line(args.out / f"{name}.log").split()[1:2] == ["skipped"]
    passed = status == 0 and not skipped
    wall_s = time.monotonic() - began
    _write(args.out, name, passed=passed, skipped=skipped, status=status, wall_s=wall_s)


def _read(out: Path, name: str) -> dict[str, Any]:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(out: Path, name: str, **found: Any) -> None:
    """Add to a part's result; it is whole at every moment."""
    path = out / f"{name}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(_read(out, name) | found, indent=1) + "\n")
    beside.rename(path)


def _table(args: argparse.Namespace) -> int:
    results = {name: _read(args.out, name) for name in PARTS}
    everything = {
        name: found | {"log": _last_lines(args.out / f"{name}.log", LOG_LINES)}
        for name, found in results.items()
    }
    everything["losses_benchmark"] = _read(args.out, "losses_benchmark")
    (args.out / "everything.json").write_text(json.dumps(everything, indent=1) + "\n")
    for name, found in results.items():
        state = next(
            (word for word in ("passed", "skipped") if found.get(word)),
            "FAILED" if found else "not run",
        )
        print(f"{name:12s} {state:8s} {found.get('wall_s', 0):6.0f} s", end="  ")
        print(found.get("summary") or _last_line(args.out / f"{name}.log"))
    return int(
        any(found and not found["passed"] and not found["skipped"] for found in results.values())
    )


def _last_line(log: Path) -> str:
    return "".join(_last_lines(log, 1))[:120]


def _last_lines(log: Path, count: int) -> list[str]:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-count:]


# what follows runs inside a part's own process


def _inside(args: argparse.Namespace) -> None:
    from nemo_paced.parallel.gpu_environment import set_for_trainer

    if args.device == "cuda":
        set_for_trainer(shares_memory=False)
    size = REAL if args.device == "cuda" else TINY
    {"checkpoint": checkpoint, "step": step, "fp8": fp8}[args.inside](args, size)


def _environment() -> dict[str, Any]:
    import torch

    from nemo_paced.run.environment import installed_versions

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "cuda": torch.version.cuda, "versions": installed_versions(),
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def _model_dir(folder: Path, name: str, size: str, layers: int | None = None) -> Path:
    """A directory of a public model's shape (tiny: of its kind) with a tokenizer and no weights."""
    from nemo_paced.quickstart.models import write_tokenizer

    target = folder / f"{name}-{layers or 'whole'}"
    if not target.exists():
        target.mkdir(parents=True)
        config = json.loads((MODELS / name / "config.json").read_text())
        if size == TINY:
            config |= {
                "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
                "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
                "num_hidden_layers": 2, "max_window_layers": 2,
            }  # fmt: skip
        elif layers:
            config |= {"num_hidden_layers": layers, "max_window_layers": layers}
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
        (target / "config.json").write_text(json.dumps(config))
        write_tokenizer(target)
    return target


def _config(args: argparse.Namespace, size: str, teacher: Path, **settings: Any) -> Any:
    """A configuration of one rank: packed rows, both models of random weights."""
    from nemo_paced import config as c

    on_gpu = args.device == "cuda"
    fields = {
        "trainer": c.TrainerConfig(
            devices=1,
            accelerator="gpu" if on_gpu else "cpu",
            precision="bf16",
            gradient_clip_val=1.0,
        ),
        "model": c.ModelConfig(
            micro_batch_size=1, packed_sequence_size=ROW[size], optim=c.OptimConfig(lr=1e-6)
        ),
        "data": c.DataConfig(
            max_prompt_length=PROMPT[size],
            max_teacher_prompt_length=PROMPT[size],
            max_response_length=RESPONSE[size],
        ),
        "student": c.StudentConfig(
            hf_path=str(_model_dir(args.out / "models", "Qwen3-1.7B", size))
        ),
        "teacher": c.TeacherConfig(hf_path=str(teacher)),
        "stages": [c.StageConfig()],
    }
    return c.PacedConfig(**(fields | settings))


def _items(size: str, rows: int, *, sampled: bool = False) -> list[Any]:
    """Training items that fill so many packed rows, with lengths that differ."""
    import torch

    from nemo_paced.data.packing import TrainItem

    generator = torch.Generator().manual_seed(0)
    vocabulary = 500 if size == TINY else 150_000
    items: list[Any] = []
    left, number = rows * ROW[size], 0
    while left > PROMPT[size] + 1:
        shorter = int(torch.randint(RESPONSE[size] // 2, (), generator=generator))
        length = min(RESPONSE[size] - shorter, left - PROMPT[size])
        prompt, response = (
            tuple(torch.randint(0, vocabulary, (n,), generator=generator).tolist())
            for n in (PROMPT[size], length)
        )
        items.append(
            TrainItem(
                response_id=f"r{number}", problem_id=f"p{number}", student_prompt_ids=prompt,
                teacher_prompt_ids=prompt, response_ids=response, token_weight=1e-3,
                server_logprobs=(-1.0,) * length if sampled else (),
            )
        )  # fmt: skip
        left, number = left - PROMPT[size] - length, number + 1
    return items


@contextmanager
def _models(config: Any, weights: Any, **options: Any) -> Iterator[Any]:
    """Both models as ``train`` builds them, with true vocabularies.

    What was built before is freed first: the caller must not hold it any longer.
    """
    import torch

    from nemo_paced.hf.architectures import Architecture
    from nemo_paced.parallel import groups
    from nemo_paced.training.setup import build_models

    gc.collect()  # hooks and models refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    parallel = groups.initialize(config.model, accelerator=config.trainer.accelerator)
    try:
        models = build_models(config, parallel, weights=weights, **options)
        rows = Architecture.read(config.student.hf_path, "student.hf_path").vocab_size
        yield replace(models, step=replace(models.step, vocab_size=rows))
    finally:
        groups.shutdown()


def _stages() -> dict[str, Any]:
    from nemo_paced import config as c

    return {
        "forward_kl": c.StageConfig(
            divergence=c.DivergenceKind.forward_kl, responses=c.ResponseSource.references
        ),
        "reverse_kl": c.StageConfig(
            divergence=c.DivergenceKind.reverse_kl, responses=c.ResponseSource.rollouts
        ),
    }


def _peak(reset: bool = False) -> float:
    """GiB of GPU memory that tensors held at most since the last reset."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return peak


def checkpoint(args: argparse.Namespace, size: str) -> None:
    """A resumed run takes the steps of one that was not stopped."""
    from nemo_paced.config import OptimBackend
    from nemo_paced.preflight.dry_run.world import RANDOM
    from nemo_paced.run import checkpoint as checkpoints
    from nemo_paced.student.optimizer import chained

    teacher = _model_dir(args.out / "models", "Qwen3-8B", TINY)
    args = argparse.Namespace(**{**vars(args), "out": args.out / "tiny"})
    items, stage = _items(TINY, 2), _stages()["forward_kl"]
    backends = [OptimBackend.auto, OptimBackend.torch][: 2 if args.device == "cuda" else 1]
    told = []
    for backend in backends:
        config = _config(args, TINY, teacher)
        config.model.optim.backend = backend
        run_dir = args.out / f"run_{backend.value}"
        with _models(config, RANDOM) as models:
            models.save(run_dir, step=0, consumed_problems=0, skipped=0)  # no update yet
            models.step(items, stage, 1e-4)
            models.save(run_dir, step=1, consumed_problems=0, skipped=0)
            expected = [models.step(items, stage, 1e-4).loss for _ in range(2)]
            adam = type(chained(models.student.optimizer)[0].optimizer)
        del models
        for begun in (0, 1):
            with _models(config, RANDOM) as models:
                saved = checkpoints.checkpoint_dir(run_dir, begun)
                checkpoints.load(saved, models.student, models.parallel)
                if begun == 0:
                    models.step(items, stage, 1e-4)
                found = [models.step(items, stage, 1e-4).loss for _ in range(2)]
            del models
            assert found == expected, f"{adam}: {found} after step {begun}, {expected} unstopped"
        told.append(f"{adam.__module__}.{adam.__qualname__}")
    _write(args.out.parent, "checkpoint", **_environment(), summary=f"resumed: {', '.join(told)}")


def step(args: argparse.Namespace, size: str) -> None:
    """Steps of two packed rows: time, memory and MFU beside what ``plan`` says."""
    from nemo_paced.config import Fp8Config
    from nemo_paced.preflight.dry_run.world import RANDOM
    from nemo_paced.run.throughput import Throughput

    teacher = _model_dir(args.out / "models", "Qwen3-8B", size)
    found: dict[str, Any] = {}
    for precision in ("bf16", "fp8"):
        config = _config(args, size, teacher)
        config.teacher.fp8 = Fp8Config(enabled=precision == "fp8")
        with _models(config, RANDOM) as models:
            throughput = Throughput(config, models.parallel)
            for name, stage in _stages().items():
                items = _items(size, 2, sampled=name == "reverse_kl")
                models.step(items, stage, 1e-6)  # compiles, and lets the allocator grow
                _peak(reset=True)
                models.step.teacher.signal(items, stored=False)
                teacher_gib = _peak(reset=True)
                results = [models.step(items, stage, 1e-6) for _ in range(3)]
                best = min(results, key=lambda result: result.teacher_s + result.student_s)
                found[f"{precision} teacher, {name}"] = {
                    "tokens": sum(len(i.student_prompt_ids) + len(i.response_ids) for i in items),
                    "teacher_s": best.teacher_s,
                    "student_s": best.student_s,
                    "teacher_gib": teacher_gib,
                    "step_gib": _peak(),
                    **throughput.metrics(items, best),
                    "plan": _plan(config, items),
                }
                _write(args.out, "step", **_environment(), figures=found)
            if args.device == "cuda" and precision == "bf16":
                _profile(models, items, stage, args.out / "step_profile.txt")
        del models
    lines = [
        f"{name}: {f['step_gib']:.1f} GiB (plan {f['plan']['gib']:.1f}), "
        f"{f['teacher_s']:.2f} + {f['student_s']:.2f} s"
        for name, f in found.items()
    ]
    _write(args.out, "step", summary="; ".join(lines))


def _plan(config: Any, items: Sequence[Any]) -> dict[str, float]:
    """What ``plan`` says of these steps on one H100."""
    from nemo_paced.hf.architectures import Architecture
    from nemo_paced.sizing.flops import step_flops
    from nemo_paced.sizing.hardware import GPUS, Assumptions
    from nemo_paced.sizing.memory import stage_memory
    from nemo_paced.sizing.shapes import Accelerator, student_layout, teacher_plan, work_of

    shapes = (
        Architecture.read(config.student.hf_path, "student.hf_path"),
        Architecture.read(config.teacher.hf_path, "teacher.hf_path"),
    )
    prompts = sum(len(item.student_prompt_ids) for item in items) / len(items)
    responses = sum(len(item.response_ids) for item in items) / len(items)
    work = work_of(
        config, mean_prompt=prompts, mean_response=responses, accelerator=Accelerator.gpu
    )
    work = replace(work, global_batch_size=len(items))
    layout, plan = student_layout(config), teacher_plan(config)
    memory = stage_memory(*shapes, layout, plan, work, 0)
    flops, assume, gpu = step_flops(*shapes, layout, plan, work), Assumptions(), GPUS["h100"]
    rate = gpu.fp8 if plan.fp8 else gpu.bf16
    return {
        "gib": memory.peak / 2**30,
        "student_gib": memory.student_phase / 2**30,
        "teacher_gib": memory.teacher_phase / 2**30,
        "student_s": (flops.student + flops.loss) / (gpu.bf16 * assume.training_mfu),
        "teacher_s": flops.teacher / (rate * assume.forward_mfu),
    }


def _profile(models: Any, items: Sequence[Any], stage: Any, path: Path) -> None:
    """Kernels of a step by their time, and how long the GPU had none."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        models.step(items, stage, 1e-6)
        torch.cuda.synchronize()
    wall = time.perf_counter() - began
    averages = profiler.key_averages()
    busy = sum(row.self_device_time_total for row in averages) / 1e6
    table = averages.table(sort_by="self_device_time_total", row_limit=40)
    path.write_text(f"{wall:.3f} s of wall time, kernels for {busy:.3f} s\n{table}\n")


def fp8(args: argparse.Namespace, size: str) -> None:
    """Rate and memory of the teacher's forward in each recipe against BF16; certificates."""
    import torch

    from nemo_paced.config import Fp8Config, Fp8Recipe, ResponseSource
    from nemo_paced.errors import ConfigError
    from nemo_paced.losses.kinds import Divergence, DivergenceKind
    from nemo_paced.preflight.dry_run.world import RANDOM
    from nemo_paced.teacher.build import WeightReader
    from nemo_paced.teacher.fp8.certificate import Certificate
    from nemo_paced.training.certify import certify

    def with_outliers(chunks: Any, hf_dir: Any, parallel: Any, *, on_loaded: Any = None) -> None:
        """Random weights behind norms that amplify a few channels thirtyfold."""

        def amplify(parameter: torch.nn.Parameter) -> None:
            if parameter.ndim == 1 and parameter.numel() % OUTLIERS == 0:
                parameter[:: parameter.numel() // OUTLIERS] = 30.0
            if on_loaded is not None:
                on_loaded(parameter)

        RANDOM.model(chunks, hf_dir, parallel, on_loaded=amplify)

    teacher = _model_dir(args.out / "models", "Qwen3-8B", size, layers=TEACHER_LAYERS)
    items, found = _items(size, 2), {}
    tokens = sum(len(item.teacher_prompt_ids) + len(item.response_ids) for item in items)
    for recipe in (None, *Fp8Recipe):
        if recipe is Fp8Recipe.auto:
            continue
        config, name = _config(args, size, teacher), recipe.value if recipe else "bf16"
        if recipe is not None:
            config.teacher.fp8 = Fp8Config(enabled=True, recipe=recipe, max_kl=1e9)
        try:
            with _models(
                config, WeightReader(with_outliers, RANDOM.head), certify_fp8=recipe is not None
            ) as models:
                row: dict[str, float] = {}
                if recipe is not None:
                    run_dir = args.out / f"fp8_{name}"
                    run_dir.mkdir(exist_ok=True)
                    kind = Divergence(DivergenceKind.forward_kl)
                    certify(models, items[:4], ResponseSource.references, kind, run_dir)
                    certificate = Certificate.read(run_dir)
                    assert certificate is not None, "it has just been written"
                    row["kl_mean"] = certificate.kl_mean
                models.step.teacher.signal(items, stored=False)
                _peak(reset=True)
                times = []
                for _ in range(3):
                    began = time.perf_counter()
                    models.step.teacher.signal(items, stored=False)
                    if args.device == "cuda":
                        torch.cuda.synchronize()
                    times.append(time.perf_counter() - began)
                row |= {"tokens_s": tokens / min(times), "gib": _peak()}
            del models
        except ConfigError as error:  # this GPU, or what is installed here, lacks the recipe
            row = {"refused": str(error)}  # type: ignore[dict-item]
        found[name] = row
        _write(args.out, "fp8", **_environment(), figures=found)
    base = found["bf16"]["tokens_s"]
    lines = [
        f"{name} {row['tokens_s'] / base:.2f} x, KL {row['kl_mean']:.2g}"
        for name, row in found.items()
        if "kl_mean" in row
    ]
    _write(args.out, "fp8", summary="; ".join(lines))


if __name__ == "__main__":
    sys.exit(main())
