"""Who works on a cache's steps, for a system on this machine: a rig of its processors, and a scheduler of its lanes."""

import re
from dataclasses import replace
from pathlib import Path

from tandemkv.cache import CacheSpec
from tandemkv.errors import InputError, UnsupportedError
from tandemkv.lanes import Crew, HybridCrew, Rig
from tandemkv.schedule import Machine, Plan, Profile, Scheduler, Solution, Speed, Work, predict
from tandemkv.schedule.budget import Budget, BudgetRule
from tandemkv.schedule.placement import Placement, place
from tandemkv.systems import System


def parse_link(text: str) -> Speed:
    """`"16"`: 16 GB/s, both ways; `"16:20"`: and 20 us for every transfer. InputError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?::\s*(\d+(?:\.\d+)?)\s*)?", text, re.ASCII)
    if match is None or float(match[1]) == 0:
        raise InputError(
            f"expected a link (--link) as GB/s above 0, or GB/s:us, in digits such as '16', '0.5' or '16:20', got "
            f"{text!r}"
        )
    return Speed(float(match[2] or 0), float(match[1]))


def links_of(profile: Profile, link: str | None) -> tuple[Speed, Speed]:
    """Up and down: as asked for, or as this machine copies memory."""
    if link is not None:
        speed = parse_link(link)
        return speed, speed
    return profile.transfers.up, profile.transfers.down


def machine_for(profile: Profile, spec: CacheSpec, links: tuple[Speed, Speed]) -> Machine:
    """Speeds for the costs of a cache's layers; UnsupportedError where none were measured in their dtype."""
    dtype = str(spec.dtype).removeprefix("torch.")
    if dtype not in profile.products:
        known = ", ".join(profile.products)
        raise UnsupportedError(f"what products in {dtype} cost is not measured: systems with lanes run in {known}")
    far = spec.far_formats[-1].packing if spec.far_formats else "panels"
    return profile.machine(dtype, spec.hidden_size or 0, links, None if far == "panels" else far)


def work_for(spec: CacheSpec, num_q_heads: int, num_seqs: int, num_tokens: int) -> Work:
    """A decode step of a layer without a window, behind so many tokens."""
    far = spec.far_layouts[-1]
    k_bytes, v_bytes = far.token_bytes(spec.head_dim, spec.v_width)
    near = sum(spec.near_layout.token_bytes(spec.head_dim, spec.v_width))
    far_pages = sum(spec.num_far_pages(num_seqs, num_tokens)) // max(1, num_seqs * spec.num_full_layers)
    far_tokens = far_pages * spec.page_size
    return Work(
        num_seqs=num_seqs,
        num_q_heads=num_q_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_width,
        near_tokens=min(num_tokens, spec.near_tokens),  # far ones are whole pages: a part of one may count twice
        far_tokens=far_tokens,
        k_bytes=spec.num_kv_heads * k_bytes,
        v_bytes=spec.num_kv_heads * v_bytes,
        near_bytes=spec.num_kv_heads * near,
        hidden=spec.hidden_size or 0,
        item_bytes=spec.dtype.itemsize,
        page_size=spec.page_size,
    )


def placement_for(system: System, work: Work, machine: Machine, plan: Plan | None = None) -> Placement:
    """Whose layer inputs a system keeps, and how many tokens stay near beside them; plan: that is not to change."""
    if plan is None:
        return place(work, machine, system.lanes)
    fitted = plan.scaled(work.far_tokens, work.page_size, {})
    num_inputs = fitted.tokens.get("recompute", 0)
    priced = replace(work, num_inputs=num_inputs, inputs_are_near=False)
    return Placement(num_inputs, "far", work.near_tokens, Solution(fitted, predict(priced, machine, fitted)))


def crew_for(system: System, machine: Machine, plan: Plan | None = None, budget: BudgetRule | None = None) -> Crew:
    """A rig with the machine's links, and a scheduler of the system's lanes. plan: that is not to change. budget: of a
    system that joins logits, within what it moves; with a plan it stays at its floor.

    InputError where this process has fewer than two processors.
    """
    scheduler = Scheduler(machine, system.lanes, plan)
    if system.joins_logits:
        assert budget is not None
        rule = budget if plan is None else replace(budget, most_tokens=budget.floor_tokens)
        return HybridCrew(Rig(machine.up, machine.down), scheduler, Budget(rule))
    return Crew(Rig(machine.up, machine.down), scheduler, stages_heads=system.stages_heads)


def read_plan(path: Path, system: System) -> Plan:
    """The plan of a file, for a system; InputError, with what was expected, for any that is none or has other lanes."""
    try:
        plan = Plan.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}") from error
    except InputError as error:
        raise InputError(f"--plan {path}: {error}") from error
    if others := sorted(set(plan.tokens) - set(system.lanes)):
        has = ", ".join(system.lanes) or "none"
        raise InputError(f"the plan {path} uses the lanes {', '.join(others)}, this system has {has}")
    return plan
