import io
import warnings

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from kappa_lightning import KappaProfile
from kappa_lightning.figures import profile_figure
from kappa_lightning.profile import KappaRow

PNG = b"\x89PNG\r\n\x1a\n"


def profile(kappas):
    numbers = dict.fromkeys(("sigma_max", "sigma_min", "log_volume", "frobenius_norm", "rtol"), 1.0)
    rows = [
        KappaRow(
            name=name,
            shape=(4, 4),
            kappa=kappa,
            kappas=None,
            sigma_maxs=None,
            log_volumes=None,
            frobenius_norms=None,
            matrix_shape=(4, 4),
            experts="mean",
            dtype="float32",
            fingerprint=f"{index:016x}",
            **numbers,
        )
        for index, (name, kappa) in enumerate(kappas.items())
    ]
    return KappaProfile(rows)


def png(figure):
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def grid(figure):
    """log10 κ of every cell; NaN where there is none or it is not a number."""
    (image,) = figure.axes[0].images
    return np.ma.filled(image.get_array().astype(float), np.nan)


def dots(figure):
    """(role, column) of every dot."""
    points = [tuple(point) for scatter in figure.axes[0].collections for point in scatter.get_offsets()]
    return {(role_labels(figure)[round(y)], round(x)) for x, y in points}


