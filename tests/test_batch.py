"""Inference out of core: the same as in memory, whatever happens in between."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.recfunctions import structured_to_unstructured

import napari_calvae as calvae
from napari_calvae.benchmark.batch import digest
from napari_calvae.formats import store
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.inference import batch, cluster
from napari_calvae.recognition import NETWORKS
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.simulation import simulate
from napari_calvae.vae import SpikeVAE


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), max_count=3)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    vae = SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3), description="tiny")
    return vae.save(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def traces():
    """Nine ROIs, two of them without signal."""
    found = simulate(9, 20.0, 20.0, seed=1).traces
    values = found.values.copy()
    values[3], values[8] = np.nan, 2.0
    return found.replace(values=values)


#: distributed leaves sockets to the garbage collector.
others_sockets = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning:distributed"
)
SIGNAL = [0, 1, 2, 4, 5, 6, 7]


@pytest.fixture
def recording(tmp_path, traces):
    calvae.write(traces, tmp_path / "traces.zarr")
    return tmp_path / "traces.zarr"


def run(source, out, model, **settings):
    return calvae.infer(source, model, out=out, n_samples=6, **{"block_rois": 2, **settings})


def test_the_store_holds_what_is_inferred_in_memory(recording, traces, tmp_path, model):
    found = run(recording, tmp_path / "a.zarr", model)
    assert found.done.all()
    assert found.without_signal == (4, 9)
    result, memory = found.load(), calvae.infer(traces.select(SIGNAL), model, n_samples=6)
    for name in ("rate", "reconstruction", "reconstruction_std"):
        np.testing.assert_array_equal(getattr(result, name)[SIGNAL], getattr(memory, name))
        assert np.isnan(getattr(result, name)[[3, 8]]).all()
    np.testing.assert_array_equal(result.samples(SIGNAL), memory.samples())
    assert result.samples([3, 8]).sum() == 0
    quality = structured_to_unstructured(result.quality)
    np.testing.assert_array_equal(quality[SIGNAL], structured_to_unstructured(memory.quality))
    for name, values in memory.theta.items():
        np.testing.assert_array_equal(result.theta[name][SIGNAL], values)
    assert result.provenance["model_sha256"] == memory.provenance["model_sha256"]


def test_block_size_and_place_of_the_traces_do_not_matter(recording, traces, tmp_path, model):
    whole = run(recording, tmp_path / "a.zarr", model).load()
    for name, source, rows in (("b", recording, 9), ("c", traces, 4), ("d", calvae.open_traces(recording), 1)):
        other = run(source, tmp_path / f"{name}.zarr", model, block_rois=rows).load()
        np.testing.assert_array_equal(other.rate, whole.rate)
        np.testing.assert_array_equal(other.events, whole.events)
    shuffled = [7, 2, 0, 8, 4]
    some = run(traces.select(shuffled), tmp_path / "e.zarr", model).load()
    np.testing.assert_array_equal(some.rate, whole.rate[shuffled])
    np.testing.assert_array_equal(some.samples(), whole.samples(shuffled))


def test_finished_blocks_are_not_redone(recording, tmp_path, model, monkeypatch):
    run(recording, tmp_path / "whole.zarr", model)
    inferred = []
    infer = batch.infer_rows

    def counted(traces, *rest):
        inferred.append(traces.roi_ids)
        return infer(traces, *rest)

    monkeypatch.setattr(batch, "infer_rows", counted)
    settings = {"n_samples": 6, "block_rois": 2}
    steps = calvae.iter_batch(recording, tmp_path / "a.zarr", model, **settings)
    assert next(steps) == batch.Progress(0, 9)
    step = next(steps)
    assert step.done == 2
    assert step.seconds_left > 0
    steps.close()
    there = int(calvae.open_result(tmp_path / "a.zarr").done.sum())
    assert 1 <= there <= 2  # the next may have been written already
    before = len(inferred)
    (tmp_path / "a.zarr" / "rate" / "c" / "0.cafe.partial").write_bytes(b"left behind by a kill")
    first, *_ = calvae.iter_batch(recording, tmp_path / "a.zarr", model, **settings)
    assert first.done == 2 * there
    assert len(inferred) - before == 5 - there
    assert digest(tmp_path / "a.zarr") == digest(tmp_path / "whole.zarr")
    (only,) = calvae.iter_batch(recording, tmp_path / "a.zarr", model, **settings)
    assert only.fraction == 1


def test_what_was_begun_with_something_else_is_refused(recording, traces, tmp_path, model):
    run(recording, tmp_path / "a.zarr", model)
    before = digest(tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="n_samples 6 instead of 7"):
        calvae.infer(recording, model, out=tmp_path / "a.zarr", n_samples=7)
    with pytest.raises(FileExistsError, match="input_sha256"):
        calvae.infer(traces.replace(values=traces.values + 0.1), model, out=tmp_path / "a.zarr", n_samples=6)
    with pytest.raises(FileExistsError, match="model_sha256"):
        calvae.infer(recording, out=tmp_path / "a.zarr", n_samples=6)
    assert digest(tmp_path / "a.zarr") == before
    found = calvae.infer(recording, model, out=tmp_path / "a.zarr", n_samples=7, overwrite=True)
    assert found.n_samples == 7


@pytest.mark.parametrize("row", [0, 1, 5])
def test_one_changed_value_of_any_row_is_another_recording(traces, tmp_path, model, row):
    run(traces, tmp_path / "a.zarr", model)
    values = traces.values.copy()
    values[row, 7] += 0.5
    with pytest.raises(FileExistsError, match="input_sha256"):
        run(traces.replace(values=values), tmp_path / "a.zarr", model)


def test_models_that_were_not_saved_are_told_apart_and_a_new_python_goes_on(traces, tmp_path, model, monkeypatch):
    one, other = calvae.load_model(model), calvae.load_model(model)
    with torch.no_grad():
        for vae, factor in ((one, 1.1), (other, 0.8)):
            next(iter(vae.recognition.parameters())).mul_(factor)
    assert one.sha256 == other.sha256 == ""
    found = run(traces, tmp_path / "a.zarr", one).load()
    with pytest.raises(FileExistsError, match="model_checksum"):
        run(traces, tmp_path / "a.zarr", other)
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    np.testing.assert_array_equal(run(traces, tmp_path / "a.zarr", one).load().rate, found.rate)


def test_a_raw_trace_without_a_baseline_does_not_stop_the_others(traces, tmp_path, model):
    raw = traces.select([0, 1, 2, 4]).replace(values=100 + 20 * traces.values[[0, 1, 2, 4]], unit="raw")
    values = raw.values.copy()
    values[2] -= 200
    spoilt = raw.replace(values=values)
    with pytest.raises(RecordingError, match="ROI 3: expected raw fluorescence with a baseline above 0"):
        calvae.infer(spoilt, model)
    found = run(spoilt, tmp_path / "a.zarr", model)
    assert found.done.all()
    assert found.without_signal == (3,)
    np.testing.assert_array_equal(found.load().rate[[0, 1, 3]], calvae.infer(raw.select([0, 1, 3]), model).rate)
    assert np.isnan(found.load().rate[2]).all()


def test_blocks_of_no_rois_are_refused(traces, tmp_path, model):
    for n in (0, -3):
        with pytest.raises(RecordingError, match=f"block_rois: expected 1 or more ROIs, got {n}"):
            run(traces, tmp_path / "a.zarr", model, block_rois=n)
    assert not list(tmp_path.iterdir())


def test_where_a_store_cannot_go(recording, tmp_path, model):
    calvae.write(calvae.read(recording), tmp_path / "t.zarr")
    with pytest.raises(RecordingError, match="expected a store of results, got one of traces or of another program"):
        run(recording, tmp_path / "t.zarr", model)
    with pytest.raises(FileNotFoundError, match="expected an existing folder"):
        run(recording, tmp_path / "none" / "a.zarr", model)
    with pytest.raises(RecordingError, match="at least one second"):
        run(Traces(np.ones((2, 10)), 20.0), tmp_path / "a.zarr", model)
    assert not (tmp_path / "a.zarr").exists()


def test_a_full_disk_stops_the_work_and_keeps_what_is_there(recording, tmp_path, model, monkeypatch):
    whole = run(recording, tmp_path / "whole.zarr", model)
    write, written = store.StoredInference.write_block, []

    def full(self, block, result):
        if len(written) == 2:
            self._group["rate"][self.rows(block)] = result.rate  # what fitted on the disk
            raise OSError(28, "No space left on device")
        written.append(block)
        write(self, block, result)

    with monkeypatch.context() as patch:
        patch.setattr(store.StoredInference, "write_block", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(recording, tmp_path / "a.zarr", model)
    assert calvae.open_result(tmp_path / "a.zarr").done.tolist() == [True, True, False, False, False]
    np.testing.assert_array_equal(calvae.open_result(tmp_path / "a.zarr").select([0, 1]).rate, whole.load().rate[:2])
    run(recording, tmp_path / "a.zarr", model)
    assert digest(tmp_path / "a.zarr") == digest(tmp_path / "whole.zarr")


def test_killed_in_the_middle_and_resumed(recording, tmp_path, model):
    run(recording, tmp_path / "whole.zarr", model)
    code = f"""
