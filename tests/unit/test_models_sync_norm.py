"""Batch norm over processes: two real ones (gloo) give the numbers of one with all rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from models.sync_norm import SyncBatchNorm2d, SyncBatchNormAct2d, convert
from tests.conftest import ROOT
from tests.end_to_end import end_to_end, pixel_bag
from tests.unit.test_models_e2e import learn
from tests.unit.test_utils_distributed import torchrun
from utils.distributed import ALONE, Group, current_group
from utils.errors import ItemFailed, Refused

SHARES = {"even": (4, 4), "uneven": (2, 6), "empty": (0, 5), "one": (1, 0)}
SLIDES = {"uneven": ((5, 9), (3,)), "none": ((4, 2), ()), "few": ((9,), (1,))}
MODES = ("graph", "cached", "checkpointed")

WORKER = '''
import json, sys
from pathlib import Path

import torch
from tests.unit.test_models_sync_norm import disturbances, norms, training
from utils.distributed import process_group

with process_group(torch.device("cpu")) as group:
    everyone = group.gather({"norms": norms(group), "training": training(group),
                             "disturbances": disturbances(group)})
    if group.is_main:
        Path(sys.argv[1]).write_text(json.dumps(everyone))
'''


def norms(group: Group = ALONE) -> dict[str, Any]:
    """Two norms on this rank's rows, in all shares; alone, plain ones on the rows of both."""
    found = {}
    for name, share in SHARES.items():
        torch.manual_seed(0)
        rows = 3 * torch.randn(sum(share), 4, 3, 5) + torch.tensor([0, 1, 10, -300])[:, None, None]
        made = nn.Sequential(nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4, momentum=None))
        nn.init.normal_(made[0].weight)  # type: ignore[arg-type]
        nn.init.normal_(made[0].bias)  # type: ignore[arg-type]
        factor = torch.randn_like(rows)
        if group.size > 1:
            convert(made)
            rows, factor = rows.split(share)[group.rank], factor.split(share)[group.rank]
        rows.requires_grad_()
        for _ in range(2):
            y = made(rows)
        (y.square() * factor).sum().backward()
        assert rows.grad is not None
        found[name] = {
            "y": y.tolist(), "x": rows.grad.tolist(),
            "weights": [one.grad.tolist() for one in made.parameters()],  # type: ignore[union-attr]
            "state": [one.tolist() for one in made.buffers()],
            "eval": made.eval()(torch.ones(1, 4, 2, 2)).tolist()}
    return found


def training(group: Group = ALONE) -> dict[str, Any]:
    """The encoder's gradients and statistics of an end-to-end step; each rank has some slides."""
    found = {}
    for name, shares in SLIDES.items():
        mine = shares[group.rank] if group.size > 1 else [*shares[0], *shares[1]]
        first = group.rank * len(shares[0])
        bags = [pixel_bag(first + place, patches=count) for place, count in enumerate(mine)]
        for mode in MODES:
            for most in (100, 4):  # in one chunk, and in several
                if group.size == 1 and most < 100:
                    continue  # chunks of one process are not those of two
                model = end_to_end(
                    enc_bn="sync" if group.size > 1 else "batch", enc_grad=mode, enc_dropout=0,
                    img_transform="none", p_batch_size=most, spec={"dropout": 0.0})
                found[f"{name} {mode} {most}"] = {
                    key: None if value is None else value.tolist()
                    for key, value in learn(model, bags).items() if "encoder" in key}
    return found


