"""``duq-inspect engine.plan``: what a plan holds, or what differs in another. Opening it verifies every hash."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, JustifyMethod
from rich.table import Table

from duq.runtime.cli_errors import one_line_errors
from duq.runtime.command_line import command_app
from duq.runtime.config import IMAGE_SLOTS
from duq.runtime.executors.programs import programs_of, shared_bytes_of
from duq.runtime.executors.schedule import read_schedule
from duq.runtime.plan import Plan
from duq.runtime.robots import Robot
from duq.runtime.solver import Solver

app = command_app()


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="An engine.plan")],
    diff: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Print instead what differs in this one: settings, linears, launches, sizes"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest, or the differences, as JSON")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Print also who said each setting, layers, launches, graphs, entries and hashes")
    ] = False,
    entries: Annotated[bool, typer.Option("--entries", help="--all, and every weight instead of their sum")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="--all, and for cuda the kernel of every layer, not of all alike")
    ] = False,
    verify_key: Annotated[
        Path | None, typer.Option("--verify-key", help="A public key (PEM): fail unless the plan is signed with it")
    ] = None,
) -> None:
    """Verify every hash of a plan and print what it holds: policy, robot, quantization, what it runs on.

    [bold]Examples[/bold]

      duq-inspect engine.plan --all

      duq-inspect before.plan --diff after.plan
    """
    plan = Plan(path, verify_key=verify_key)
    console = Console(markup=False, highlight=False)  # recipes hold regexes, which look like markup
    if diff is not None:
        _print_differences(console, plan, Plan(diff), as_json)
    elif as_json:
        programs = {"programs": found} if (found := _programs(plan)) else {}
        signature = plan.signature and {"key": plan.signature.key.fingerprint, "verified": plan.is_signed()}
        about = {"path": str(path), "bytes": plan.size, **plan.manifest, **programs, "signature": signature}
        typer.echo(json.dumps(about, indent=1))
    elif everything or entries or layers:
        _print_all(console, plan, verify_key, entries, layers)
    else:
        _print_summary(console, plan, verify_key)


def _print_summary(console: Console, plan: Plan, verify_key: Path | None) -> None:
    rows, signed = summary_rows(plan), _signed(plan, verify_key)  # all before the first is printed
    console.print(f"{_checked(plan)}, {signed} (--all prints the rest)", soft_wrap=True)
    for name, text in rows:
        console.print(f"  {name:<13} {text}", soft_wrap=True)


def _checked(plan: Plan) -> str:
    return f"{plan.path}: {human_size(plan.size)}, all {len(plan.names)} entries match their SHA-256"


def _print_differences(console: Console, first: Plan, second: Plan, as_json: bool) -> None:
    from duq.runtime.inspect_diff import difference_tables, differences

    found = differences(first, second)
    if as_json:
        typer.echo(json.dumps({"first": str(first.path), "second": str(second.path), **found}, indent=1))
        return
    tables = difference_tables(found, str(first.path), str(second.path))
    if not tables:
        console.print(f"{first.path} and {second.path} differ in no setting, linear, launch or size", soft_wrap=True)
    for table in tables:
        console.print(table)


def _print_all(console: Console, plan: Plan, verify_key: Path | None, entries: bool, layers: bool) -> None:
    tables = [  # all of them before the first is printed: an error stands alone
        settings_table(plan.manifest),
        _policy_table(plan.manifest),
        _quantization_table(plan.manifest.get("quantization") or {}),
        _layer_table((plan.manifest.get("quantization") or {}).get("linears") or {}),
        _program_table(_programs(plan)),
        *(_graph_table(name, graph) for name, graph in _graphs(plan.manifest).items()),
        *(_kernel_table(plan, name, layers) for name in _schedules(plan)),
        _entry_table(plan.manifest["entries"], each_weight=entries),
    ]
    signed = _signed(plan, verify_key)
    console.print(_checked(plan), soft_wrap=True)
    console.print(signed, soft_wrap=True)
    for table in tables:
        if table.row_count:
            console.print(table)


def main() -> None:
    with one_line_errors():
        app()


def _signed(plan: Plan, verify_key: Path | None) -> str:
    """Whether the plan is signed, by whom, and whether that was checked."""
    if plan.signature is None:
        return "not signed"
    signed = f"signed with the key {plan.signature.key.fingerprint}"
    if verify_key is not None:
        return f"{signed}, which is that of {verify_key}"
    if plan.is_signed() is None:
        return f"{signed}; not checked: pip install 'duq-vla[sign]'"
    return f"{signed}; the signature matches, whose the key is was not asked (--verify-key)"


def settings_table(manifest: dict[str, Any]) -> Table:
    """Every setting around the model that changes the actions, and who said it."""
    table = _table("Settings", "", "", "")
    for row in settings_rows(manifest):
        table.add_row(*row)
    return table


def settings_rows(manifest: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The same as (name, value, who said it); nothing of a plan that was made by hand."""
    rows: list[tuple[str, str, str]] = []
    model, transforms = manifest.get("model"), manifest.get("transforms")
    if not (model and transforms):
        return rows
    said = manifest.get("settings_from") or {}
    described = manifest.get("robot_description")
    robot = Robot.from_json(described).to_json() if described else None  # with what older plans left out
    pi05, stats = model["pi05"], manifest.get("norm_stats") or {}

    def row(name: str, value: Any, key: str | None = None) -> None:
        rows.append((name, _text(value), said.get(key or name, "")))

    checkpoint = manifest.get("checkpoint") or {}
    row("policy", f"{'pi0.5' if pi05 else 'pi0'}, {checkpoint.get('form') or checkpoint.get('layout')}")
    if manifest.get("training_config"):
        row("training config", manifest["training_config"])
    row("robot", f"{robot['name']}: state {len(_state_names(robot))}, actions {len(robot['action_names'])}" if robot
        else "none: bare model inputs; norm stats are not applied")  # fmt: skip
    if robot:
        cameras = zip(IMAGE_SLOTS, robot["cameras"], strict=False)
        row("cameras", ", ".join(f"{slot} = {'.'.join(camera['key'])}" for slot, camera in cameras))
        row("normalization", "; ".join(f"{key}: {_normalization(stats, key, pi05)}" for key in ("state", "actions")))
        row("deltas", _deltas(robot, transforms), "delta_actions")
        row("conversions", _conversions(robot, transforms), "adapt_to_pi")
    row("denoising steps", manifest["num_steps"], "num_steps")
    row("solver", Solver.of(manifest).name, "solver")
    row("action horizon", model["action_horizon"], "action_horizon")
    row("prompt slots", model["max_prompt_tokens"], "max_prompt_tokens")
    row("state in prompt", _state_in_prompt(transforms), "state_in_prompt")
    row(
        "prompt text",
        "as it is, as LeRobot" if transforms["prompt_text"] == "lerobot" and not pi05 else "cleaned, as openpi",
    )
    row(
        "default prompt",
        "none" if transforms["default_prompt"] is None else repr(transforms["default_prompt"]),
        "default_prompt",
    )
    row("images", _images(model["vision"]["image_size"], transforms["resize"]), "lerobot_version")
    row("rotary frequencies", model.get("rotary", "exact"), "rotary")
    for line in manifest.get("ignored_settings") or ():
        row("not known, ignored", line)
    for line in manifest.get("notes") or ():
        row("note", line)
    return rows


