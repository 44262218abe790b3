"""What several files of slow tests look at, made once however many workers there are."""

import pytest
from filelock import FileLock

from tests.jobs import end_all, run, train_arguments

# The files that take longest are begun first, in this order: no worker ends with a long one while
# the other has nothing left to do.
LONGEST = (
    "test_main_job",
    "test_refit_job",
    "test_interrupt",
    "test_evaluate",
    "test_fp8_job",
    "test_stop",
    "test_study",
    "test_reestimation_job",
    "test_replicas",
)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, request):
    """A folder of runs with ``whole``, which was never stopped; each test gives its own a name."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        folder = folder.parent  # that of all workers
    folder /= "runs"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            more = "trainer.val_check_interval=3", "evaluation.samples=2"
            run(*train_arguments(folder, "whole", *more))
    return folder


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """What a test that failed leaves behind must not slow the others down."""
    yield
    end_all()
