"""Plan files: JSON that is validated, versioned, checksummed and holds no code.

`plan.json` has `format_version`, `checksum` (SHA-256 of everything else) and the fields of `Plan`.
Node ids are written as ranges (`0-17,19`), a schedule as one line of actions per rank, mesh and
layouts as their text. Equal plans give equal bytes. The JSON Schema is
`schemas/plan.schema.json`; `docs/plan-format.md` explains the fields.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

from .files import unusable, write_whole
from .ir.cluster import Cluster
from .ir.convert import Codec, Converter
from .ir.corrections import Correction
from .ir.errors import PlanFormatError
from .ir.mesh import Layout, Mesh
from .ir.plan import Fingerprint, Plan
from .ir.schedule import Action
from .ir.text import format_ranges, parse_ranges
from .ir.verify import verify_plan
from .json_fields import strict_json

__all__ = [
    "FORMAT_VERSION",
    "check_plan_matches",
    "load_plan",
    "plan_from_json",
    "plan_schema",
    "plan_to_json",
    "save_plan",
]

FORMAT_VERSION = 9
_PLAN_AGAIN = "write the plan again: cutset plan MODEL --devices ... -o plan.json"


def _write_actions(actions: tuple[Action, ...]) -> str:
    return " ".join(map(str, actions))


def _read_actions(text: str) -> tuple[Action, ...]:
    return tuple(map(Action.parse, text.split()))


_CONVERTER = Converter(
    {
        Mesh: Codec(str, Mesh.parse),
        Layout: Codec(str, Layout.parse),
        Correction: Codec(str, Correction.parse),
        tuple[Action, ...]: Codec(_write_actions, _read_actions),
        tuple[int, ...]: Codec(format_ranges, parse_ranges),
    }
)


def plan_to_json(plan: Plan) -> str:
    """The content of the plan file, byte for byte the same for equal plans."""
    body = _CONVERTER.to_json(plan, Plan)
    assert isinstance(body, dict)
    document = {"format_version": FORMAT_VERSION, "checksum": "", **body}
    document["checksum"] = _checksum(document)
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _checksum(document: dict[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "checksum"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def plan_from_json(text: str, *, source: str = "plan") -> Plan:
    """Inverse of `plan_to_json`.

    Args:
        source: the file's name, for messages.

    Raises:
        PlanFormatError: the text is no JSON, of another version, violates the schema, or was
            edited; the message names the field.
        VerificationError: the plan breaks a rule of its level.
    """
    document = _parse(text, source)
    _check_version(document, source)
    _check_schema(document, source)
    if document["checksum"] != _checksum(document):
        raise PlanFormatError(
            f"the checksum does not fit the content: {source} was edited or damaged",
            where=f"{source}: checksum",
            ways_out=(_PLAN_AGAIN, "pin decisions by constraints= instead of editing the file"),
        )
    body = {k: v for k, v in document.items() if k not in ("format_version", "checksum")}
    try:
        plan = _CONVERTER.from_json(body, Plan)
    except ValueError as error:
        field, _, cause = str(error).partition(": ")
        raise PlanFormatError(cause, where=f"{source}: {field}", ways_out=(_PLAN_AGAIN,)) from error
    verify_plan(plan)
    return plan


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        document = strict_json(text)
    except json.JSONDecodeError as error:
        raise PlanFormatError(
            f"not a complete JSON document: {error.msg}",
            where=f"{source}: line {error.lineno}, column {error.colno} of "
            f"{text.count(chr(10)) + 1} lines",
            ways_out=("copy the file again, it may be truncated", _PLAN_AGAIN),
        ) from error
    except (ValueError, RecursionError) as error:
        cause = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise PlanFormatError(cause, where=source, ways_out=(_PLAN_AGAIN,)) from error
    if not isinstance(document, dict):
        raise PlanFormatError(
            f"a plan is a JSON object, this is a {type(document).__name__}",
            where=source,
            ways_out=(_PLAN_AGAIN,),
        )
    return document


def _check_version(document: dict[str, Any], source: str) -> None:
    version = document.get("format_version")
    where = f"{source}: format_version"
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        found = "is missing" if version is None else f"{version!r} is not a version number"
        raise PlanFormatError(
            f"format_version {found}; is this a plan?", where=where, ways_out=(_PLAN_AGAIN,)
        )
    if version != FORMAT_VERSION:
        raise PlanFormatError(
            f"the plan has format version {version}, this cutset reads version {FORMAT_VERSION}",
            where=where,
            ways_out=("use the version of cutset that wrote the plan", _PLAN_AGAIN),
        )


@functools.cache
def _schema_text() -> str:
    schema = importlib.resources.files(__package__).joinpath("schemas", "plan.schema.json")
    return schema.read_text(encoding="utf-8")


def plan_schema() -> dict[str, Any]:
    """The JSON Schema of plan files."""
    schema = json.loads(_schema_text())
    assert isinstance(schema, dict)
    return schema


def _check_schema(document: dict[str, Any], source: str) -> None:
    from jsonschema import Draft202012Validator  # slow to import

    errors = Draft202012Validator(plan_schema()).iter_errors(document)
    first = min(errors, key=lambda error: (len(error.path), str(error.json_path)), default=None)
    if first is None:
        return
    field = first.json_path.removeprefix("$").lstrip(".") or "the document"
    message = first.message if len(first.message) < 300 else f"{first.message[:300]}..."
    raise PlanFormatError(message, where=f"{source}: {field}", ways_out=(_PLAN_AGAIN,))


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan file at once: a reader sees the old file or the new one, never a part.

    Raises:
        UsageError: the file cannot be written.
    """
    write_whole(Path(path), plan_to_json(plan), "plan")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read and check a plan file.

    Raises:
        UsageError: the file cannot be read.
        PlanFormatError, VerificationError: see `plan_from_json`.
    """
    source = Path(path)
    try:
        text = source.read_bytes().decode("utf-8")
    except OSError as error:
        raise unusable(source, "read", "plan", error) from error
    except UnicodeDecodeError as error:
        raise PlanFormatError(
            "the file is not UTF-8 text; is this a plan?",
            where=f"{source}: byte {error.start}",
            ways_out=(_PLAN_AGAIN,),
        ) from error
    return plan_from_json(text, source=str(source))


def check_plan_matches(plan: Plan, model: Fingerprint, cluster: Cluster) -> None:
    """Refuse a plan that was made for another model or another cluster.

    The model matches when its structure does: another batch size or sequence length is fine.
    A cluster matches when it has as many devices, each of the planned type and backend, and
    with the memory that the plan needs; rates and links decide how good a plan is, not whether it
    runs.

    Raises:
        PlanFormatError: the plan is for another model or cluster; the field is named.
    """
    _check_model(plan.fingerprint, model)
    planned, found = plan.cluster, cluster
    if len(planned.devices) != len(found.devices):
        raise _other_cluster(
            "devices",
            f"the plan is for {len(planned.devices)} devices, the cluster {found.name!r} has "
            f"{len(found.devices)}",
        )
    needs = {entry.device: entry.total_bytes for entry in _predicted(plan)}
    for device in planned.devices:
        index = device.index
        theirs, ours = planned.type_of(index), found.type_of(index)
        for name in ("backend", "name"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            if mine != other:
                raise _other_cluster(
                    f"devices[{index}].type",
                    f"device {index} has {name} {mine!r}, the plan is for {other!r}",
                )
        if needs.get(index, 0) > ours.memory_bytes:
            raise _other_cluster(
                f"devices[{index}].type",
                f"device {index} has {ours.memory_bytes} bytes of memory, the plan needs "
                f"{needs[index]}",
            )


def _predicted(plan: Plan) -> tuple[Any, ...]:
    return plan.prediction.memory if plan.prediction is not None else ()


def _check_model(planned: Fingerprint, found: Fingerprint) -> None:
    if planned.structure_hash == found.structure_hash:
        return
    if (planned.name, planned.num_parameters) != (found.name, found.num_parameters):
        difference = (
            f"the plan is for {planned.name} with {planned.num_parameters} parameters, the model "
            f"is {found.name} with {found.num_parameters}"
        )
    else:
        difference = (
            f"the plan is for another {planned.name}: structure {planned.structure_hash[:12]}, "
            f"the model has {found.structure_hash[:12]} (other layers, modes, dtypes or versions)"
        )
    raise PlanFormatError(
        difference, where="plan: fingerprint.structure_hash", ways_out=(_PLAN_AGAIN,)
    )


def _other_cluster(field: str, cause: str) -> PlanFormatError:
    ways_out = ("plan again for this cluster: cutset plan MODEL --devices ...",)
    return PlanFormatError(cause, where=f"plan: cluster.{field}", ways_out=ways_out)
