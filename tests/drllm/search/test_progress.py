"""The label folder while it is written: progress files, refusals, full disks."""

import errno

import pytest

from drllm import files
from drllm.errors import UserError
from drllm.manifests import begin
from drllm.search import progress as progress_module
from drllm.search.progress import Progress, finish, label_of
from tests.label_toys import make_finished, manifest, new_selection, run, searched


@pytest.fixture
def finished(tmp_path):
    """A folder of finished labels."""
    return make_finished(tmp_path)


def test_progress_outlives_the_process_and_a_half_written_line_is_repaired(tmp_path):
    selection = new_selection()
    begin(tmp_path, manifest())
    progress = run(tmp_path, selection, selection.remaining(), stop=5)
    whole = progress.path.read_bytes()
    for cut in (1, 20, len(whole.splitlines(keepends=True)[-1])):
        progress.path.write_bytes(whole[:-cut])
        again = Progress(tmp_path, 0, new_selection())
        again.update()
        assert len(again.selection.records) == 4
        again.open()
        again.close()
        assert progress.path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])


def test_lines_appear_at_once_for_other_processes(tmp_path):
    selection, other = new_selection(), new_selection()
    begin(tmp_path, manifest())
    writing, reading = Progress(tmp_path, 0, selection), Progress(tmp_path, 1, other)
    writing.open()
    for number, asked in enumerate(list(selection.remaining())[:3], start=1):
        writing.append(searched(asked))
        reading.update()
        assert len(other.records) == number
        assert reading.read(other.records[asked.id]) == label_of(searched(asked))


def test_a_spoiled_line_is_named(tmp_path):
    selection = new_selection()
    begin(tmp_path, manifest())
    progress = run(tmp_path, selection, selection.remaining(), stop=3)
    lines = progress.path.read_bytes().splitlines(keepends=True)
    for spoiled in (b"\x00\x00\n", b'{"set": "arc_easy"}\n', b"[]\n", lines[1].replace(b"-0", b"-9")):
        progress.path.write_bytes(lines[0] + spoiled + lines[2])
        with pytest.raises(UserError, match=r"00000\.jsonl:2: not a finished question of this run; delete this line"):
            Progress(tmp_path, 0, new_selection()).update()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    begin(tmp_path, manifest())
    first = Progress(tmp_path, 0, new_selection())
    first.open()
    with pytest.raises(UserError, match="being written by another run"):
        Progress(tmp_path, 0, new_selection()).open()
    first.close()
    Progress(tmp_path, 0, new_selection()).open()


def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, capsys):
    begin(tmp_path, manifest())

    def no_locks(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(progress_module.fcntl, "flock", no_locks)
    selection = new_selection()
    run(tmp_path, selection, selection.remaining(), stop=2)
    assert "00000.jsonl: this file system has no locks; do not start a second run" in capsys.readouterr().err
    again = Progress(tmp_path, 0, new_selection())
    again.update()
    assert len(again.selection.records) == 2


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    selection = new_selection()
    begin(tmp_path, manifest())
    progress = run(tmp_path, selection, selection.remaining(), stop=2)
    before = progress.path.read_bytes()
    progress.open()

    class FullDisk:
        """Takes ten bytes, then is full."""

        def __init__(self, file):
            self.file, self.room = file, 10

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = self.file.write(data[: self.room]), 0
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    progress._file = FullDisk(progress._file)
    with pytest.raises(UserError, match=r"no space left to write .*2 finished questions are kept: free some space"):
        progress.append(searched(next(selection.remaining())))
    progress._file.close()
    assert progress.path.read_bytes() == before
    monkeypatch.setattr(files.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(errno.EDQUOT, "Disk quota")))
    with pytest.raises(UserError, match=r"no space left to write .*labels\.jsonl"):
        finish(tmp_path, manifest(), progress)
    assert not (tmp_path / "labels.jsonl").exists()


def test_another_run_is_refused_with_the_difference_named(finished):
    begin(finished, manifest(commit="other", versions={"torch": "9"}))
    for changes, message in (
        ({"arguments": {"c": 2.5}}, r"arguments\.c was 1\.8 and is now 2\.5"),
        ({"arguments": {"samples": {"arc_easy": 7}}}, r"arguments\.samples\.arc_easy was 6 and is now 7"),
        ({"num_layers": 5}, r"num_layers was 4 and is now 5"),
        ({"dtype": "bfloat16"}, r'dtype was "float32" and is now "bfloat16"'),
    ):
        with pytest.raises(UserError, match=rf"holds labels of another run: {message}; repeat .*--output_dir"):
            begin(finished, manifest(**changes))


def test_a_folder_with_progress_but_no_manifest_is_refused(tmp_path):
    (tmp_path / "progress").mkdir()
    with pytest.raises(UserError, match="has progress files but no manifest"):
        begin(tmp_path, manifest())


def test_finishing_again_gives_the_same_file(finished):
    before = (finished / "labels.jsonl").read_bytes()
    selection = new_selection()
    progress = Progress(finished, 0, selection)
    progress.update()
    assert list(selection.remaining()) == []
    finish(finished, manifest(), progress)
    assert (finished / "labels.jsonl").read_bytes() == before