def summary_rows(plan: Plan) -> list[tuple[str, str]]:
    """A plan in nine lines at most, as (name, text), and one for each note and setting that is ignored."""
    manifest = plan.manifest
    settings = {name: value for name, value, _ in settings_rows(manifest)}
    known = {
        "policy": _joined(settings.get("policy"), settings.get("training config")),
        "robot": settings.get("robot", str(manifest.get("robot", "none"))),
        "cameras": settings.get("cameras", ""),
        "actions": _joined(
            f"{settings['action horizon']} a chunk, {_steps_text(manifest)}" if settings else "",
            f"deltas: {settings['deltas']}" if "deltas" in settings else "",
        ),
        "prompt": _joined(f"{settings['prompt slots']} slots", f"default {settings['default prompt']}") if settings else "",
        "quantization": _quantization_text(manifest.get("quantization") or {}),
        "runs on": _runs_on(plan),
        "weights": _weights_text(manifest["entries"]),
        "made": _made(manifest),
    }
    notes = [("note", line) for line in manifest.get("notes") or ()]
    ignored = [("ignored", line) for line in manifest.get("ignored_settings") or ()]
    return [(name, text) for name, text in known.items() if text] + ignored + notes


def _steps_text(manifest: dict[str, Any]) -> str:
    solver = Solver.of(manifest)
    return f"{solver.num_steps} denoising steps" + ("" if solver.name == "euler" else f" ({solver.name})")