import time, napari_calvae as calvae
from napari_calvae.formats import store
create = store.create_array
def slow(*arguments, **options):  # a block is never written in no time
    time.sleep(0.3)
    return create(*arguments, **options)
store.create_array = slow
source, out, model = {str(recording)!r}, {str(tmp_path / "a.zarr")!r}, {str(model)!r}
for step in calvae.iter_batch(source, out, model, n_samples=6, block_rois=2):
    print(step.done, flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert [child.stdout.readline().strip() for _ in range(3)] == ["0", "2", "4"]
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    done = calvae.open_result(tmp_path / "a.zarr").done
    assert done.any()
    assert not done.all()
    run(recording, tmp_path / "a.zarr", model)
    assert digest(tmp_path / "a.zarr") == digest(tmp_path / "whole.zarr")


@pytest.fixture
def quiet_cluster():
    """A cluster of two workers, in processes of their own."""
    distributed = pytest.importorskip("distributed", reason="install napari-calvae[cluster]")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as found:
        yield found


@others_sockets
def test_a_cluster_gives_the_same(recording, traces, tmp_path, model):
    distributed = pytest.importorskip("distributed", reason="install napari-calvae[cluster]")
    run(recording, tmp_path / "whole.zarr", model)
    settings = {"threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(n_workers=2, **settings) as threads:
        run(recording, tmp_path / "a.zarr", model, scheduler=threads.scheduler_address)
        # Traces in memory and a model in memory travel with the tasks.
        vae = calvae.load_model(model)
        found = run(traces, tmp_path / "b.zarr", vae, scheduler=threads.scheduler_address).load()
    assert digest(tmp_path / "a.zarr") == digest(tmp_path / "whole.zarr")
    np.testing.assert_array_equal(found.events, calvae.open_result(tmp_path / "whole.zarr").load().events)


@pytest.mark.slow
@others_sockets
def test_a_worker_that_is_lost_changes_nothing(recording, tmp_path, model, quiet_cluster):
    run(recording, tmp_path / "whole.zarr", model, block_rois=1)
    whole = digest(tmp_path / "whole.zarr")
    killed = None
    settings = {"scheduler": quiet_cluster.scheduler_address, "n_samples": 6, "block_rois": 1}
    for step in calvae.iter_batch(recording, tmp_path / "a.zarr", model, **settings):
        if step.done == 1:
            killed = next(iter(quiet_cluster.workers.values())).pid
            os.kill(killed, signal.SIGKILL)
    assert killed
    assert digest(tmp_path / "a.zarr") == whole


@others_sockets
def test_a_cluster_without_workers_is_heard_of_and_can_be_left(recording, tmp_path, model, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="install napari-calvae[cluster]")
    monkeypatch.setattr(batch, "_HEARTBEAT", 0.1)
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as nobody:
        settings = {"scheduler": nobody.scheduler_address, "n_samples": 6, "block_rois": 2}
        steps = calvae.iter_batch(recording, tmp_path / "a.zarr", model, **settings)
        seen = [next(steps) for _ in range(4)]
        steps.close()
    assert [(step.done, step.seconds_left) for step in seen] == [(0, None)] * 4
    assert seen[-1].dashboard.startswith("http")
    assert not calvae.open_result(tmp_path / "a.zarr").done.any()


@pytest.mark.slow
@others_sockets
def test_jobs_of_a_queue(recording, tmp_path, model, monkeypatch):
    dask = pytest.importorskip("dask")
    pytest.importorskip("dask_jobqueue", reason="install napari-calvae[cluster]")
    # A queue that starts at once: sbatch runs the job's script in the background.
    for name, text in {
        "sbatch": '#!/bin/bash\nbash "${@: -1}" > /dev/null 2>&1 &\necho "Submitted batch job $!"\n',
        "scancel": "#!/bin/bash\nkill $1 2> /dev/null\nexit 0\n",
    }.items():
        file = tmp_path / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    queue = {"cores": 1, "memory": "2GB", "processes": 1, "local-directory": str(tmp_path), "interface": "lo"}
    with dask.config.set({f"jobqueue.slurm.{key}": value for key, value in queue.items()}):
        found = run(recording, tmp_path / "a.zarr", model, scheduler="slurm:1")
    run(recording, tmp_path / "whole.zarr", model)
    assert found.done.all()
    assert digest(tmp_path / "a.zarr") == digest(tmp_path / "whole.zarr")


@pytest.mark.parametrize("name", ["nowhere", "local:0", "local:two", "slurm:-1", "tcp:/host"])
def test_schedulers_that_do_not_exist(recording, tmp_path, model, name):
    with pytest.raises(RecordingError, match=r"scheduler: expected local, local:N, tcp://HOST:PORT or slurm"):
        run(recording, tmp_path / "a.zarr", model, scheduler=name)


@others_sockets
def test_a_scheduler_that_does_not_answer(recording, tmp_path, model, monkeypatch):
    monkeypatch.setattr(cluster, "_TIMEOUT", "0.5s")
    with pytest.raises(RecordingError, match=r"expected a Dask scheduler that answers at tcp://127\.0\.0\.1:9"):
        run(recording, tmp_path / "a.zarr", model, scheduler="tcp://127.0.0.1:9")


@others_sockets
@pytest.mark.slow
def test_a_script_that_its_workers_would_run_again_is_told_so(recording, tmp_path, model):
    source, out = tmp_path / "traces.npz", tmp_path / "a.zarr"
    calvae.write(calvae.simulate(2, 10.0, 30.0, seed=0).traces, source)
    line = f"calvae.infer({str(source)!r}, {str(model)!r}, out={str(out)!r}, n_samples=2, scheduler='local:1')"
    said = {}
    for name, guard in (("plain", ""), ("guarded", "if __name__ == '__main__':\n    ")):
        script = tmp_path / f"{name}.py"
        script.write_text(f"import napari_calvae as calvae\n{guard}{line}\n")
        said[name] = subprocess.run(
            [sys.executable, script], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
    assert said["guarded"].returncode == 0, said["guarded"].stderr
    assert said["plain"].returncode == 1
    *_, last = said["plain"].stderr.strip().splitlines()
    assert "RecordingError: scheduler: expected worker processes that start (1)" in last
    assert "below `if __name__ == '__main__':`" in last
    assert "another run is writing" not in said["plain"].stderr
    assert "distributed" not in said["plain"].stderr


def test_without_the_packages_for_clusters(recording, tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RecordingError, match=r"pip install 'napari-calvae\[cluster\]'"):
        run(recording, tmp_path / "a.zarr", model, scheduler="local")
