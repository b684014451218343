"""Plan files: exact round trip, stable bytes, and one clear error for everything that is wrong."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from cutset.compiler.ir.convert import Converter
from cutset.compiler.ir.errors import PlanFormatError, UsageError, VerificationError
from cutset.compiler.ir.fingerprint import fingerprint
from cutset.compiler.ir.graph import Mode
from cutset.compiler.ir.mesh import Layout, Mesh, MeshAxis, Replicate, Shard
from cutset.compiler.ir.plan import Alternative, ParameterLayout, Plan, ValueLayout
from cutset.compiler.plan_json import (
    FORMAT_VERSION,
    check_plan_matches,
    load_plan,
    plan_from_json,
    plan_schema,
    plan_to_json,
    save_plan,
)
from cutset.cost_models.presets import preset, preset_names
from tests.ir.pipelines import cluster, make_plan, skip_graph
from tests.ir.strategies import plans

PLAN = make_plan(skip_graph())


def with_everything() -> Plan:
    layout = Layout((Shard(0), Replicate()))
    return replace(
        PLAN,
        mesh=Mesh((MeshAxis("data", 1), MeshAxis("pipeline", 3))),
        layouts=(ValueLayout("x", layout),),
        parameter_layouts=(ParameterLayout("w", layout, layout, layout, offloaded=True),),
        alternatives=(Alternative(Mesh.parse("data=3"), 2, 3, 0.5, False),),
        warnings=('op "my.op" has no rule', "zweite Zeile ü\n"),
    )


def resealed(change: Callable[[dict], None], plan: Plan = PLAN) -> str:
    """The plan's file after `change`, with the checksum that fits."""
    from cutset.compiler import plan_json

    document = json.loads(plan_to_json(plan))
    change(document)
    document["checksum"] = plan_json._checksum(document)
    return json.dumps(document)


@pytest.mark.parametrize("plan", [PLAN, with_everything(), make_plan(skip_graph(), 1, 1)])
def test_round_trip(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_a_plan_that_decides_nothing_yet_round_trips() -> None:
    plan = replace(
        PLAN, num_microbatches=0, stages=(), schedule=None, prediction=None, certificate=None
    )
    assert plan_from_json(plan_to_json(plan)) == plan


@pytest.mark.parametrize("name", preset_names())
def test_plans_for_every_preset_can_be_read_back(name: str) -> None:
    chosen = preset(name)
    few = replace(chosen, devices=chosen.devices[:2], types=chosen.types[:1])
    plan = replace(PLAN, cluster=few, stages=(), schedule=None, prediction=None)
    assert plan_from_json(plan_to_json(plan)) == plan


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(plans)
def test_conversion_is_exact_for_any_plan(plan: Plan) -> None:
    from cutset.compiler import plan_json

    converter: Converter = plan_json._CONVERTER
    data = json.loads(json.dumps(converter.to_json(plan, Plan), allow_nan=False))
    assert converter.from_json(data, Plan) == plan


def test_equal_plans_give_equal_bytes_in_any_process() -> None:
    code = (
        "import sys\n"
        "from tests.ir.pipelines import make_plan, skip_graph\n"
        "from cutset.compiler.plan_json import plan_to_json\n"
        "sys.stdout.write(plan_to_json(make_plan(skip_graph())))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # here the seed is another
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert other.stdout == plan_to_json(PLAN)


def test_node_ids_are_written_as_ranges() -> None:
    document = json.loads(plan_to_json(PLAN))
    assert [stage["nodes"] for stage in document["stages"]] == ["0-3", "0,4-6", "0,7-10"]


def test_every_field_of_the_schema_is_written() -> None:
    document = json.loads(plan_to_json(PLAN))
    assert sorted(document) == sorted(plan_schema()["properties"])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float) -> None:
    text = plan_to_json(PLAN)
    with pytest.raises(PlanFormatError, match="truncated") as caught:
        plan_from_json(text[: int(len(text) * share)], source="plan.json")
    assert caught.value.where.startswith("plan.json: line ")


def test_every_edit_of_a_number_or_word_is_refused() -> None:
    text = plan_to_json(PLAN)
    rows = text.splitlines()
    edited = 0
    for position, row in enumerate(rows):
        for old, new in (("0", "1"), ("2", "3"), ("cpu", "cpv"), ("true", "false")):
            if old not in row:
                continue
            changed = [*rows[:position], row.replace(old, new, 1), *rows[position + 1 :]]
            with pytest.raises(PlanFormatError):
                plan_from_json("\n".join(changed))
            edited += 1
    assert edited > 50


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda plan: plan["stages"][2].update(devices="cuda:0"), "stages[2].devices"),
        (lambda plan: plan["stages"][0].update(nodes="0-3;4"), "stages[0].nodes"),
        (lambda plan: plan["stages"][0].update(nodes="3-0"), "stages[0].nodes"),
        (lambda plan: plan["cluster"]["devices"][1].pop("node"), "cluster.devices[1]"),
        (lambda plan: plan["cluster"]["types"][0].update(backend="abacus"), "types[0].backend"),
        (lambda plan: plan["schedule"]["ranks"].__setitem__(1, "F1.0 X"), "schedule.ranks[1]"),
        (lambda plan: plan["prediction"].update(step_seconds=-1), "prediction.step_seconds"),
        (lambda plan: plan["prediction"]["memory"][0].update(device=0.0), "memory[0].device"),
        (lambda plan: plan["certificate"].update(gap=None), "certificate.gap"),
        (lambda plan: plan.update(mode="dream"), "mode"),
        (lambda plan: plan.update(code="import os"), "the document"),
        (lambda plan: plan.pop("mesh"), "the document"),
        (lambda plan: plan.update(mesh="data=0"), "mesh"),
        (lambda plan: plan.update(layouts=[{"value": "x", "layout": "[Q]"}]), "layouts[0].layout"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[dict], None], field: str) -> None:
    with pytest.raises(PlanFormatError) as caught:
        plan_from_json(resealed(change), source="plan.json")
    assert caught.value.where.startswith("plan.json: ")
    assert caught.value.where.endswith(field)
    assert caught.value.ways_out
    assert caught.value.exit_code == 2


