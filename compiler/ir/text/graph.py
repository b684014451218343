"""Text form of a `Graph`.

    graph mlp train {
      %x: f32[4,8] batch=0 = input "args[0]"
      %w: f32[8,8] grad = parameter layers.0.weight
      %linear: f32[4,8] grad = aten.linear.default(%x, %w) module=layers.0 source=model.py:7
      %sum: f32[] grad = aten.sum.default(%linear)
      return loss %sum
    }

Values are numbered in the order of the text. One whose id breaks that order carries it
(`%x#7: ...`). A node is called as its only result unless `name=` says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..errors import CaptureError
from ..graph import Attribute, Graph, Mode, Node, Operand, Output, OutputKind, Value, ValueKind
from ..ops import op_named
from .scan import (
    Line,
    Scanner,
    print_literal,
    print_name,
    print_text,
    read_enum,
    read_strings,
)

__all__ = ["parse_graph", "print_attributes", "print_graph", "print_node", "read_graph"]


def print_graph(graph: Graph, *, sources: bool = True) -> str:
    """The text of `graph`; `sources` False leaves out the user's source lines."""
    printer = _Printer(graph, sources)
    body = "".join(f"  {line}\n" for line in printer.lines())
    return f"graph {print_text(graph.name)} {graph.mode.value} {{\n{body}}}\n"


def print_node(graph: Graph, node: Node) -> str:
    """One line of the text of `graph`, for messages: names instead of ids, types of results."""
    return _Printer(graph, sources=False).node(node)


class _Printer:
    def __init__(self, graph: Graph, sources: bool) -> None:
        self.graph = graph
        self.sources = sources
        self.next_id: int | None = None

    def lines(self) -> Iterator[str]:
        self.next_id = 0
        graph = self.graph
        given = {item.id: item for item in graph.values if item.kind is not ValueKind.RESULT}
        for node in graph.nodes:
            first = min(node.outputs, default=0)
            needed = set(node.inputs)
            for value in [item for item in given if item < first or item in needed]:
                yield self.given(given.pop(value))
            yield self.node(node)
        yield from map(self.given, given.values())
        if graph.inputs != tuple(value.id for value in graph.values_of(ValueKind.INPUT)):
            yield f"inputs {' '.join(map(self.name, graph.inputs))}".rstrip()
        yield from map(self.output, graph.outputs)

    def name(self, value: int) -> str:
        if 0 <= value < len(self.graph.values):
            return print_name(self.graph.values[value].name)
        return f"%<no value {value}>"

    def declaration(self, value: Value) -> str:
        number = "" if self.next_id is None or value.id == self.next_id else f"#{value.id}"
        if self.next_id is not None:
            self.next_id = value.id + 1
        words = [f"{print_name(value.name)}{number}: {value.type}"]
        if value.requires_grad:
            words.append("grad")
        if value.batch_dim is not None:
            words.append(f"batch={value.batch_dim}")
        if value.kind is ValueKind.RESULT and value.origin:
            words.append(f"origin={print_text(value.origin)}")
        if value.aliases:
            words.append(f"aliases={print_literal(value.aliases)}")
        return " ".join(words)

    def given(self, value: Value) -> str:
        origin = f" {print_text(value.origin)}" if value.origin else ""
        return f"{self.declaration(value)} = {value.kind.value}{origin}"

    def node(self, node: Node) -> str:
        def operand(item: Operand) -> str:
            known = 0 <= item.index < len(node.inputs)
            return self.name(node.inputs[item.index]) if known else f"%<no input {item.index}>"

        results = [self.graph.values[item] for item in node.outputs]
        heads = ", ".join(map(self.declaration, results)) or "_"
        call = [print_literal(item, operand) for item in node.args]
        call += [f"{print_text(key)}={print_literal(item, operand)}" for key, item in node.kwargs]
        words = [f"{heads} = {node.op.name}({', '.join(call)})"]
        if [node.name] != [value.name for value in results]:
            words.append(f"name={print_text(node.name)}")
        if node.random_draw is not None:
            words.append(f"draw={node.random_draw}")
        if node.module_path:
            words.append(f"module={print_text(node.module_path)}")
        if node.source and self.sources:
            words.append(f"source={print_text(node.source)}")
        return " ".join(words)

    def output(self, output: Output) -> str:
        words = [f"return {output.kind.value} {self.name(output.value)}"]
        if output.target:
            words.append(f"target={print_text(output.target)}")
        if output.batch_dim is not None:
            words.append(f"batch={output.batch_dim}")
        return " ".join(words)


def print_attributes(node: Node) -> str:
    """The arguments of `node` without its operands: equal for calls that differ in those alone."""
    call = [print_literal(item, _numbered) for item in node.args]
    call += [f"{print_text(key)}={print_literal(item, _numbered)}" for key, item in node.kwargs]
    return f"({', '.join(call)})"


def _numbered(item: Operand) -> str:
    return f"%{item.index}"


def parse_graph(text: str) -> Graph:
    """Inverse of `print_graph`. Raises ValueError, naming the line, on malformed text."""
    scanner = Scanner(text)
    graph = read_graph(scanner)
    scanner.end()
    return graph


