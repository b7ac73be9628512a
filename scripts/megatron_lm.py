"""Runs Megatron-LM's own pretrain_gpt.py, unmodified, with dist_clip on CPUs, and compares what it logs.

    python -m scripts.megatron_lm CHECKOUT             # scripts/test_megatron_lm.sh makes the environment
    python -m scripts.megatron_lm CHECKOUT --only pp2 muon-layer-wise --keep runs/megatron-lm

Each configuration trains a small GPT on mock data three times, from the same weights: with Megatron's own clipping, with
--grad-clip-mode global at the same threshold, and with AdaGC. Losses and grad norms are read from the TensorBoard files
that Megatron writes. These must be equal, but for rounding:

    process  ours, and the same on one process
    adagc    AdaGC, and the same on one process, which a resumed run did not leave in between
    own      Megatron's own clipping and ours, on the same ranks
    layers   the norms by layer in Megatron's log (--log-layer-grad-norms), and those of one process; and the root of
             their summed squares, and the grad norm that Megatron finds by itself

Every run with dist_clip also verifies its norms at the first step (--grad-clip-verify). The exit status is 1 if anything
differs, or a run fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, PAUSE = 6, 3  # iterations of a run, and the one after which it is resumed
LIMIT = 300  # seconds for a run
FP32, BF16 = 1e-4, 1e-2  # relative differences that rounding may make, of which a step's are in the next one's weights
MODEL = shlex.split("""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --hidden-dropout 0 --attention-dropout 0 --transformer-impl local --use-cpu-initialization
    --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --mock-data --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 1
    --micro-batch-size 2 --global-batch-size 4 --distributed-backend gloo
    --num-workers 0 --log-interval 1 --tensorboard-log-interval 1 --eval-iters 0 --eval-interval 1000
    --lr-decay-style constant --clip-grad 1.0 --dist-ckpt-optim-fully-reshardable
""")
# With Adam's usual epsilon the scale of a gradient hardly matters, and clipping could not be seen in the losses.
TRAIN = ["--train-iters", str(STEPS), "--lr", "1e-2", "--adam-eps", "1e-2"]
VERIFY = ["--grad-clip-verify", "--log-layer-grad-norms", "1"]
GLOBAL = ["--grad-clip-mode", "global", *VERIFY]
ADAGC = ["--grad-clip-mode", "adagc", "--adagc-warmup-steps", "2", "--adagc-lambda-rel", "1.02", *VERIFY]
MOE = ["--num-experts", "4", "--moe-router-topk", "2", "--disable-bias-linear"]
MUON = ["--optimizer", "muon", "--muon-fp32-matmul-prec", "high"]
ZERO = ["--use-distributed-optimizer"]
FSDP = [
    "--use-megatron-fsdp",
    "--data-parallel-sharding-strategy",
    "optim_grads_params",
    "--ckpt-format",
    "fsdp_dtensor",
]
FSDP += ["--no-gradient-reduce-div-fusion"]  # gloo lacks the reduction that divides by itself


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A way to run the script.

    Attributes:
        name: on the command line.
        ranks: processes.
        flags: what the model and the optimizer are, on one process as well.
        layout: how they are divided.
        package: a package that Megatron needs for it.
        tolerance: the largest relative difference.
        resumes: the name of the configuration that saves what this one loads half way.
        fresh: start from the script's own initialisation, which is the same for data-parallel ranks.
        own: Megatron's own norm is right there.
    """

    name: str
    ranks: int
    flags: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    package: str | None = None
    tolerance: float = FP32
    resumes: str | None = None
    fresh: bool = False
    own: bool = True


def _tp(*more: str) -> tuple[str, ...]:
    return ("--tensor-model-parallel-size", "2", *more)


CONFIGURATIONS = (
    Configuration("one", 1),
    Configuration("tp2", 2, layout=_tp()),
    Configuration("tp2-sp", 2, layout=_tp("--sequence-parallel")),
    Configuration("dp2-zero", 2, layout=(*ZERO,)),
    Configuration("tp2-zero", 2, layout=_tp(*ZERO)),
    Configuration("pp2", 2, layout=("--pipeline-model-parallel-size", "2")),
    Configuration("ep2", 2, tuple(MOE), ("--expert-model-parallel-size", "2")),
    Configuration("ep2-zero", 2, tuple(MOE), ("--expert-model-parallel-size", "2", *ZERO)),
    Configuration("muon-tp2", 2, tuple(MUON), _tp(), "emerging_optimizers"),
    Configuration("muon-layer-wise", 2, (*MUON, "--bf16"), (*ZERO,), "emerging_optimizers", BF16),
    Configuration("megatron-fsdp", 2, layout=(*FSDP, *ZERO), fresh=True),
    # Megatron's own norm sums over the data-parallel ranks twice there, and is the larger by the root of their number.
    Configuration("megatron-fsdp-v2", 2, layout=(*FSDP, "--megatron-fsdp-version", "2"), fresh=True, own=False),
    Configuration("tp2 to one", 1, resumes="tp2"),
    Configuration("tp2-zero to one-zero", 1, layout=(*ZERO,), resumes="tp2-zero"),
    Configuration("dp2-zero to tp2-zero", 2, layout=_tp(*ZERO), resumes="dp2-zero"),
    Configuration("tp2 to pp2", 2, layout=("--pipeline-model-parallel-size", "2"), resumes="tp2"),
)