def test_another_version_is_refused_with_both_versions() -> None:
    other = FORMAT_VERSION + 1
    with pytest.raises(PlanFormatError) as caught:
        plan_from_json(resealed(lambda plan: plan.update(format_version=other)))
    assert f"version {other}" in caught.value.cause
    assert f"reads version {FORMAT_VERSION}" in caught.value.cause


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "a plan is a JSON object, this is a list"),
        ("{}", "format_version is missing"),
        ('{"format_version": true}', "True is not a version number"),
        ('{"format_version": "1"}', "'1' is not a version number"),
        ('{"format_version": 1, "format_version": 1}', "'format_version' is given twice"),
        ('{"format_version": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("cos\nsystem\n(S'id'\ntR.", "not a complete JSON document"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanFormatError) as caught:
        plan_from_json(text)
    assert message in caught.value.cause


def test_a_consistent_plan_that_breaks_a_rule_is_refused_by_the_verifier() -> None:
    def swap(plan: dict) -> None:
        plan["stages"][0]["devices"], plan["stages"][1]["devices"] = "1", "0"

    with pytest.raises(VerificationError, match="stage 0 stands on device 1"):
        plan_from_json(resealed(swap))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the plan file: No such file") as caught:
        load_plan(tmp_path / "none.json")
    assert caught.value.where == str(tmp_path / "none.json")
    with pytest.raises(UsageError, match="cannot write the plan file"):
        save_plan(PLAN, tmp_path / "nowhere" / "plan.json")
    (tmp_path / "binary.json").write_bytes(b"\x80\x04\x95")
    with pytest.raises(PlanFormatError, match="not UTF-8"):
        load_plan(tmp_path / "binary.json")


def test_saving_replaces_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan.json"
    save_plan(PLAN, target)
    before = target.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match="No space left"):
        save_plan(replace(PLAN, warnings=("another",)), target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o644


def test_the_same_model_and_cluster_match() -> None:
    check_plan_matches(PLAN, fingerprint(skip_graph(), "Skip"), cluster(3))


def test_another_batch_size_matches() -> None:
    other = replace(PLAN.fingerprint, graph_hash="0" * 64)
    check_plan_matches(PLAN, other, cluster(3))


def test_another_model_is_refused() -> None:
    with pytest.raises(PlanFormatError, match="the model is Skip with 320") as caught:
        check_plan_matches(PLAN, fingerprint(skip_graph(5), "Skip"), cluster(3))
    assert caught.value.where == "plan: fingerprint.structure_hash"
    infer = fingerprint(skip_graph(mode=Mode.INFER), "Skip")
    with pytest.raises(PlanFormatError, match="another Skip"):
        check_plan_matches(PLAN, infer, cluster(3))


def test_another_cluster_is_refused() -> None:
    found = fingerprint(skip_graph(), "Skip")
    with pytest.raises(PlanFormatError, match=r"for 3 devices, the cluster 'test' has 2"):
        check_plan_matches(PLAN, found, cluster(2))
    with pytest.raises(PlanFormatError, match=r"device 0 has 100 bytes .* needs 304"):
        check_plan_matches(PLAN, found, cluster(3, memory_bytes=100))
    kind = replace(cluster(3).types[0], name="h100", backend="cuda")
    devices = tuple(replace(device, type="h100") for device in cluster(3).devices)
    other = replace(cluster(3), types=(kind,), devices=devices)
    with pytest.raises(PlanFormatError, match="device 0 has backend 'cuda', the plan is for 'cpu'"):
        check_plan_matches(PLAN, found, other)