def read_graph(scanner: Scanner) -> Graph:
    """The graph that starts at the scanner's next line."""
    head = scanner.line()
    head.expect("graph")
    reader = _Reader(head.string(), read_enum(head, Mode))
    head.expect("{")
    head.end()
    while scanner.peek() != "}":
        reader.statement(scanner.line())
    scanner.line()
    return reader.graph()


class _Reader:
    """Collects statements; names are resolved as they are defined."""

    def __init__(self, name: str, mode: Mode) -> None:
        self.name = name
        self.mode = mode
        self.values: dict[int, Value] = {}
        self.ids: dict[str, int] = {}
        self.nodes: list[Node] = []
        self.inputs: tuple[int, ...] | None = None
        self.outputs: list[Output] = []
        self.next_id = 0

    def statement(self, line: Line) -> None:
        if line.accept("return"):
            self.outputs.append(self.output(line))
        elif line.accept("inputs"):
            names = []
            while line.peek():
                names.append(self.lookup(line, line.name()))
            self.inputs = tuple(names)
        else:
            self.definition(line)
        line.end()

    def output(self, line: Line) -> Output:
        kind = read_enum(line, OutputKind)
        value = self.lookup(line, line.name())
        target = ""
        if line.accept("target"):
            line.expect("=")
            target = line.string()
        return Output(kind, value, target, self.batch_dim(line))

    def definition(self, line: Line) -> None:
        if line.accept("_"):
            line.expect("=")
            self.node(line, ())
            return
        heads = [self.declaration(line)]
        while line.accept(","):
            heads.append(self.declaration(line))
        line.expect("=")
        if line.peek().count(".") == 2:
            self.node(line, tuple(heads))
            return
        kind = read_enum(line, ValueKind)
        origin = line.string() if line.peek() else ""
        self.add(line, replace(heads[0], kind=kind, origin=origin))

    def declaration(self, line: Line) -> Value:
        name = line.name()
        number = line.integer() if line.accept("#") else self.next_id
        self.next_id = number + 1
        line.expect(":")
        type = line.type()
        grad = line.accept("grad")
        batch_dim = self.batch_dim(line)
        origin = ""
        if line.accept("origin"):
            line.expect("=")
            origin = line.string()
        aliases: tuple[str, ...] = ()
        if line.accept("aliases"):
            line.expect("=")
            aliases = read_strings(line)
        return Value(number, name, type, ValueKind.RESULT, origin, grad, batch_dim, aliases)

    def batch_dim(self, line: Line) -> int | None:
        if not line.accept("batch"):
            return None
        line.expect("=")
        return line.integer()

    def add(self, line: Line, value: Value) -> None:
        if value.name in self.ids or value.id in self.values:
            raise line.error(f"{print_name(value.name)} or its id {value.id} is defined twice")
        self.values[value.id] = value
        self.ids[value.name] = value.id

    def lookup(self, line: Line, name: str) -> int:
        if name not in self.ids:
            raise line.error(f"{print_name(name)} is not defined")
        return self.ids[name]

    def node(self, line: Line, results: tuple[Value, ...]) -> None:
        inputs: dict[int, int] = {}

        def operand(name: str) -> Operand:
            value = self.lookup(line, name)
            return Operand(inputs.setdefault(value, len(inputs)))

        try:
            op = op_named(line.string())
        except CaptureError as error:
            raise line.error(error.cause) from error
        args, kwargs = _read_call(line, operand)
        name = results[0].name if len(results) == 1 else ""
        options: dict[str, str] = {"name": name, "draw": "", "module": "", "source": ""}
        for key in options:
            if line.accept(key):
                line.expect("=")
                options[key] = line.string()
        self.nodes.append(
            Node(
                id=len(self.nodes),
                name=options["name"],
                op=op,
                inputs=tuple(inputs),
                args=args,
                kwargs=kwargs,
                outputs=tuple(value.id for value in results),
                module_path=options["module"],
                source=options["source"],
                random_draw=int(options["draw"]) if options["draw"] else None,
            )
        )
        for value in results:
            self.add(line, value)

    def graph(self) -> Graph:
        if sorted(self.values) != list(range(len(self.values))):
            raise ValueError(f"graph {self.name}: the ids of its values are not 0, 1, 2, ...")
        values = tuple(self.values[number] for number in range(len(self.values)))
        in_order = tuple(value.id for value in values if value.kind is ValueKind.INPUT)
        return Graph(
            self.name,
            self.mode,
            values,
            tuple(self.nodes),
            in_order if self.inputs is None else self.inputs,
            tuple(self.outputs),
        )


def _read_call(
    line: Line, operand: Callable[[str], Operand]
) -> tuple[tuple[Attribute, ...], tuple[tuple[str, Attribute], ...]]:
    args: list[Attribute] = []
    kwargs: list[tuple[str, Attribute]] = []
    line.expect("(")
    while not line.accept(")"):
        if line.peek(1) == "=":
            key = line.string()
            line.expect("=")
            kwargs.append((key, line.literal(operand)))
        else:
            args.append(line.literal(operand))
        if line.peek() != ")":
            line.expect(",")
    return tuple(args), tuple(kwargs)