class RunError(RuntimeError):
    """A run failed, or did not log what it should have."""


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run wrote to TensorBoard: numbers by tag and iteration."""

    scalars: Mapping[str, Mapping[int, float]]

    def main(self) -> dict[str, Mapping[int, float]]:
        """The loss and the grad norm."""
        return {tag: self.scalars[tag] for tag in ("lm loss", "grad-norm")}

    def layers(self) -> dict[str, Mapping[int, float]]:
        """Norms by layer. Those of the last iteration may not have arrived before the run's end."""
        found = {tag: values for tag, values in self.scalars.items() if tag.startswith("grad-norm/")}
        return {tag: {step: norm for step, norm in values.items() if step < STEPS} for tag, values in found.items()}

    def from_layers(self) -> dict[str, Mapping[int, float]]:
        """The grad norm, made of those by layer."""
        steps = {step for values in self.layers().values() for step in values}
        return {"grad-norm": {n: math.hypot(*(values[n] for values in self.layers().values())) for n in steps}}


def difference(found: Mapping[str, Mapping[int, float]], right: Mapping[str, Mapping[int, float]]) -> float:
    """The largest relative difference at the iterations that `found` has; inf where a number is missing or not finite."""
    largest = 0.0
    if set(found) != set(right):
        return math.inf
    for tag, values in found.items():
        if not values or not set(values) <= set(right[tag]):
            return math.inf
        for step, value in values.items():
            apart = abs(value - right[tag][step]) / max(abs(right[tag][step]), 1e-6)
            largest = max(largest, apart if math.isfinite(apart) else math.inf)
    return largest


