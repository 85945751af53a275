from nanoflow_jax.bench import overhead, serving, throughput


def _ran(tokens_per_s, **cpu_s):
    result = throughput.Throughput(
        requests=1,
        input_tokens=1,
        output_tokens=100 * tokens_per_s,
        seconds=100.0,
        steps=1,
        first_token_s=(),
        per_token_s=(),
    )
    return serving.Serving(result=result, cpu_s=cpu_s)


def test_speeds_are_compared_within_a_round():
    # The machine halves its speed in the second round; the server's share does not change.
    found = [
        {"offline": _ran(100, engine=1.0), "server": _ran(90, engine=1.0, front=0.5)},
        {"offline": _ran(50, engine=3.0), "server": _ran(45, engine=3.0, front=1.5)},
        {"offline": _ran(100, engine=2.0), "server": _ran(80, engine=2.0, front=1.0)},
    ]
    offline, server = overhead.report_rounds(found).splitlines()
    assert offline.startswith("offline: median 100.0 tokens/s (100.0, 50.0, 100.0)")
    assert "median 0.900 (0.900, 0.900, 0.800)" in server
    assert server.endswith("processor time: engine 2.00 s, front 1.00 s")


def test_what_a_server_adds_to_the_first_token_is_of_each_pair():
    pairs = [
        overhead.FirstToken(offline_s=offline_s, server_s=offline_s + added_s)
        for offline_s, added_s in ((0.1, 0.004), (0.9, 0.002), (0.2, 0.003))
    ]
    last = overhead.report_first_tokens(pairs).splitlines()[-1]
    assert last.startswith("added by the server, of each pair: p50 3.0 ms")
