"""Bundles that are changed while parts go past."""

import shutil
from pathlib import Path

import msgspec

from stpm.edge import manifest as manifests
from stpm.edge.bundle import open_bundle
from stpm.tools.faults.bench import Bench
from stpm.tools.faults.scenarios import scenario


def _another(bundle: Path, target: Path, category: str) -> Path:
    """The same networks under another name: a bundle with another hash."""
    shutil.copytree(bundle, target)
    _rename(target, category)
    return target


def _rename(target: Path, category: str) -> None:
    manifest = open_bundle(target).manifest
    partial = target / "manifest.json.partial"
    partial.write_bytes(manifests.encode(msgspec.structs.replace(manifest, category=category)))
    partial.rename(target / "manifest.json")


@scenario("ascii+ack")
def recipes_switched(bench: Bench) -> None:
    """by the PLC and by stpm-ctl in turn, under load"""
    recipes = {"1": str(bench.bundle), "2": str(_another(bench.bundle, bench.folder / "two", "another part"))}
    with bench.peer() as peer, bench.line(peer, recipes=recipes) as line:
        line.works()
        for recipe in (2, 1, 2, 1):
            with line.fault(f"recipe {recipe}"):
                if recipe == 2:
                    peer.ask_recipe(2)
                    line.until(lambda: line.status()["recipe"] == 2, what="recipe 2")
                else:
                    answer = line.tell("recipe", 1)
                    bench.expect(answer.ok, f"stpm-ctl recipe 1: {answer.text}")
            line.works(3)
        with line.fault("a recipe that is not there"):
            peer.ask_recipe(7)
            line.until_state("DEGRADED")
            line.tell("recipe", 1)
        unknown = line.status()["parts"].get("UNKNOWN", 0)
        bench.expect(unknown == 0, f"{unknown} parts are UNKNOWN because of a change of recipe")


@scenario("modbus slave")
def bundle_replaced(bench: Bench) -> None:
    """on disk, under load: reload, rollback, a damaged one"""
    bundle = _another(bench.bundle, bench.folder / "bundle", "before")
    with bench.peer() as peer, bench.line(peer, recipes={"1": str(bundle)}) as line:
        line.more_files = 2  # the earlier bundle stays loaded
        line.works()
        _rename(bundle, "after")
        with line.fault("loaded again"):
            answer = line.tell("reload", 1)
        bench.expect(answer.ok and "after" in answer.text, f"reload: {answer.text}")
        line.works(3)
        with line.fault("rolled back"):
            answer = line.tell("rollback", 1)
        bench.expect(answer.ok and "before" in answer.text, f"rollback: {answer.text}")
        content = (bundle / "manifest.json").read_bytes()
        with line.fault("a damaged bundle"):
            (bundle / "manifest.json").write_bytes(content[:100])
            answer = line.tell("reload", 1)
            (bundle / "manifest.json").write_bytes(content)
            bench.expect(not answer.ok, "a damaged bundle was not refused")
            line.until_state("DEGRADED")
            line.tell("reload", 1)
        line.works(3)
        unknown = line.status()["parts"].get("UNKNOWN", 0)
        bench.expect(unknown == 0, f"{unknown} parts are UNKNOWN because of a change of bundle")
