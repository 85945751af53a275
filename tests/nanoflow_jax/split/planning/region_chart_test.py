from nanoflow_jax.split.planning import region_chart


def test_a_line_has_a_point_for_each_speed_and_ends_where_none_saves_enough():
    panels = {
        "h100, tokens": {2: {1.1: 4.0, 2: 1.0, 4: None}, 80: {1.1: None, 2: None, 4: None}},
        "l4, tokens": {2: {1.1: 1.0, 2: 0.5, 4: 0.25}, 80: {1.1: 1.0, 2: 1.0, 4: 1.0}},
    }
    picture = region_chart.draw("least speed", panels, fastest=4.0, slowest=0.25)
    assert picture.count("<circle") == 2 + 0 + 3 + 3
    assert picture.count('fill="none" stroke="#') == 3
    for text in ("least speed", "h100, tokens", "l4, tokens", "round trip 80 ms", ">0.25<", ">4x<"):
        assert text in picture
    # The fastest is at the top of its panel and the slowest at its foot.
    assert 'cy="60.0"' in picture
    assert 'cy="250.0"' in picture