def hatched(figure):
    """(role, column) of every hatched cell."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_hatch()]
    return {(role_labels(figure)[round(patch.get_y() + 0.5)], round(patch.get_x() + 0.5)) for patch in patches}


def role_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def depth_labels(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


TRANSFORMER = {
    "embed.weight": 1e4,
    "layers.0.attn.weight": 1e3,
    "layers.0.mlp.weight": 10.0,
    "layers.1.attn.weight": 1e5,
    "layers.1.mlp.weight": 20.0,
    "layers.2.attn.weight": np.inf,
    "layers.2.mlp.weight": 1.0,
}


def test_cells_are_log_kappa_by_role_and_depth():
    figure = profile_figure(profile(TRANSFORMER))
    assert role_labels(figure) == ["embed", "layers.*.attn", "layers.*.mlp"]
    assert depth_labels(figure) == ["–", "0", "1", "2"]
    nan = np.nan
    expected = [[4, nan, nan, nan], [nan, 3, 5, nan], [nan, 1, np.log10(20), 0]]
    np.testing.assert_allclose(grid(figure), expected, atol=1e-12)


def test_color_scale_spans_the_finite_values():
    (image,) = profile_figure(profile(TRANSFORMER)).axes[0].images
    assert image.get_clim() == (0.0, 5.0)


def test_color_bar_tells_what_the_color_is():
    assert profile_figure(profile(TRANSFORMER)).axes[1].get_ylabel() == "log₁₀ κ"


def test_dots_are_on_what_trains():
    figure = profile_figure(profile(TRANSFORMER), ["layers.2.mlp.weight", "embed.weight"])
    assert dots(figure) == {("layers.*.mlp", 3), ("embed", 0)}
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["trains"]


def test_without_a_selection_there_are_no_dots_and_no_legend():
    figure = profile_figure(profile(TRANSFORMER))
    assert dots(figure) == set()
    assert not figure.legends


def test_infinite_kappa_is_hatched_and_nothing_else_is():
    assert hatched(profile_figure(profile(TRANSFORMER))) == {("layers.*.attn", 3)}


def test_dot_is_drawn_over_a_hatched_cell():
    figure = profile_figure(profile(TRANSFORMER), ["layers.2.attn.weight"])
    assert dots(figure) == hatched(figure) == {("layers.*.attn", 3)}


def test_experts_of_a_layer_share_a_cell_with_their_median():
    kappas = {f"layers.0.experts.{index}.weight": kappa for index, kappa in enumerate([10.0, 1e5, 100.0])}
    figure = profile_figure(profile(kappas), ["layers.0.experts.1.weight"])
    np.testing.assert_allclose(grid(figure), [[2.0]])
    assert role_labels(figure) == ["layers.*.experts.*"]
    assert dots(figure) == {("layers.*.experts.*", 0)}


def test_degenerate_expert_does_not_hide_the_others():
    kappas = {f"layers.0.experts.{index}.weight": kappa for index, kappa in enumerate([10.0, np.inf, 100.0])}
    figure = profile_figure(profile(kappas))
    np.testing.assert_allclose(grid(figure), [[2.0]])
    assert hatched(figure) == set()


def test_depths_are_in_the_order_of_numbers_whatever_the_order_of_rows():
    kappas = {f"h.{index}.weight": 10.0**index for index in (10, 2, 1, 11, 0)}
    figure = profile_figure(profile(kappas))
    assert depth_labels(figure) == ["0", "1", "2", "10", "11"]
    np.testing.assert_allclose(grid(figure), [[0, 1, 2, 10, 11]])


def test_model_without_depth_has_one_column():
    figure = profile_figure(profile({"a.weight": 10.0, "b.weight": 100.0}))
    assert depth_labels(figure) == ["–"]
    np.testing.assert_allclose(grid(figure), [[1.0], [2.0]])


def test_roles_of_bare_parameters_keep_their_names():
    assert role_labels(profile_figure(profile({"position": 10.0, "h.0.up_proj": 3.0}))) == ["position", "h.*.up_proj"]


def test_title_is_written_above():
    assert profile_figure(profile(TRANSFORMER), title="MiniLM, top_p=0.2").axes[0].get_title() == "MiniLM, top_p=0.2"


@pytest.mark.parametrize(
    "kappas",
    [
        TRANSFORMER,
        {"a.weight": 1.0},
        {"a.weight": np.inf},
        {"a.0.weight": np.inf, "a.1.weight": np.inf},
        {"a.0.weight": 5.0, "a.1.weight": 5.0},
        {f"e.0.{index}.weight": np.inf for index in range(4)},
        {"a.weight": 1e300},
    ],
    ids=["mixed", "one", "one-infinite", "all-infinite", "equal", "infinite-experts", "huge"],
)
@pytest.mark.parametrize("selected", [False, True])
def test_picture_is_drawn_without_a_warning(kappas, selected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = profile_figure(profile(kappas), list(kappas) if selected else [])
    assert png(figure).startswith(PNG)


def test_large_model_is_drawn_with_every_role_named_and_depths_that_do_not_crowd():
    kappas = {f"model.layers.{i}.block.part{j}.weight": 2.0 + i * j for i in range(80) for j in range(30)}
    figure = profile_figure(profile(kappas), list(kappas)[:100], title="large")
    assert png(figure).startswith(PNG)
    assert len(role_labels(figure)) == 30
    assert 2 <= len(depth_labels(figure)) <= 20
    assert grid(figure).shape == (30, 80)
    small = profile_figure(profile(TRANSFORMER))
    assert figure.get_figwidth() > small.get_figwidth()
    assert figure.get_figheight() > small.get_figheight()


def test_dollar_signs_in_names_and_title_do_not_stop_the_picture():
    figure = profile_figure(profile({"a$b.0.x$y_.weight": 3.0}), title="my$model$_{.ckpt")
    assert png(figure).startswith(PNG)


def test_figure_is_not_attached_to_pyplot():
    before = pyplot.get_fignums()
    profile_figure(profile(TRANSFORMER))
    assert pyplot.get_fignums() == before


def test_profile_is_left_as_it_was():
    rows = profile(TRANSFORMER)
    profile_figure(rows, ["embed.weight"])
    assert rows == profile(TRANSFORMER)


def test_names_that_look_like_formulas_are_drawn_as_they_are(tmp_path):
    names = ["layers.0.a$b.weight", r"layers.0.$\frac{.weight", "layers.0.c\x1b[2J\n.weight"]
    figure = profile_figure(profile(dict.fromkeys(names, 2.0)), names[:1], title=r"$\nonsense{")
    figure.savefig(tmp_path / "names.svg")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert not any(set("\x1b\n") & set(label) for label in labels)
