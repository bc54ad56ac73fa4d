"""Ranks that agree, and a single process that needs none of it."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch

import pvt
from ecoformer.engine.launch import choose_device, claim_error, process_group
from ecoformer.engine.train import broadcast_hash_functions, parallelize
from ecoformer.errors import InputError, NonFiniteError
from ecoformer.hash_config import HashConfig
from ecoformer.hashing import fit_hash_functions, hash_layers
from ecoformer.ranks import (
    broadcast_object,
    download_on_main,
    gather_objects,
    is_main,
    max_over_ranks,
    rank,
    run_on_main,
    sum_over_ranks,
    world_size,
)
from tests.engine.ranks import run_ranks


def _fail() -> None:
    raise NonFiniteError("only rank 0 saw it")


def test_alone_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()
        assert (rank(), world_size(), is_main()) == (0, 1, True)
        assert sum_over_ranks(torch.tensor(3)).item() == 3
        assert max_over_ranks(3) == 3
        assert broadcast_object("x") == "x"
        with pytest.raises(NonFiniteError):
            run_on_main(_fail)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99"])
def test_device_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match=r"--device|CUDA device 99"):
        choose_device(name)


def _meet() -> dict[str, Any]:
    with process_group("cpu"):
        found: dict[str, Any] = {
            "rank": rank(),
            "world_size": world_size(),
            "sum": sum_over_ranks(torch.tensor([rank(), 1])).tolist(),
            "max": max_over_ranks(rank()),
            "object": broadcast_object(f"from rank {rank()}"),
        }
        try:
            run_on_main(_fail)
        except NonFiniteError as error:
            found["error"] = str(error)
        found["claims"] = claim_error()
        return found


def test_two_ranks_agree() -> None:
    first, second = run_ranks(_meet, 2)
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    # One of them prints an error, whoever comes first.
    assert {first.pop("claims"), second.pop("claims")} == {True, False}
    assert first == second
    assert first == {
        "world_size": 2,
        "sum": [1, 2],
        "max": 1,
        "object": "from rank 0",
        "error": "only rank 0 saw it",
    }


def _download(seconds: float) -> str:
    with process_group("cpu", timeout_minutes=5 / 60):
        done = []

        def download() -> None:
            time.sleep(seconds)
            done.append(rank())

        download_on_main(download)
        try:
            download_on_main(_fail)
        except NonFiniteError as error:
            return f"{done} {broadcast_object('after that')}: {error}"
        return "no error"


def test_a_download_may_last_longer_than_a_collective() -> None:
    said = run_ranks(_download, 2, 7.0)
    assert said == [f"{done} after that: only rank 0 saw it" for done in ([0], [])]


def _fall_silent() -> str:
    try:
        with process_group("cpu", timeout_minutes=2 / 60):
            main, _ = gather_objects(os.getpid())
            try:
                # Rank 0 keeps the store, which answers no more either.
                download_on_main(lambda: os.kill(main, signal.SIGSTOP))
            finally:
                os.kill(main, signal.SIGCONT)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_rank_that_falls_silent_in_a_download_is_not_waited_for() -> None:
    first, second = run_ranks(_fall_silent, 2)
    assert "gloo" in first
    assert second == "rank 0 is silent: no answer in 7 s"


def _fit_and_share() -> tuple[dict[str, torch.Tensor], bool]:
    with process_group("cpu"):
        torch.manual_seed(rank())
        hashing = HashConfig(num_fit_steps=2)
        model = pvt.create_model("pvt_v2_b0", num_classes=2, hashing=hashing).eval()
        if is_main():
            fit_hash_functions(model, torch.randn(8, 3, 32, 32))
        broadcast_hash_functions(model)
        logits = model(torch.randn(1, 3, 32, 32))
        buffers = {
            f"{name}.{key}": value
            for name, layer in hash_layers(model).items()
            for key, value in layer.named_buffers()
        }
        return buffers, bool(logits.isfinite().all())


def test_hash_functions_of_rank_0_reach_all() -> None:
    (first, runs_first), (second, runs_second) = run_ranks(_fit_and_share, 2)
    assert runs_first
    assert runs_second
    assert first.keys() == second.keys()
    assert len(first) == 4 * 6
    for name in first:
        assert torch.equal(first[name], second[name]), name


def _two_gradients() -> bool:
    with process_group("cpu") as device:
        model = pvt.create_model("pvt_v2_b0", "msa", num_classes=2)
        parallel = parallelize(model, device)
        assert all(parameter.grad is None for parameter in model.parameters())
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank()))
        gradients = []
        for _ in range(2):
            parallel.zero_grad()
            parallel(images).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        first, second = gradients
        return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("num_ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_the_first_step_sums_over_ranks_as_the_second(num_ranks: int) -> None:
    assert all(run_ranks(_two_gradients, num_ranks))


def _one_fails() -> str:
    try:
        with process_group("cpu"):
            if rank() == 1:
                raise InputError("rank 1 alone has bad data")
            sum_over_ranks(torch.tensor(1))
    except InputError:
        return "the error"
    except RuntimeError:
        return "a broken collective"
    return "nothing"


def test_no_rank_waits_for_one_that_left() -> None:
    start = time.monotonic()
    assert run_ranks(_one_fails, 2) == ["a broken collective", "the error"]
    assert time.monotonic() - start < 30
