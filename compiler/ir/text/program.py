"""Text form of a `Program`: header, stages with their graphs inline, one instruction a line.

program train rank=0 num_ranks=2 num_microbatches=2 memory_limit_bytes=64 plan_hash=5f.. {
  stage_ranks (0, 1)
  shard "layers.0.weight" f32[4,8] of f32[8,8] at (4, 0)
  update "layers.1.weight" f32[4,8] of f32[8,8] at (4, 0)
  terms "layers.0.bias" (0, 2)
  offloaded "layers.1.weight"
  stage 0 {
    axis tensor (0, 1)
    recomputed "2-5"
    keep "layers.1.weight" dim 0 over data summed
    part layers.1.weight layers.0.bias
    boundary h f32[4,8] of f32[4,16] at (0, 8)
    to %h (1,)
    graph mlp.stage0 train {
      ...
    }
  }
  Forward 0.0
  Send %h@0 -> 1 tag=0 f32[4,8]
  Send %h@0 -> 2 tag=1 f32[2,8] at (2, 8)
  Recv %h@0!1 <- 1 tag=2 f32[4,8]
  Free %h@0
  ...
  AllReduce layers.0.bias layers.2.bias (0, 2) sum
  AllReduce tied.weight (0, 1, 2) sum copies (2, 2, 1)
  OptimizerStep
}
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from ..graph import Mode
from ..program import (
    AllGather,
    AllReduce,
    Await,
    Backward,
    BackwardInput,
    BackwardWeight,
    ClipGradients,
    Forward,
    Free,
    GradientNorm,
    GradientPart,
    Instruction,
    OptimizerStep,
    Program,
    Recv,
    ReduceScatter,
    Register,
    Send,
    StageProgram,
    TensorShard,
)
from .graph import print_graph, read_graph
from .ranges import format_ranges, parse_ranges
from .scan import Line, Scanner, print_literal, print_name, print_text, read_enum, read_strings

__all__ = ["parse_program", "print_instruction", "print_program", "print_register"]

_COMPUTE = {kind.__name__: kind for kind in (Forward, Backward, BackwardInput, BackwardWeight)}


def print_program(program: Program) -> str:
    """The text of `program`."""
    head = (
        f"program {program.mode.value} rank={program.rank} num_ranks={program.num_ranks} "
        f"num_microbatches={program.num_microbatches} "
        f"memory_limit_bytes={program.memory_limit_bytes} "
        f"plan_hash={print_text(program.plan_hash)} {{"
    )
    lines = [head, f"  stage_ranks {print_literal(program.stage_ranks)}"]
    lines += [f"  shard {_shard(shard)}" for shard in program.shards]
    lines += [f"  update {_shard(shard)}" for shard in program.updates]
    for target, ranks in program.gradient_terms:
        lines.append(f"  terms {print_text(target)} {print_literal(ranks)}")
    lines += [f"  offloaded {print_text(name)}" for name in program.offloaded]
    for stage in program.stages:
        lines.append(f"  stage {stage.index} {{")
        lines += [f"    axis {print_text(n)} {print_literal(ranks)}" for n, ranks in stage.axes]
        if stage.recomputed:
            lines.append(f"    recomputed {print_text(format_ranges(stage.recomputed))}")
        lines += [f"    keep {_kept(part)}" for part in stage.kept]
        lines += [" ".join(["    part", *map(print_text, names)]) for names in stage.parts]
        lines += [f"    boundary {_shard(shard)}" for shard in stage.boundaries]
        lines += [f"    to {print_name(name)} {print_literal(to)}" for name, to in stage.consumers]
        lines += [f"    from {print_name(name)} {source}" for name, source in stage.producers]
        lines += textwrap.indent(print_graph(stage.graph), "    ").splitlines()
        lines.append("  }")
    lines += [f"  {print_instruction(item)}" for item in program.instructions]
    return "\n".join([*lines, "}"]) + "\n"


def print_register(register: Register) -> str:
    """A register: `%h@2`, or `%h@2!3` for the gradient from stage 3."""
    suffix = "" if register.consumer is None else f"!{register.consumer}"
    return f"{print_name(register.value)}@{register.microbatch}{suffix}"


def print_instruction(item: Instruction) -> str:
    """One instruction as one line."""
    kind = type(item).__name__
    match item:
        case Forward() | Backward() | BackwardInput() | BackwardWeight():
            part = item.part if isinstance(item, BackwardWeight) else None
            suffix = "" if part is None else f" part={part}"
            return f"{kind} {item.stage}.{item.microbatch}{suffix}"
        case Send() | Recv():
            arrow = "->" if isinstance(item, Send) else "<-"
            register = print_register(item.register)
            place = "" if item.offset is None else f" at {print_literal(item.offset)}"
            return f"{kind} {register} {arrow} {item.peer} tag={item.tag} {item.type}{place}"
        case Free():
            return " ".join([kind, *map(print_register, item.registers)])
        case GradientNorm():
            return f"{kind} {print_literal(item.parameters)}"
        case AllReduce():
            targets = " ".join(map(print_text, item.targets))
            copies = f" copies {print_literal(item.copies)}" if item.copies else ""
            ranks = print_literal(item.ranks)
            return f"{kind} {targets} {ranks} {print_text(item.reduction)}{copies}"
        case ReduceScatter() | AllGather():
            targets = " ".join(map(print_text, item.targets))
            return f"{kind} {targets} {print_literal(item.dims)} {print_literal(item.ranks)}"
        case Await():
            return " ".join([kind, *map(print_text, item.targets)])
        case ClipGradients():
            return f"{kind} {print_literal(item.max_norm)}"
        case OptimizerStep():
            return kind


def parse_program(text: str) -> Program:
    """Inverse of `print_program`. Raises ValueError, naming the line, on malformed text."""
    scanner = Scanner(text)
    head = scanner.line()
    head.expect("program")
    mode = read_enum(head, Mode)
    numbers = {}
    for key in ("rank", "num_ranks", "num_microbatches", "memory_limit_bytes"):
        head.expect(key, "=")
        numbers[key] = head.integer()
    head.expect("plan_hash", "=")
    plan_hash = head.string()
    head.expect("{")
    ranks = scanner.line()
    ranks.expect("stage_ranks")
    program = Program(
        mode=mode,
        **numbers,
        stage_ranks=_integers(ranks),
        shards=tuple(_read_shards(scanner, "shard")),
        updates=tuple(_read_shards(scanner, "update")),
        gradient_terms=tuple(_read_terms(scanner)),
        offloaded=tuple(_read_offloaded(scanner)),
        stages=tuple(_read_stages(scanner)),
        instructions=tuple(_read_instructions(scanner)),
        plan_hash=plan_hash,
    )
    scanner.line().expect("}")
    scanner.end()
    return program


def _integers(line: Line) -> tuple[int, ...]:
    items = line.literal()
    if not isinstance(items, tuple):
        raise line.error("expected a tuple of integers")
    return tuple(item for item in items if isinstance(item, int))


def _shard(shard: TensorShard) -> str:
    name, offset = print_text(shard.name), print_literal(shard.offset)
    return f"{name} {shard.part} of {shard.whole} at {offset}"


def _read_shards(scanner: Scanner, head: str) -> Iterator[TensorShard]:
    while scanner.peek() == head:
        line = scanner.line()
        line.expect(head)
        yield _read_shard(line)
        line.end()


def _read_shard(line: Line) -> TensorShard:
    name, part = line.string(), line.type()
    line.expect("of")
    whole = line.type()
    line.expect("at")
    return TensorShard(name, whole, _integers(line), part)


def _read_terms(scanner: Scanner) -> Iterator[tuple[str, tuple[int, ...]]]:
    while scanner.peek() == "terms":
        line = scanner.line()
        line.expect("terms")
        yield line.string(), _integers(line)
        line.end()


def _read_offloaded(scanner: Scanner) -> Iterator[str]:
    while scanner.peek() == "offloaded":
        line = scanner.line()
        line.expect("offloaded")
        yield line.string()
        line.end()


def _kept(part: GradientPart) -> str:
    summed = " summed" if part.summed else ""
    return f"{print_text(part.name)} dim {part.dim} over {print_text(part.axis)}{summed}"


def _read_kept(line: Line) -> GradientPart:
    name = line.string()
    line.expect("dim")
    dim = line.integer()
    line.expect("over")
    return GradientPart(name, line.string(), dim, line.accept("summed"))


def _read_stages(scanner: Scanner) -> Iterator[StageProgram]:
    while scanner.peek() == "stage":
        head = scanner.line()
        head.expect("stage")
        index = head.integer()
        head.expect("{")
        consumers: list[tuple[str, tuple[int, ...]]] = []
        producers: list[tuple[str, int]] = []
        axes: list[tuple[str, tuple[int, ...]]] = []
        recomputed: tuple[int, ...] = ()
        kept: list[GradientPart] = []
        parts: list[tuple[str, ...]] = []
        boundaries: list[TensorShard] = []
        while scanner.peek() in ("axis", "recomputed", "keep", "part", "boundary", "to", "from"):
            line = scanner.line()
            if line.accept("axis"):
                axes.append((line.string(), _integers(line)))
            elif line.accept("recomputed"):
                recomputed = _ids(line)
            elif line.accept("keep"):
                kept.append(_read_kept(line))
            elif line.accept("part"):
                parts.append(_names(line))
            elif line.accept("boundary"):
                boundaries.append(_read_shard(line))
            elif line.accept("to"):
                consumers.append((line.name(), _integers(line)))
            else:
                line.expect("from")
                producers.append((line.name(), line.integer()))
            line.end()
        graph = read_graph(scanner)
        scanner.line().expect("}")
        yield StageProgram(
            index,
            graph,
            tuple(consumers),
            tuple(producers),
            tuple(axes),
            recomputed,
            tuple(kept),
            tuple(parts),
            tuple(boundaries),
        )


def _ids(line: Line) -> tuple[int, ...]:
    try:
        return parse_ranges(line.string())
    except ValueError as error:
        raise line.error(str(error)) from error


def _read_instructions(scanner: Scanner) -> Iterator[Instruction]:
    while scanner.peek() != "}":
        line = scanner.line()
        yield _read_instruction(line)
        line.end()


def _read_instruction(line: Line) -> Instruction:
    kind = line.string()
    if kind in _COMPUTE:
        stage, dot, microbatch = line.string().partition(".")
        if not (dot and stage.isdecimal() and microbatch.isdecimal()):
            raise line.error("expected stage.microbatch")
        numbers = int(stage), int(microbatch)
        if kind == "BackwardWeight" and line.accept("part"):
            line.expect("=")
            return BackwardWeight(*numbers, line.integer())
        return _COMPUTE[kind](*numbers)
    match kind:
        case "Send" | "Recv":
            register = _read_register(line)
            line.expect("->" if kind == "Send" else "<-")
            peer = line.integer()
            line.expect("tag", "=")
            transfer = Send if kind == "Send" else Recv
            tag, type = line.integer(), line.type()
            offset = _integers(line) if line.accept("at") else None
            return transfer(register, peer, tag, type, offset)
        case "Free":
            registers = []
            while line.peek():
                registers.append(_read_register(line))
            return Free(tuple(registers))
        case "GradientNorm":
            return GradientNorm(read_strings(line))
        case "AllReduce":
            sides = _targets(line), _integers(line), line.string()
            return AllReduce(*sides, _integers(line) if line.accept("copies") else ())
        case "ReduceScatter" | "AllGather":
            collective = ReduceScatter if kind == "ReduceScatter" else AllGather
            return collective(_targets(line), _integers(line), _integers(line))
        case "Await":
            return Await(_names(line))
        case "ClipGradients":
            norm = line.literal()
            if not isinstance(norm, (int, float)):
                raise line.error("expected a number")
            return ClipGradients(norm)
        case "OptimizerStep":
            return OptimizerStep()
    raise line.error(f"{kind!r} is not an instruction")


def _names(line: Line) -> tuple[str, ...]:
    names = []
    while line.peek():
        names.append(line.string())
    return tuple(names)


def _targets(line: Line) -> tuple[str, ...]:
    names = []
    while line.peek() != "(":
        names.append(line.string())
    return tuple(names)


def _read_register(line: Line) -> Register:
    value = line.name()
    line.expect("@")
    microbatch = line.integer()
    return Register(value, microbatch, line.integer() if line.accept("!") else None)
