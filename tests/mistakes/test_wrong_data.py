"""Mistakes in the loaders: before step 1 where a loader can be asked, else as soon as it shows; none ends an epoch silently."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

import sheer
from sheer import DataError
from sheer.data import LengthGroupedBatches
from tests.mistakes.common import fit, refused
from tests.task import dataset, loader, loss_step, model, step


@pytest.fixture(autouse=True)
def workers_end_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers that an error's traceback keeps alive are waited for when they are collected: here, and not for five seconds."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    yield
    gc.collect()


def batches() -> list[tuple[Tensor, ...]]:
    x, y = dataset().tensors
    return list(zip(x.split(16), y.split(16), strict=True))


def generator() -> Iterator[Any]:
    yield from batches()


class Unsized:
    """Batches without a length."""

    def __init__(self, content: list[Any]) -> None:
        self.content = content

    def __iter__(self) -> Iterator[Any]:
        return iter(self.content)


class Sized(Unsized):
    def __init__(self, content: list[Any], length: int) -> None:
        super().__init__(content)
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_an_empty_dataset() -> None:
    empty = TensorDataset(torch.empty(0, 6), torch.empty(0, 1))
    refused(DataError, "The training loader is empty", loader=DataLoader(empty, batch_size=4))


def test_drop_last_leaves_nothing() -> None:
    refused(
        DataError, "The training loader is empty", "The 10 in it do not fill one batch of 16, and drop_last drops them",
        loader=loader(16, samples=10, drop_last=True),
    )  # fmt: skip


class NoIndices(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_a_sampler_without_indices() -> None:
    refused(DataError, "The training loader is empty", "NoIndices", loader=DataLoader(dataset(), sampler=NoIndices()))


@pytest.mark.parametrize("empty", [[], Unsized([])])
def test_an_empty_iterable(empty: Any) -> None:
    message = refused(DataError, "training loader", loader=empty)
    assert "empty" in message


@pytest.mark.parametrize(("lengths", "said"), [(90, "10 samples would never be seen"), (103, "some are of no sample")])
def test_lengths_of_another_number_of_samples(lengths: int, said: str) -> None:
    words = ("a dataset of 100 samples", f"LengthGroupedBatches was given {lengths} lengths", said, "in its order")
    grouped: Any = LengthGroupedBatches([3] * lengths, 10)
    wrong = DataLoader(dataset(), batch_sampler=grouped)
    refused(DataError, "The training loader has", *words, loader=wrong)
    refused(DataError, "The training loader has", *words, loader={"a": loader(), "b": wrong})
    refused(DataError, *words, loader=DataLoader(dataset(), sampler=grouped, batch_size=None))
    refused(DataError, "The loader to validate on has", *words, val_loader=wrong)
    with pytest.raises(DataError, match=r"The loader to evaluate on has .* lengths"):
        sheer.Trainer().test(model(), step, wrong)
    assert fit(loader=DataLoader(dataset(lengths), batch_sampler=grouped), max_steps=1).step == 1


def test_a_dataset_in_place_of_a_loader() -> None:
    refused(
        DataError, "The training loader is a dataset (TensorDataset)", "DataLoader(dataset, batch_size=...",
        loader=dataset(),
    )  # fmt: skip
    refused(DataError, "The loader to validate on is a dataset", "DataLoader(", val_loader=dataset())
    with pytest.raises(DataError, match="The loader to evaluate on is a dataset"):
        sheer.Trainer().test(model(), step, dataset())
    with pytest.raises(DataError, match="The loader to predict on is a dataset"):
        sheer.Trainer().predict(model(), step, dataset())


def test_a_tensor_in_place_of_a_loader() -> None:
    refused(DataError, "The training loader is a Tensor", "DataLoader(TensorDataset(x, y)", loader=dataset().tensors[0])


@pytest.mark.parametrize(("given", "what"), [(3, "a int cannot be iterated"), (DataLoader, "the class DataLoader")])
def test_what_cannot_be_iterated(given: Any, what: str) -> None:
    refused(DataError, "The training loader", what, loader=given)


def test_a_generator_for_two_epochs() -> None:
    message = refused(DataError, "a generator, which can be iterated only once", loader=generator(), max_epochs=2)
    assert "it is to be 2 times" in message and "starts anew each time" in message
    refused(DataError, "a map, which can be iterated only once", loader=map(tuple, batches()), max_epochs=2)
    assert fit(loader=generator(), max_epochs=1).step == 7


def test_a_generator_for_more_steps_than_it_gives() -> None:
    refused(
        DataError, "gave no batch in epoch 2", "can be iterated only once", "set max_steps to what one pass gives",
        loader=generator(), max_steps=10, updates=7,
    )  # fmt: skip


def test_a_generator_to_validate_on() -> None:
    refused(
        DataError, "The loader to validate on is a generator, which can be iterated only once", val_loader=generator()
    )


def test_an_empty_loader_to_validate_on() -> None:
    empty = DataLoader(TensorDataset(torch.empty(0, 6), torch.empty(0, 1)))
    refused(DataError, "The loader to evaluate on (DataLoader) gave no batch", val_loader=empty)
    refused(DataError, "The loader to evaluate on (list) gave no batch", val_loader={"a": loader(), "b": []})


def test_a_length_that_says_too_much() -> None:
    refused(
        DataError, "ended after 7 of 9 batches in epoch 1", "__len__ is wrong", loader=Sized(batches(), 9), updates=7
    )
    refused(
        DataError, "ended after 7 of 9 batches", "__len__ is wrong", val_loader=Sized(batches(), 9), max_epochs=1,
        updates=7,
    )  # fmt: skip


def test_a_length_that_says_too_little_is_warned_of_in_training() -> None:
    with pytest.warns(sheer.SheerWarning, match="says that it has 5 batches and gives more, which are left out"):
        result = fit(loader=Sized(batches(), 5), max_epochs=2)
    assert result.step == 10


def test_a_length_that_says_too_little_leaves_out_nothing_of_a_validation() -> None:
    whole = fit(loader=batches(), val_loader=batches(), max_epochs=1)
    torch.manual_seed(0)
    short = fit(loader=batches(), val_loader=Sized(batches(), 5), max_epochs=1)
    evaluated = sheer.Trainer()
    net = model()
    expected = evaluated.test(net, step, batches())
    assert evaluated.test(net, step, Sized(batches(), 5)) == expected
    assert whole.metrics.keys() == short.metrics.keys()


class Twice(IterableDataset[Any]):
    """Does not divide itself over the workers."""

    def __iter__(self) -> Iterator[Any]:
        return iter(dataset(32))

    def __len__(self) -> int:
        return 32


def test_an_iterable_dataset_that_each_worker_yields_whole() -> None:
    with (
        pytest.warns(sheer.SheerWarning, match="several workers each yield the whole dataset"),  # at the epoch's end
        pytest.warns(sheer.SheerWarning, match="began with the same batch"),
    ):
        fit(loader=DataLoader(Twice(), batch_size=16, num_workers=2), max_epochs=2)


class Unsharded(IterableDataset[Any]):
    """Without a length; divides itself over the workers, or does not."""

    def __init__(self, divides: bool) -> None:
        self.divides = divides

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        parts = worker.num_workers if worker is not None and self.divides else 1
        for index in range(worker.id if worker is not None and self.divides else 0, 100, parts):
            yield dataset()[index]


def test_an_iterable_dataset_without_a_length_that_each_worker_yields_whole_is_warned_of_before_the_first_step() -> (
    None
):
    steps: list[int] = []

    def counting(net: nn.Module, batch: Any, step: int) -> Tensor:
        steps.append(step)
        return loss_step(net, batch)

    data = DataLoader(Unsharded(divides=False), batch_size=16, num_workers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(sheer.SheerWarning, match="trains on each sample 2 times") as error:
            fit(step=counting, loader=data, max_epochs=1)
    assert "Two workers of the DataLoader over Unsharded began with the same batch" in str(error.value)
    assert not steps
    fit(loader=DataLoader(Unsharded(divides=False), batch_size=16, num_workers=1), max_epochs=1)
    assert fit(loader=DataLoader(Unsharded(divides=True), batch_size=10, num_workers=2), max_epochs=2).step == 20


@pytest.mark.parametrize(
    ("skipping", "says"), [(False, "resumed only at the end of an epoch"), (True, "resumed by skipping")]
)
def test_the_start_says_whether_an_iterable_is_resumed(
    skipping: bool, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(loader=DataLoader(Unsharded(divides=True), batch_size=16), max_epochs=1, resume_by_skipping=skipping)
    assert f"data: from a DataLoader over Unsharded, {says}" in capsys.readouterr().out


class Stopping(Dataset[Any]):
    """Raises StopIteration in the middle."""

    def __init__(self) -> None:
        self.data = dataset()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if index == 50:
            raise StopIteration
        return self.data[index]


class CollateThatStops:
    def __call__(self, samples: list[Any]) -> Any:
        if len(samples) < 16:
            raise StopIteration
        return default_collate(samples)


WORKERS = pytest.mark.parametrize("workers", [0, 1])


@WORKERS
@pytest.mark.parametrize("own_order", [False, True])
def test_a_stop_iteration_in_getitem_does_not_end_the_epoch(workers: int, own_order: bool) -> None:
    order: dict[str, Any] = {"sampler": list(range(100))} if own_order else {}
    data = DataLoader(Stopping(), batch_size=16, num_workers=workers, **order)
    refused(
        DataError, "ended after 3 of 7 batches in epoch 1", "a StopIteration was raised in the dataset or collate_fn",
        loader=data, updates=3,
    )  # fmt: skip


@WORKERS
def test_a_stop_iteration_in_collate_fn_does_not_end_the_epoch(workers: int) -> None:
    data = loader(16, shuffle=False, collate_fn=CollateThatStops(), num_workers=workers)
    refused(DataError, "ended after 6 of 7 batches", "StopIteration", loader=data, updates=6)


@WORKERS
def test_a_stop_iteration_in_the_data_of_a_validation_does_not_end_it(workers: int) -> None:
    data = DataLoader(Stopping(), batch_size=16, num_workers=workers)
    refused(
        DataError, "The loader to evaluate on ended after 3 of 7 batches", "StopIteration",
        val_loader=data, max_epochs=1, updates=7,
    )  # fmt: skip
    made = sheer.Trainer()
    with pytest.raises(DataError, match="ended after 3 of 7"):
        made.test(model(), step, data)
    with pytest.raises(DataError, match="ended after 3 of 7"):
        list(made.predict(model(), step, data))


@WORKERS
def test_an_error_in_the_dataset_comes_through_with_the_step(workers: int) -> None:
    class Broken(Stopping):
        def __getitem__(self, index: int) -> Any:
            if index == 50:
                raise KeyError("sample 50 is broken")
            return self.data[index]

    with pytest.raises(KeyError) as error:
        fit(loader=DataLoader(Broken(), batch_size=16, num_workers=workers))
    assert "sample 50 is broken" in str(error.value)
    assert error.value.__notes__[-1] == "While the batches of step 4 were read from the training loader."


def test_a_micro_batch_size_that_cannot_cut_a_packed_sequence() -> None:
    packed: list[PackedSequence] = [pack_sequence([torch.randn(3, 6), torch.randn(2, 6)])] * 4
    refused(
        DataError, "micro_batch_size cannot cut a PackedSequence", "set accumulate_grad_batches",
        step=lambda net, batch: net(batch.data).mean(), loader=packed, micro_batch_size=1,
    )  # fmt: skip


def test_a_micro_batch_size_that_cannot_cut_a_tensor_whose_first_dimension_counts_something_else() -> None:
    x, y = dataset(16).tensors
    refused(
        DataError, "micro_batch_size cannot cut a tensor of shape [5, 16, 6] in a batch of 16 samples",
        "its first dimension does not count the samples", "set accumulate_grad_batches",
        loader=[(x, y, torch.randn(5, 16, 6))], step=lambda net, batch: loss_step(net, batch[:2]), micro_batch_size=4,
    )  # fmt: skip


def test_loaders_in_a_dict_without_a_length() -> None:
    refused(
        DataError, "Loaders in a dict need a length", "['b']", "Combine them in one iterable",
        loader={"a": loader(), "b": Unsized(batches())},
    )  # fmt: skip
