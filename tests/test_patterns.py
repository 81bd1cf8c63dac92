"""Pattern statistics against their definitions and against scikit-learn."""

import pytest
import torch
from sklearn.metrics import homogeneity_score, normalized_mutual_info_score

from keeprate import patterns as P
from keeprate.trace import Step, Trace


def trace_of(*kept, layers=(2, 3), depth=4, grid=(2, 2)):
    """A trace that keeps the given patches [b, m] at each of the layers."""
    n = grid[0] * grid[1]
    steps = []
    for layer, index in zip(layers, kept, strict=False):
        index = torch.tensor(index)
        slots = torch.arange(index.shape[1]).expand_as(index)
        assignment = torch.full((len(index), n), -1).scatter(1, index, slots)
        steps.append(Step(layer, index, torch.ones_like(index), assignment))
    return Trace("test", grid, 1, depth, [steps], [len(kept[0])])


@pytest.fixture
def masks():
    return torch.rand(2, 5, 30, generator=torch.Generator().manual_seed(0)) < 0.4


@pytest.fixture
def labels():
    return torch.randint(0, 4, (2, 6, 40), generator=torch.Generator().manual_seed(0))


def test_iou_and_ioa(masks):
    a, b = masks
    torch.testing.assert_close(P.iou(a, a), torch.ones(5))
    torch.testing.assert_close(P.iou(a, b), P.iou(b, a))
    one, two = torch.tensor([[True, True, True, False]]), torch.tensor([[False, True, False, True]])
    assert P.iou(one, two).item() == 0.25 and P.ioa(two, one).item() == 0.5
    assert P.ioa(one, two).item() == pytest.approx(1 / 3)
    assert P.iou(one, ~one).item() == 0
    with pytest.raises(ValueError, match=r"\(5, 30\) and \(1, 4\)"):
        P.iou(a, one)


def test_nmi_and_homogeneity_equal_sklearn(labels):
    a, b = labels
    b = torch.where(torch.rand(b.shape, generator=torch.Generator().manual_seed(1)) < 0.6, a, b)
    expected = [normalized_mutual_info_score(x, y) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(P.nmi(a, b), torch.tensor(expected, dtype=torch.float32))
    expected = [homogeneity_score(x, y) for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(P.homogeneity(a, b), torch.tensor(expected, dtype=torch.float32))


def test_nmi_ignores_names_and_dropped(labels):
    a, b = labels
    renamed = torch.tensor([3, 0, 7, 1])[a]
    torch.testing.assert_close(P.nmi(a, renamed), torch.ones(6))
    torch.testing.assert_close(P.nmi(renamed, b), P.nmi(a, b))
    dropped = torch.cat([b, torch.full((6, 9), -1)], 1)
    torch.testing.assert_close(P.nmi(torch.cat([a, a[:, :9]], 1), dropped), P.nmi(a, b))


def test_nmi_of_trivial_partitions():
    one, own = torch.zeros(1, 6, dtype=torch.long), torch.arange(6)[None]
    assert P.nmi(one, one).item() == 1 == normalized_mutual_info_score(one[0], one[0])
    assert P.nmi(one, own).item() == 0
    assert P.homogeneity(torch.tensor([[True, True, False, False, True, False]]), own).item() == 1


def test_heatmap_counts_blocks():
    # block 1 leaves all four patches, block 2 drops patch 3, blocks 3 and 4 are without patch 1 in the second sample
    trace = trace_of([[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0, 2, 2]])
    torch.testing.assert_close(P.heatmap(trace), torch.tensor([[1.0, 0.75], [1.0, 0.25]]))
    with pytest.raises(ValueError, match="empty"):
        P.heatmap(Trace())


def test_compare_heatmaps():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    same, other = P.compare_heatmaps(a, 2 * a), P.compare_heatmaps(a, b)
    assert same == pytest.approx({"pearson": 1, "spearman": 1, "kl": 0, "js": 0}, abs=1e-9)
    assert other["spearman"] == pytest.approx(1) and other["pearson"] < 0.99
    p, q = a / 10, b / 30
    m = (p + q) / 2
    assert other["kl"] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    js = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    assert other["js"] == pytest.approx(js.item(), rel=1e-4)


def test_agreement_and_layers():
    traces = {"a": trace_of([[0, 1], [0, 1]]), "b": trace_of([[0, 1], [2, 3]]), "c": trace_of([[0, 2], [0, 2]])}
    table = P.agreement(traces)
    assert table.loc["a", "a"] == 1 and table.loc["a", "b"] == table.loc["b", "a"] == 0.5
    assert table.loc["a", "c"] == pytest.approx(1 / 3)
    assert P.agreement(traces, measure="nmi").loc["a", "b"] == pytest.approx(1.0)
    between = P.iou_between_layers(trace_of([[0, 1, 2]], [[0, 1]]))
    assert list(between) == [2, 3] and between.loc[2, 3] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'iou', 'nmi'"):
        P.agreement(traces, measure="dice")


def test_cka_is_blind_to_rotation_and_scale():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    assert P.cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert P.cka(x, torch.randn(50, 8, generator=torch.Generator().manual_seed(2))) < 0.5
    with pytest.raises(ValueError, match="same samples"):
        P.cka(x, x[:10])
