"""Text form of a `Plan` and of a `Cluster`.

plan train batch_size=8 num_microbatches=4 mesh="pipeline=2"
model name="GPT2" graph_hash="91ab.." structure_hash="7e0c.." num_parameters=10 ...
optimizer name="adamw" state_bytes_per_parameter_byte=2.0
cluster workers local=true {
  type name="cpu" backend="cpu" memory_bytes=8000000000 ...
  devices 0-1 type="cpu" node="host"
  link latency_seconds=1e-05 bytes_per_second=5000000000.0 a="*" b="*" same_node=none
}
stage 0 devices=0-1 nodes=0-17,19
layout %ids "[S(0),R]"
parameter %w held="[R,S(0)]" gradient="[P(sum),S(0)]" state="[S(1),S(0)]"
nodes 0-3,9 inputs="[S(0),R] [R,S(0)]" outputs="[S(0),S(1)]"
recomputed 3-5
schedule 1f1b stages=2 microbatches=4
  0: F0.0 F0.1 ...
prediction step_seconds=0.25 ...
memory device=0 parameters_bytes=4096 ...
load device=0 compute_seconds=0.01 ...
certificate objective=0.25 lower_bound=0.25 ...
alternative mesh="data=4" num_microbatches=2 zero=1 step_seconds=0.3 fits=true
profile kind="blocks" rounds=2 ...
first mesh="data=4" num_microbatches=2 zero=1 step_seconds=0.2 fits=true
profiled path="layers.0" device_type="cpu" num_nodes=17 ... measured=(0.01, 0.01, 0.02)
warning "..."

Stages with meshes of their own have their layouts below them: `own mesh="data=2" {`, lines
`layout`, `parameter` and `nodes`, and `}`.

What few plans have is written where it is so: `objective throughput` at the end of the first line,
`threads 4`, `cores 8`, `instruction_seconds 4e-05` and `message_seconds 1e-4` at the end of a
type's, `streams 1.5`, `compute_share 0.25`, `progress_share 0.5` and `skew_seconds 2e-4` at the end
of a link's, `offloaded` at the end of a parameter's; after a type lines `host`, `curve`, `op_cost`
and `correction`, after a link lines `collective`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from typing import Any, TypeVar

from ..cluster import Cluster, Device, DeviceType, Host, Link, LinkRule, OpCost, RateCurve
from ..corrections import Correction, Corrections
from ..graph import Mode
from ..mesh import Mesh
from ..plan import (
    Alternative,
    Certificate,
    DeviceLoad,
    Fingerprint,
    MemoryPrediction,
    Objective,
    OptimizerModel,
    Plan,
    Prediction,
    ProfiledBlock,
    ProfileReport,
    Stage,
    StageMesh,
)
from ..schedule import Schedule
from .layouts import print_layouts, read_all, read_layouts
from .ranges import format_ranges, parse_ranges
from .scan import Line, Scanner, print_literal, print_text, read_enum

__all__ = [
    "parse_plan",
    "print_plan",
]

_Record = TypeVar("_Record")
_OF_FEW_TYPES: dict[str, Any] = {
    "host": None,
    "threads": None,
    "cores": None,
    "instruction_seconds": 0.0,
    "message_seconds": 0.0,
    "curves": (),
    "op_costs": (),
    "corrections": None,
}
_HOST_SECONDS = ("instruction_seconds", "message_seconds")
_FEW_SHARES = {
    "compute_share": 0.0,
    "progress_share": 1.0,
    "skew_seconds": 0.0,
}  # of links, if not so
_OF_FEW_LINKS: dict[str, Any] = {
    "collectives": (),
    "streams": None,
    "handling": (),
    **_FEW_SHARES,
}


def print_plan(plan: Plan) -> str:
    """The text of `plan`, one decision a line."""
    return "".join(f"{line}\n" for line in _plan_lines(plan))


def _plan_lines(plan: Plan) -> Iterator[str]:
    special = f" objective {plan.objective.value}" if plan.objective is not Objective.STEP else ""
    yield (
        f"plan {plan.mode.value} batch_size={plan.batch_size} "
        f"num_microbatches={plan.num_microbatches} mesh={print_literal(str(plan.mesh))}{special}"
    )
    yield _record("model", plan.fingerprint)
    yield _record("optimizer", plan.optimizer)
    yield from print_cluster(plan.cluster).splitlines()
    for stage in plan.stages:
        nodes = print_text(format_ranges(stage.nodes))
        devices = print_text(format_ranges(stage.devices))
        yield f"stage {stage.index} devices={devices} nodes={nodes}"
        if stage.own is not None:
            yield f"own mesh={print_literal(str(stage.own.mesh))} {{"
            yield from (f"  {line}" for line in print_layouts(stage.own))
            yield "}"
    yield from print_layouts(plan)
    if plan.recomputed:
        yield f"recomputed {print_text(format_ranges(plan.recomputed))}"
    if plan.schedule is not None:
        head, *rows = str(plan.schedule).splitlines()
        yield from [head, *(f"  {row}" for row in rows)]
    if plan.prediction is not None:
        yield _record("prediction", plan.prediction, skip=("memory", "loads"))
        yield from (_record("memory", entry) for entry in plan.prediction.memory)
        yield from (_record("load", entry) for entry in plan.prediction.loads)
    if plan.certificate is not None:
        yield _record("certificate", plan.certificate)
    for other in plan.alternatives:
        mesh = print_literal(str(other.mesh))
        yield _record(f"alternative mesh={mesh}", other, skip=("mesh",))
    if plan.profile is not None:
        first = plan.profile.first
        yield _record("profile", plan.profile, skip=("first", "blocks"))
        mesh = print_literal(str(first.mesh))
        yield _record(f"first mesh={mesh}", first, skip=("mesh",))
        yield from (_record("profiled", block) for block in plan.profile.blocks)
    yield from (f"warning {print_literal(text)}" for text in plan.warnings)


def print_cluster(cluster: Cluster) -> str:
    """The text of `cluster`, as it stands inside the text of a plan."""
    local = print_literal(cluster.local)
    lines = [f"cluster {print_text(cluster.name)} local={local} {{"]
    for entry in cluster.types:
        rare = "" if entry.threads is None else f" threads {entry.threads}"
        rare += "" if entry.cores is None else f" cores {entry.cores}"
        for name in _HOST_SECONDS:
            if seconds := getattr(entry, name):
                rare += f" {name} {print_literal(seconds)}"
        lines.append(f"  {_record('type', entry, skip=_OF_FEW_TYPES)}{rare}")
        if entry.host is not None:
            link = _record("host", entry.host.link)
            lines.append(f"  {_record(link, entry.host, skip=('link',))}")
        lines += [f"  {_record('curve', curve)}" for curve in entry.curves]
        lines += [f"  {_record('op_cost', cost)}" for cost in entry.op_costs]
        known = () if entry.corrections is None else entry.corrections.entries
        lines += [f"  correction {print_literal(str(item))}" for item in known]
    runs: list[list[Device]] = []
    for device in cluster.devices:
        if runs and replace(runs[-1][-1], index=device.index) == device:
            runs[-1].append(device)
        else:
            runs.append([device])
    for run in runs:
        indices = print_text(format_ranges(tuple(device.index for device in run)))
        lines.append(f"  {_record(f'devices {indices}', run[0], skip=('index',))}")
    for rule in cluster.links:
        link = _record("link", rule.link)
        rare = "" if rule.streams is None else f" streams {print_literal(rule.streams)}"
        for name, usual in _FEW_SHARES.items():
            if getattr(rule, name) != usual:
                rare += f" {name} {print_literal(getattr(rule, name))}"
        lines.append(f"  {_record(link, rule, skip=('link', *_OF_FEW_LINKS))}{rare}")
        for name, own in rule.collectives:
            lines.append(f"  {_record(f'collective {print_literal(name)}', own)}")
        for name, own in rule.handling:
            lines.append(f"  {_record(f'handling {print_literal(name)}', own)}")
    return "\n".join([*lines, "}"]) + "\n"


def _record(head: str, record: Any, *, skip: Collection[str] = ()) -> str:
    """`head field=literal ...` for the fields of a flat dataclass."""
    names = (field.name for field in fields(record) if field.name not in skip)
    return " ".join([head, *(f"{name}={print_literal(getattr(record, name))}" for name in names)])


def _read_record(line: Line, kind: type[_Record], **given: object) -> _Record:
    """Inverse of `_record`; fields in `given` are not in the text."""
    options: dict[str, object] = dict(given)
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in given:
            line.expect(field.name, "=")
            options[field.name] = line.literal()
    return kind(**options)


def parse_plan(text: str) -> Plan:
    """Inverse of `print_plan`. Raises ValueError, naming the line, on malformed text."""
    scanner = Scanner(text)
    head = scanner.line()
    head.expect("plan")
    mode = read_enum(head, Mode)
    head.expect("batch_size", "=")
    batch_size = head.integer()
    head.expect("num_microbatches", "=")
    num_microbatches = head.integer()
    head.expect("mesh", "=")
    mesh = Mesh.parse(head.string())
    objective = read_enum(head, Objective) if head.accept("objective") else Objective.STEP
    head.end()
    fingerprint = _read_line(scanner, "model", Fingerprint)
    optimizer = _read_line(scanner, "optimizer", OptimizerModel)
    cluster = _read_cluster(scanner)
    stages = tuple(_read_stages(scanner))
    layouts, parameters, nodes = read_layouts(scanner)
    plan = Plan(
        fingerprint=fingerprint,
        optimizer=optimizer,
        cluster=cluster,
        mode=mode,
        objective=objective,
        batch_size=batch_size,
        num_microbatches=num_microbatches,
        mesh=mesh,
        stages=stages,
        layouts=layouts,
        parameter_layouts=parameters,
        node_layouts=nodes,
        recomputed=tuple(
            node
            for run in read_all(scanner, "recomputed", lambda line: parse_ranges(line.string()))
            for node in run
        ),
        schedule=_read_schedule(scanner) if scanner.peek() == "schedule" else None,
    )
    if scanner.peek() == "prediction":
        plan = replace(plan, prediction=_read_prediction(scanner))
    if scanner.peek() == "certificate":
        plan = replace(plan, certificate=_read_line(scanner, "certificate", Certificate))
    plan = replace(plan, alternatives=tuple(read_all(scanner, "alternative", _read_alternative)))
    if scanner.peek() == "profile":
        plan = replace(plan, profile=_read_profile(scanner))
    plan = replace(plan, warnings=tuple(read_all(scanner, "warning", Line.string)))
    scanner.end()
    return plan


def _read_line(scanner: Scanner, head: str, kind: type[_Record], **given: object) -> _Record:
    line = scanner.line()
    line.expect(head)
    record = _read_record(line, kind, **given)
    line.end()
    return record


def _read_cluster(scanner: Scanner) -> Cluster:
    head = scanner.line()
    head.expect("cluster")
    name = head.string()
    head.expect("local", "=")
    local = head.literal() is True
    head.expect("{")
    types = tuple(_read_types(scanner))
    devices = [item for run in read_all(scanner, "devices", _read_devices) for item in run]
    links = tuple(_read_links(scanner))
    scanner.line().expect("}")
    return Cluster(name, types, tuple(devices), links, local)


def _read_types(scanner: Scanner) -> Iterator[DeviceType]:
    while scanner.peek() == "type":
        line = scanner.line()
        line.expect("type")
        entry: DeviceType = _read_record(line, DeviceType, **_OF_FEW_TYPES)
        if line.accept("threads"):
            entry = replace(entry, threads=line.integer())
        if line.accept("cores"):
            entry = replace(entry, cores=line.integer())
        for name in _HOST_SECONDS:
            if line.accept(name):
                given: dict[str, Any] = {name: _number(line)}
                entry = replace(entry, **given)
        line.end()
        for host in read_all(scanner, "host", _read_host):
            entry = replace(entry, host=host)
        curves = read_all(scanner, "curve", lambda line: _read_record(line, RateCurve))
        entry = replace(entry, curves=tuple(curves))
        costs = read_all(scanner, "op_cost", lambda line: _read_record(line, OpCost))
        entry = replace(entry, op_costs=tuple(costs))
        known = tuple(read_all(scanner, "correction", _read_correction))
        yield replace(entry, corrections=Corrections(known) if known else None)


def _read_correction(line: Line) -> Correction:
    return Correction.parse(line.string())


def _number(line: Line) -> float:
    value = line.literal()
    if not isinstance(value, float):
        raise line.error(f"{value!r} is not a number")
    return value


def _read_host(line: Line) -> Host:
    return _read_record(line, Host, link=_read_record(line, Link))


def _read_devices(line: Line) -> list[Device]:
    indices = parse_ranges(line.string())
    first = _read_record(line, Device, index=0)
    return [replace(first, index=index) for index in indices]


def _read_links(scanner: Scanner) -> Iterator[LinkRule]:
    while scanner.peek() == "link":
        line = scanner.line()
        line.expect("link")
        link = _read_record(line, Link)
        rule: LinkRule = _read_record(line, LinkRule, link=link, **_OF_FEW_LINKS)
        if line.accept("streams"):
            rule = replace(rule, streams=_number(line))
        for name in _FEW_SHARES:
            if line.accept(name):
                share: dict[str, Any] = {name: _number(line)}
                rule = replace(rule, **share)
        line.end()
        own, handling = (
            tuple(read_all(scanner, head, lambda line: (line.string(), _read_record(line, Link))))
            for head in ("collective", "handling")
        )
        yield replace(rule, collectives=own, handling=handling)


def _read_stages(scanner: Scanner) -> Iterator[Stage]:
    while scanner.peek() == "stage":
        line = scanner.line()
        line.expect("stage")
        index = line.integer()
        line.expect("devices", "=")
        devices = parse_ranges(line.string())
        line.expect("nodes", "=")
        stage = Stage(index, devices, parse_ranges(line.string()))
        line.end()
        yield replace(stage, own=_read_own(scanner)) if scanner.peek() == "own" else stage


def _read_own(scanner: Scanner) -> StageMesh:
    line = scanner.line()
    line.expect("own")
    line.expect("mesh", "=")
    mesh = Mesh.parse(line.string())
    line.expect("{")
    line.end()
    own = StageMesh(mesh, *read_layouts(scanner))
    scanner.line().expect("}")
    return own


def _read_alternative(line: Line) -> Alternative:
    line.expect("mesh", "=")
    return _read_record(line, Alternative, mesh=Mesh.parse(line.string()))


def _read_profile(scanner: Scanner) -> ProfileReport:
    report = _read_line(scanner, "profile", ProfileReport, first=None, blocks=())
    line = scanner.line()
    line.expect("first")
    first = _read_alternative(line)
    line.end()
    blocks = tuple(read_all(scanner, "profiled", lambda line: _read_record(line, ProfiledBlock)))
    return replace(report, first=first, blocks=blocks)


def _read_schedule(scanner: Scanner) -> Schedule:
    rows = [scanner.raw()]
    while scanner.peek().isdecimal():
        rows.append(scanner.raw())
    return Schedule.parse("\n".join(rows))


def _read_prediction(scanner: Scanner) -> Prediction:
    figures = _read_line(scanner, "prediction", Prediction, memory=(), loads=())
    rows = read_all(scanner, "memory", lambda line: _read_record(line, MemoryPrediction))
    memory = tuple(rows)
    loads = read_all(scanner, "load", lambda line: _read_record(line, DeviceLoad))
    return replace(figures, memory=memory, loads=tuple(loads))