def disturbances(group: Group) -> list[str]:
    """A bag that is given up, or cannot be read, on one rank; the other one goes on."""
    found = []
    for mode in MODES:
        for broken in (None, 3):
            model = end_to_end(enc_bn="sync", enc_grad=mode)
            bag = pixel_bag(group.rank, patches=8, broken=broken if group.rank else None)
            try:
                encoded = model.encode([bag])
                for loss in model.losses(next(encoded)):
                    loss.value.backward()
                if group.rank == 1:
                    encoded.close()
                else:
                    assert next(encoded, None) is None
            except ItemFailed as error:
                found.append(str(error))
            learnt = [one.grad is not None for one in model.encoder.parameters()]
            assert all(learnt) if group.rank == 0 else not any(learnt)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sync")
    (folder / "worker.py").write_text(WORKER)
    run = torchrun(folder / "worker.py", folder / "out.json")
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process finds with all rows and slides."""
    return {"norms": norms(), "training": training()}


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    expected = torch.tensor(expected)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(torch.tensor(found), expected, rtol=tolerance,
                               atol=tolerance * size + 1e-9)


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_equal_one(share: str, two: list[dict[str, Any]], alone: dict[str, Any]
                                 ) -> None:
    first, second = (one["norms"][share] for one in two)
    whole = alone["norms"][share]
    for rows in ("y", "x"):
        close([*first[rows], *second[rows]], whole[rows], 1e-4)
    for one, other, both in zip(first["weights"], second["weights"], whole["weights"], strict=True):
        close((torch.tensor(one) + torch.tensor(other)).tolist(), both, 1e-4)
    for one, other, both in zip(first["state"], second["state"], whole["state"], strict=True):
        assert one == other  # the same bits on both
        close(one, both, 1e-4)
    close(first["eval"], whole["eval"], 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("slides", SLIDES)
def test_end_to_end_in_two_processes(slides: str, mode: str, two: list[dict[str, Any]],
                                     alone: dict[str, Any]) -> None:
    first, second = (one["training"] for one in two)
    key = f"{slides} {mode} 100"
    for name, value in alone["training"][key].items():
        if "buffer" in name:
            close(first[key][name], value)
            assert first[key][name] == second[key][name]
        else:
            both = torch.tensor(first[key][name]) + torch.tensor(second[key][name])
            close(both.tolist(), value, 1e-4)
    several = f"{slides} {mode} 4"  # chunks of which some are empty on one rank
    for found in (first, second):
        for name, value in found[f"{slides} graph 4"].items():
            close(found[several][name], value, 1e-4)


def test_a_lost_bag_does_not_keep_the_others_waiting(two: list[dict[str, Any]]) -> None:
    assert two[0]["disturbances"] == []
    assert two[1]["disturbances"] == ["slide_x: a patch is damaged"] * len(MODES)


def test_alone_it_is_batch_norm() -> None:
    torch.manual_seed(0)
    assert current_group() is ALONE
    plain, x = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    ours = convert(copy.deepcopy(plain))
    assert isinstance(ours, SyncBatchNorm2d)
    assert torch.equal(ours(x), plain(x))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_conversion_of_timm_networks_changes_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    weight = next(one for one in network.parameters() if one.ndim == 1)
    twin, x = copy.deepcopy(network), torch.randn(2, 3, 32, 32)
    assert convert(network) is network
    assert any(one is weight for one in network.parameters())
    kinds = {type(one) for one in network.modules() if isinstance(one, nn.BatchNorm2d)}
    assert kinds <= {SyncBatchNorm2d, SyncBatchNormAct2d}
    assert list(network.state_dict()) == list(twin.state_dict())
    with torch.no_grad():
        assert torch.equal(network(x), twin(x))
        assert torch.equal(network.train()(x), twin.train()(x))
    assert convert(network) is network  # again: nothing to do


def test_norms_of_another_kind_are_refused() -> None:
    with pytest.raises(Refused, match="--enc_bn sync: .* BatchNorm1d"):
        convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_half_precision_on_a_gpu(tmp_path: Path) -> None:
    """One process of NCCL: the path of several, against plain batch norm."""
    import subprocess
    import sys

    code = (
        "import torch, torch.distributed as dist\n"
        "from models import sync_norm\n"
        "from utils.distributed import Group\n"
        f"dist.init_process_group('nccl', init_method='file://{tmp_path}/meet', rank=0, "
        "world_size=1)\n"
        "class Two(Group):\n"
        "    def add_up(self, tensor):\n"
        "        dist.all_reduce(tensor)\n"
        "ours, plain = sync_norm.SyncBatchNorm2d(5).cuda(), torch.nn.BatchNorm2d(5).cuda()\n"
        "x = torch.randn(6, 5, 7, 7, device='cuda', dtype=torch.half)\n"
        "a, b = (x.clone().requires_grad_() for _ in range(2))\n"
        "y = sync_norm._Normalise.apply(a, ours.weight, ours.bias, ours.eps, Two())[0]\n"
        "z = plain(b)\n"
        "(y.float() ** 3).sum().backward(); (z.float() ** 3).sum().backward()\n"
        "torch.testing.assert_close(y, z, rtol=2e-3, atol=2e-3)\n"
        "torch.testing.assert_close(a.grad, b.grad, rtol=2e-2, atol=2e-2)\n"
        "dist.destroy_process_group()\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
