"""The cost of a step on the simulated device, in the numbers that `budgets.yaml` limits.

    python -m tests.gpu_fake.report MODEL METHOD [--stage N] [--lengths full|MEDIAN] [--json FILE] [--ops]

Numbers per layer are the difference between a model of three layers and one of two, so they are exact.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.gpu_fake.simulator import device

BATCHES = 20
BUDGETS = Path(__file__).with_name("budgets.yaml")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    names = list(yaml.safe_load(BUDGETS.read_text())) if options.budgets else [shlex.join(_named(arguments))]
    _quiet()
    device.simulate()
    reports = {name: _of(_options(shlex.split(name))) for name in names}
    for report in reports.values():
        print(text(report, ops=options.ops))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_fake.report", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a shape of `ft-dist bench`, such as llama3-8b, or a tiny model")
    parser.add_argument("method", nargs="?", help="full, lora, lora-dropout, rslora, dora, lora-head or lora-fp8")
    parser.add_argument("--stage", type=int)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--lengths", default="full", help="full, or the median length of a log-normal, such as 300")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ops", action="store_true", help="also list operations and kernels of a layer by name")
    parser.add_argument("--budgets", action="store_true", help="report every entry of budgets.yaml instead")
    parser.add_argument("overrides", nargs="*", help="key.sub=value of the config")
    options = parser.parse_args(arguments)
    if not options.budgets and not options.method:
        parser.error("name a model and a method, or --budgets")
    return options


def _named(arguments: list[str]) -> list[str]:
    """The arguments that select what is measured, without the output path."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json")
    parser.add_argument("--ops", action="store_true")
    return parser.parse_known_args(arguments)[1]


def _of(options: argparse.Namespace) -> dict[str, Any]:
    return measure(
        options.model,
        options.method,
        stage=options.stage,
        rows=options.rows,
        length=options.length,
        lengths=options.lengths,
        overrides=tuple(options.overrides),
    )


def _quiet() -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def measure(model: str, method: str, **rest: Any) -> dict[str, Any]:
    """The numbers of one model and method. `device.simulate()` must have been called."""
    from ft_dist.plan.job import job_of
    from ft_dist.plan.memory.total import kept_by_block
    from tests.gpu_fake.simulator.counting import PHASES
    from tests.gpu_fake.step import Setting, count_step

    two, three = (count_step(Setting(model, method, layers=layers, **rest)) for layers in (2, 3))
    layer = {}
    for name in ("forward", "backward"):
        less, more = two.phases[name], three.phases[name]
        layer[name] = {
            "launches": more.launches - less.launches - (more.hooked - less.hooked),
            "triton": sum(more.kernels.values()) - sum(less.kernels.values()),
            "by_name": dict(sorted(((more.kernels + more.ops) - (less.kernels + less.ops)).items())),
        }
    waits = [
        {"phase": phase, "kind": kind, "where": where, "times": times}
        for phase in PHASES
        for (kind, where), times in three.phases[phase].waits.items()
    ]
    update, backward = three.phases["update"], three.phases["backward"]
    tensors = [len(step.engine.trainable()) for step in (two, three)]
    more_tensors = tensors[1] - tensors[0]
    return {
        "model": model,
        "method": method,
        "stage": three.engine.stage,
        "rows": [rest.get("rows", 2), rest.get("length", 4096), rest.get("lengths", "full")],
        "kernels": three.engine.kernels,
        "forward_launches_a_layer": layer["forward"]["launches"],
        "backward_launches_a_layer": layer["backward"]["launches"],
        "update_operations": update.operations,
        "update_operations_a_tensor": (update.operations - two.phases["update"].operations) / more_tensors,
        "hook_operations_a_tensor": (backward.hooked - two.phases["backward"].hooked) / more_tensors,
        "waits_a_step": sum(wait["times"] for wait in waits),
        "saved_mib_a_layer": (three.held_bytes - two.held_bytes) / 2**20,
        "planned_mib_a_layer": kept_by_block(job_of(three.config, ranks=1)) / 2**20,
        "attention_shapes": attention_shapes(model, rest),
        "waits": waits,
        "layer": layer,
    }


def attention_shapes(model: str, rest: dict[str, Any]) -> int:
    """Distinct calls of attention over the batches of packed chats, for a model of one layer."""
    from tests.gpu_fake.step import Setting, count_attention

    return len(count_attention(Setting(model, "lora", **rest | {"layers": 1, "lengths": "300"}), BATCHES))


def text(report: dict[str, Any], *, ops: bool) -> str:
    lines = [
        f"{report['model']} {report['method']}, ZeRO-{report['stage']}, rows {report['rows']}; {report['kernels']}",
        f"launches a layer: forward {report['forward_launches_a_layer']}, backward "
        f"{report['backward_launches_a_layer']} (Triton {report['layer']['forward']['triton']} and "
        f"{report['layer']['backward']['triton']})",
        f"operations of the update: {report['update_operations']} at 3 layers, "
        f"{report['update_operations_a_tensor']:g} for each trained tensor; "
        f"{report['hook_operations_a_tensor']:g} more for each in hooks during backward",
        f"saved for backward: {report['saved_mib_a_layer']:.1f} MiB a layer; the plan says "
        f"{report['planned_mib_a_layer']:.1f}",
        f"distinct attention calls over {BATCHES} packed batches: {report['attention_shapes']}",
        f"waits of the host a step: {report['waits_a_step']}",
    ]
    for wait in report["waits"]:
        lines.append(f"  {wait['times']:3} x {wait['kind']} in {wait['phase']}: {wait['where']}")
    if ops:
        for phase, numbers in report["layer"].items():
            lines.append(f"{phase} of a layer: " + ", ".join(f"{count} {n}" for n, count in numbers["by_name"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