def _joined(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def _quantization_text(quantization: dict[str, Any]) -> str:
    linears, recipe = quantization.get("linears") or {}, quantization.get("recipe") or {}
    if not linears:
        return "none: all float"
    ops = Counter(str(linear.get("op")).removeprefix("duq::").removesuffix("Linear") for linear in linears.values())
    sqnr = {name: linear["sqnr_db"] for name, linear in linears.items() if linear.get("sqnr_db") is not None}
    worst = min(sqnr, key=lambda name: sqnr[name], default=None)
    return _joined(
        ", ".join(f"{count} linears {op}" for op, count in ops.most_common()),
        ", ".join(str(recipe[key]) for key in ("scheme", "activation_scale") if key in recipe),
        f"worst {sqnr[worst]:.1f} dB, {worst}" if worst else None,
    )


def _runs_on(plan: Plan) -> str:
    if programs := _programs(plan):
        return f"{plan.manifest['target']}: " + "; ".join(f"{each['runs_on']} ({each['image']})" for each in programs)
    sms = ", ".join(f"SM {sm}" for sm in plan.manifest.get("sm") or ())
    return f"{plan.manifest['target']}{f': {sms}' if sms else ''}"


def _weights_text(entries: dict[str, dict[str, Any]]) -> str:
    sizes = [entry["bytes"] for name, entry in entries.items() if name.startswith("weights/")]
    return f"{human_size(sum(sizes))} in {len(sizes)} tensors" if sizes else ""


def _made(manifest: dict[str, Any]) -> str:
    versions, checkpoint = manifest.get("created_by") or {}, manifest.get("checkpoint") or {}
    by = f"by duq {versions['duq']}" if "duq" in versions else None
    fingerprint = str(checkpoint.get("fingerprint", ""))[:12]
    of = f"of {checkpoint['path']}{f' ({fingerprint})' if fingerprint else ''}" if "path" in checkpoint else None
    return " ".join(part for part in (by, of) if part)


def _state_names(robot: dict[str, Any]) -> list[str]:
    return [name for part in robot["state"] for name in part["names"]]


def _normalization(stats: dict[str, Any], key: str, pi05: bool) -> str:
    entry = stats.get(key)
    if not entry:
        return "none"
    if entry.get("mode"):
        return f"{entry['mode']} ({stats['rule']})" if entry["mode"] != "IDENTITY" else "IDENTITY"
    return f"{'q01..q99' if pi05 else 'mean, std'} (openpi)"


def _deltas(robot: dict[str, Any], transforms: dict[str, Any]) -> str:
    if not transforms["delta_actions"]:
        return "none: actions are absolute, or what the robot takes"
    mask = transforms["delta_mask"] or robot["delta"]
    names = [name for name, delta in zip(robot["action_names"], mask, strict=False) if delta]
    return f"{len(names)} of {len(robot['action_names'])} actions are relative to the state: {', '.join(names)}"


def _conversions(robot: dict[str, Any], transforms: dict[str, Any]) -> str:
    active = [each for each in robot["conversions"] if each["when"] == "always" or transforms["adapt_to_pi"]]
    return "; ".join(f"{each['kind']} of {', '.join(each['dims'])}" for each in active) or "none"


def _images(size: int, rule: str) -> str:
    how = "uint8, antialiased" if rule == "openpi" else "float, not antialiased"
    return f"{size} x {size}, resized as {rule} ({how})"


def _state_in_prompt(transforms: dict[str, Any]) -> str:
    if not transforms["state_in_prompt"]:
        return "no"
    padded = transforms["pad_state_in_prompt"]
    return f"yes, padded to {padded} numbers" if padded else "yes"


def _policy_table(manifest: dict[str, Any]) -> Table:
    """Everything in the manifest that is not a section with a table of its own."""
    elsewhere = {
        "quantization", "graphs", "entries", "norm_stats", "robot_description", "transforms", "settings_from", "notes",
        "ignored_settings", "lerobot_loop",
    }  # fmt: skip
    table = _table("Policy", "", "")
    for key, value in manifest.items():
        if key not in elsewhere:
            table.add_row(key, _text(value))
    stats = {key: entry for key, entry in (manifest.get("norm_stats") or {}).items() if isinstance(entry, dict)}
    sizes = {
        key: next((len(values) for values in entry.values() if isinstance(values, list)), 0) for key, entry in stats.items()
    }
    table.add_row("norm_stats", ", ".join(f"{key} [{size}]" for key, size in sizes.items()) or "none")
    return table


def _quantization_table(quantization: dict[str, Any]) -> Table:
    table = _table("Quantization", "", "")
    for key, value in quantization.items():
        if key != "linears":
            table.add_row(key, _text(value))
    return table


def _layer_table(linears: dict[str, dict[str, Any]]) -> Table:
    """A row for each layer and op in it: llm.layers.3 | duq::W4A8Linear | q_proj, k_proj, ... | size | SQNR."""
    rows: dict[tuple[Any, ...], list[tuple[str, dict[str, Any]]]] = {}
    for name, linear in linears.items():
        layer, rest = _split_layer(name)
        rows.setdefault((layer, linear.get("op")), []).append((rest, linear))
    table = _table("Quantized linears by layer", "layer", "op", "linears", "size", "worst SQNR")
    for (layer, op), members in rows.items():
        sqnr = [linear["sqnr_db"] for _, linear in members if linear.get("sqnr_db") is not None]
        table.add_row(
            layer,
            str(op),
            ", ".join(rest for rest, _ in members),
            human_size(sum(linear.get("bytes", 0) for _, linear in members)),
            f"{min(sqnr):.1f} dB" if sqnr else "-",
        )
    return table


def _split_layer(name: str) -> tuple[str, str]:
    """`llm.layers.3.mlp.up_proj` -> (`llm.layers.3`, `up_proj`); a linear of no layer stands for itself."""
    match = re.match(r"(.*\.layers\.\d+)\.(?:.*\.)?(.+)$", name)
    return (match[1], match[2]) if match else (name, "")


def _graph_table(name: str, graph: Any) -> Table:
    table = _table(f"Graph {name}", "", "")
    for key, value in (graph if isinstance(graph, dict) else {"": graph}).items():
        if key == "ops" and isinstance(value, dict):
            value = ", ".join(f"{op} x{count}" for op, count in Counter(value).most_common())
        table.add_row(key, _text(value))
    return table


def _graphs(manifest: dict[str, Any]) -> dict[str, Any]:
    """The sections about the graphs, without what the table of programs says."""
    return {name: graph for name, graph in (manifest.get("graphs") or {}).items() if name not in ("ptx", "nvrtc")}


def _schedules(plan: Plan) -> list[str]:
    return [name for name in plan.names if name.startswith("schedule/")] if plan.manifest["target"] == "cuda" else []


def _programs(plan: Plan) -> list[dict[str, Any]]:
    """Each program of a cuda plan, what its kernels are loaded from, and which GPUs run it; nothing of other targets."""
    if plan.manifest["target"] != "cuda":
        return []
    shared = {each.sm: shared_bytes_of(read_schedule(plan, each.schedule)) for each in programs_of(plan.manifest)}
    return [
        each.to_json() | {"runs_on": each.runs_on_text, "block_shared_bytes": shared[each.sm]}
        for each in programs_of(plan.manifest)
    ]


def _program_table(programs: list[dict[str, Any]]) -> Table:
    table = _table("Programs", "made for", "image", "runs on", "driver for CUDA", "shared memory of a thread block")
    for each in programs:
        shared = f"{each['block_shared_bytes'] / 1024:.0f} KB"
        table.add_row(f"SM {each['sm']}", each["image"], each["runs_on"], f"{each['driver']} and later", shared)
    return table


def _kernel_table(plan: Plan, name: str, each_layer: bool) -> Table:
    """The launches of the largest size: what they compute, with which kernel, on which weights."""
    schedule = read_schedule(plan, name)
    variant = schedule["variants"][-1]
    title = f"{name}: {variant['cameras']} cameras, {variant['prompt']} prompt tokens"
    table = _table(title, "program", "computes", "kernel", "launches", "weights", "size")
    rows: dict[tuple[Any, ...], list[int]] = {}
    for *row, size in launch_rows(schedule, each_layer):
        rows.setdefault(tuple(row), []).append(size)
    for (program, computes, kernel, dtype), sizes in rows.items():
        table.add_row(program, computes, kernel, str(len(sizes)), dtype, human_size(sum(sizes)) if sum(sizes) else "-")
    return table


def launch_rows(schedule: dict[str, Any], each_layer: bool) -> Iterator[tuple[str, str, str, str, int]]:
    """Of each launch of the largest size: its program ("prefix", "step"), what it computes, its kernel, the type and bytes of
    its weights. Without each_layer, the layers' numbers are left out."""
    variant = schedule["variants"][-1]
    for program in ("prefix", "step"):
        for launch in variant[program]:
            computes = launch["name"] if each_layer else re.sub(r"\.layers\.\d+\.", ".layers.*.", launch["name"])
            kernel = schedule["kernels"][launch["kernel"]]["expression"] if "kernel" in launch else launch["call"]
            weights = [
                argument[1] for argument in launch["args"].values() if isinstance(argument, list) and argument[0] == "w"
            ]
            product = [found for weight in weights if (found := re.search(r"\.(int4|int8|bf16)\b", weight))]
            dtype = product[0].group(1) if product else "-"
            yield program, computes, kernel, dtype, sum(schedule["weights"][found.string][1] for found in product)


def _entry_table(entries: dict[str, dict[str, Any]], each_weight: bool) -> Table:
    table = _table("Entries", "name", "size", "offset", "SHA-256")
    weights = [] if each_weight else [name for name in entries if name.startswith("weights/")]
    for name, entry in entries.items():
        if name not in weights:
            table.add_row(name, human_size(entry["bytes"]), str(entry["offset"]), entry["sha256"][:16])
    if weights:
        total = sum(entries[name]["bytes"] for name in weights)
        table.add_row(f"weights/ ({len(weights)} tensors)", human_size(total), "", "--entries lists them")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(columns))
    for column in columns:
        justify: JustifyMethod = "right" if column in ("size", "offset", "worst SQNR") else "left"
        table.add_column(column, justify=justify, no_wrap=column in ("layer", "op"), overflow="fold")
    return table


def _text(value: Any) -> str:
    """Nested values as one line of `key value` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(inner)}" if not isinstance(inner, dict) else f"{key} ({_text(inner)})"
                         for key, inner in value.items())  # fmt: skip
    if isinstance(value, list):
        return ", ".join(f"({_text(item)})" if isinstance(item, dict) else _text(item) for item in value)
    return str(value)


def human_size(count: float) -> str:
    """Bytes for people: "19.5 MB"."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


if __name__ == "__main__":
    main()