class Runner:
    """Starts the script, and keeps what runs have logged.

    Args:
        checkout: Megatron-LM.
        out: a folder for logs and checkpoints.
    """

    def __init__(self, checkout: Path, out: Path) -> None:
        self.checkout, self.out = checkout, out
        self._done: dict[tuple[str, ...], Log] = {}

    def run(self, name: str, ranks: int, flags: Sequence[str]) -> Log:
        """Run the script; the same flags run once.

        Raises:
            RunError: the run failed, or an expected line is missing.
        """
        key = (str(ranks), *flags)
        if key not in self._done:
            self._done[key] = self._run(name.replace(" ", "-"), ranks, flags)
        return self._done[key]

    def _run(self, name: str, ranks: int, flags: Sequence[str]) -> Log:
        out = self.out / name
        out.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), str(self.checkout), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            # Megatron compiles a helper with what is called python3.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "8" if "--use-megatron-fsdp" in flags else "1",  # Megatron insists
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "launch.megatron_cpu", str(self.checkout / "pretrain_gpt.py"), *MODEL]
        command += [*flags, "--tensorboard-dir", str(out / "tensorboard")]
        with open(out / "output.txt", "w+") as output:
            process = subprocess.Popen(command, env=environment, cwd=out, stdout=output, stderr=subprocess.STDOUT)
            try:
                status = process.wait(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its processes when it is asked to
                process.wait()
                raise RunError(f"{name} was not done after {LIMIT} s") from None
            output.seek(0)
            text = output.read()
        if status:
            errors = re.findall(r"^(?:\[rank\d\]: )?(\w+(?:Error|Exception): .*)$", text, re.MULTILINE)
            raise RunError(f"{name} ended with status {status}: {errors[0][:200] if errors else text[-500:]}")
        if "--grad-clip-verify" in flags and "and the global norm are right to 1e-05" not in text:
            raise RunError(f"{name} did not verify its norms")
        if "--load" in flags and "the checkpoint has no clipping state" in text and "--no-load-optim" not in flags:
            raise RunError(f"{name} found no clipping state in the checkpoint")
        return read(out / "tensorboard")


def read(folder: Path) -> Log:
    """Read what Megatron wrote to TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return Log({tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]})


def compare(runner: Runner, this: Configuration) -> dict[str, float]:
    """Run a configuration. Returns the largest relative difference by the names that the module's docstring has."""
    weights = _weights(runner, this.flags)
    alone = [*TRAIN, *this.flags, *weights]
    one = {name: runner.run(f"{_base(this.flags)} {name}", 1, [*alone, *flags]) for name, flags in _rules().items()}
    where = [*TRAIN, *this.flags, *this.layout]
    if this.resumes is not None:
        source = runner.out / f"{this.resumes.replace(' ', '-')}-adagc" / "checkpoints"
        load = ["--load", str(source), "--ckpt-step", str(PAUSE)]
        after = runner.run(this.name, this.ranks, [*where, *ADAGC, *load])
        if set(after.main()["lm loss"]) != set(range(PAUSE + 1, STEPS + 1)):
            raise RunError(f"{this.name} trained the iterations {sorted(after.main()['lm loss'])}")
        return {
            "adagc": difference(after.main(), one["adagc"].main()),
            "layers": difference(after.layers(), one["adagc"].layers()),
        }
    where += [] if this.fresh else weights
    save = ["--save", str(runner.out / f"{this.name}-adagc" / "checkpoints"), "--save-interval", str(PAUSE)]
    resumed = this.name in [other.resumes for other in CONFIGURATIONS]
    ours = runner.run(f"{this.name} ours", this.ranks, [*where, *GLOBAL])
    adagc = runner.run(f"{this.name} adagc", this.ranks, [*where, *ADAGC, *(save if resumed else ())])
    found = {
        "process": difference(ours.main(), one["ours"].main()),
        "adagc": difference(adagc.main(), one["adagc"].main()),
        "layers": difference(ours.layers(), one["ours"].layers()),
    }
    if this.own:
        own = runner.run(f"{this.name} own", this.ranks, where)
        total = difference(ours.from_layers(), {"grad-norm": own.scalars["grad-norm"]})
        found |= {"own": difference(ours.main(), own.main()), "layers": max(found["layers"], total)}
    return found


def _rules() -> dict[str, list[str]]:
    return {"ours": GLOBAL, "adagc": ADAGC}


def _base(flags: Sequence[str]) -> str:
    return "one process" + "".join(f" {flag.strip('-')}" for flag in flags)


def _weights(runner: Runner, flags: Sequence[str]) -> list[str]:
    """Flags that load the weights from which every run of these models starts; layouts draw their own otherwise."""
    moe = MOE if "--num-experts" in flags else []
    name = "weights" + ("-moe" if moe else "")
    folder = runner.out / name / "checkpoints"
    save = ["--save", str(folder), "--save-interval", "1"]
    runner.run(name, 1, [*moe, "--train-iters", "1", "--lr", "0", *save])  # a step that changes nothing
    return ["--load", str(folder), "--finetune", "--no-load-optim", "--no-load-rng"]


def power(runner: Runner) -> float:
    """The smallest relative difference that clipping, and that AdaGC in its place, makes on one process."""
    where = [*TRAIN, *_weights(runner, ())]
    clipped, adagc = (runner.run(f"{_base(())} {name}", 1, [*where, *flags]) for name, flags in _rules().items())
    unclipped = runner.run("one process unclipped", 1, [*where, "--clip-grad", "0"])
    loss = {"lm loss": clipped.scalars["lm loss"]}
    return min(difference(loss, {"lm loss": other.scalars["lm loss"]}) for other in (unclipped, adagc))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM")
    names = [each.name for each in CONFIGURATIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--keep", type=Path, help="a new folder, for logs and checkpoints")
    options = parser.parse_args(arguments)
    if not (options.checkout / "pretrain_gpt.py").is_file():
        parser.error(f"{options.checkout} is no checkout of Megatron-LM: it has no pretrain_gpt.py")
    with tempfile.TemporaryDirectory() as temporary:
        runner = Runner(options.checkout.resolve(), (options.keep or Path(temporary)).resolve())
        return report(runner, [each for each in CONFIGURATIONS if each.name in options.only])


def report(runner: Runner, chosen: Sequence[Configuration]) -> int:
    """Run the configurations and print a line for each. Returns the exit status."""
    wrong, failed = False, set()
    try:
        seen = power(runner)
    except RunError as error:
        print(f"not run: {error}")
        return 1
    print(f"clipping or not, and AdaGC or not, changes a loss by {seen:.1e} or more")
    if seen < 10 * FP32:
        print("which is too little for a comparison")
        return 1
    for this in chosen:
        if this.package is not None and importlib.util.find_spec(this.package) is None:
            print(f"{this.name:24} not run: package {this.package} absent", flush=True)
            continue
        if this.resumes in failed or (this.resumes is not None and this.resumes not in [each.name for each in chosen]):
            print(f"{this.name:24} not run: {this.resumes} was not run", flush=True)
            continue
        try:
            differences = compare(runner, this)
        except RunError as error:
            wrong = True
            failed.add(this.name)
            print(f"{this.name:24} failed: {error}", flush=True)
            continue
        differs = max(differences.values()) > this.tolerance
        wrong |= differs
        listed = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"{this.name:24} {'DIFFERS' if differs else 'ran'}: {listed} (tolerance {this.tolerance:g})", flush=True)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
