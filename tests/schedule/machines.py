"""Machines and work for tests of the schedule: a plain one of each, and strategies for any."""

from hypothesis import strategies as st

from tandemkv.schedule import Machine, Plan, Products, Speed, Work

INF = float("inf")


def plain_machine(device_gbps: float = 40.0, host_gbps: float = 20.0, up_gbps: float = 10.0, **more: object) -> Machine:
    """No start-ups, no hand-offs, memory that never binds, products at 1000 GFLOP/s."""
    return Machine(
        device_attend=Speed(0, device_gbps),
        host_attend=Speed(0, host_gbps),
        up=Speed(0, up_gbps),
        down=Speed(0, 1e9),
        products=Products(((1, 1000.0),)),
        host_logits=Speed(0, host_gbps),
        device_weigh=Speed(0, device_gbps),
        **more,  # type: ignore[arg-type]
    )


def plain_work(far_tokens: int, group_size: int = 1, num_kv_heads: int = 8, **more: object) -> Work:
    """bf16 heads of 128; hidden is that of all query heads."""
    head_bytes = num_kv_heads * 128 * 2
    fields: dict[str, object] = {
        "num_seqs": 1,
        "num_q_heads": num_kv_heads * group_size,
        "num_kv_heads": num_kv_heads,
        "head_dim": 128,
        "v_head_dim": 128,
        "near_tokens": 0,
        "far_tokens": far_tokens,
        "k_bytes": head_bytes,
        "v_bytes": head_bytes,
        "near_bytes": 2 * head_bytes,
        "hidden": num_kv_heads * group_size * 128,
    }
    return Work(**(fields | more))  # type: ignore[arg-type]


def _between(low: float, high: float) -> st.SearchStrategy[float]:
    """Evenly over the logarithm."""
    return st.integers(0, 100).map(lambda i: low * (high / low) ** (i / 100))


def speeds(low_gbps: float, high_gbps: float) -> st.SearchStrategy[Speed]:
    """Starts of 0 to 100 us."""
    return st.builds(Speed, st.sampled_from([0.0, 1.0, 10.0, 100.0]), _between(low_gbps, high_gbps))


MACHINES = st.builds(
    Machine,
    device_attend=speeds(5, 500),
    host_attend=speeds(5, 200),
    up=speeds(0.05, 100),
    down=speeds(0.1, 100),
    products=st.tuples(_between(50, 1000), _between(1000, 100000)).map(lambda p: Products(((64, p[0]), (1024, p[1])))),
    host_logits=speeds(5, 200),
    device_weigh=speeds(5, 500),
    memory_gbps=_between(10, 500),
    handoff_us=st.sampled_from([0.0, 5.0, 50.0]),
)


@st.composite
def works(draw: st.DrawFn, max_pages: int) -> Work:
    """Of a few far pages; with and without layer inputs, near and far, with much and little room near."""
    far_tokens = 64 * draw(st.integers(1, max_pages))
    num_kv_heads = draw(st.sampled_from([1, 8, 32]))
    return plain_work(
        far_tokens,
        draw(st.sampled_from([1, 4])),
        num_kv_heads,
        num_seqs=draw(st.sampled_from([1, 4])),
        near_tokens=draw(st.sampled_from([0, 512, 4096])),
        num_inputs=draw(st.sampled_from([0, far_tokens // 2, far_tokens])),
        inputs_are_near=draw(st.booleans()),
        free_near_bytes=draw(st.sampled_from([INF, 4096.0 * num_kv_heads * 512 * 2])),
    )


PLANS = st.builds(Plan, stage_tokens=st.sampled_from([64, 256, 1024]), piece_tokens=st.sampled_from([64, 256, 1 << 20]))
