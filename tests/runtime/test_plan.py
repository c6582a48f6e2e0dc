"""The plan file: round trips, alignment, and that every kind of damage is noticed."""

import gc
import io
import os
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import duq.runtime.plan
from duq.runtime.errors import PlanError
from duq.runtime.plan import FORMAT_VERSION, MANIFEST, Plan, PlanWriter
from tests.support.plans import manifest, write_plan

ENTRIES = {
    "graph/prefix.onnx": b"\x08\x0agraph" * 30,
    "weights/llm.layers.0": np.arange(300_000, dtype=np.float32).reshape(300, 1000),  # above a megabyte: page aligned
    "weights/scale": np.array(0.5, np.float32),
    "weights/empty": b"",
}


def raw(data) -> bytes:
    return data.tobytes() if isinstance(data, np.ndarray) else bytes(data)


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    """Opening a plan that was just written waits for the clock, which these tests need not."""
    monkeypatch.setattr(duq.runtime.plan, "_TICK_NS", 0)


@pytest.fixture
def path(tmp_path):
    write_plan(tmp_path / "engine.plan", ENTRIES)
    return tmp_path / "engine.plan"


def test_round_trip_and_offsets(tmp_path):
    path = tmp_path / "engine.plan"
    offsets = write_plan(path, ENTRIES)
    plan, file = Plan(path), path.read_bytes()
    assert plan.names == list(ENTRIES)
    assert plan.manifest["target"] == "cpu" and plan.manifest["format_version"] == FORMAT_VERSION
    for name, data in ENTRIES.items():
        assert plan.read(name) == raw(data)
        assert file[offsets[name] :].startswith(raw(data))
    assert offsets["weights/llm.layers.0"] % 4096 == 0
    assert all(offset % 64 == 0 for offset in offsets.values())


def test_parts_of_an_entry_are_read_into_memory_at_hand(path):
    plan, whole = Plan(path), raw(ENTRIES["weights/llm.layers.0"])
    part = np.zeros(len(whole) // 4 - 2, np.float32)
    plan.read_into("weights/llm.layers.0", part[1:], 4)
    assert part.tobytes() == bytes(4) + whole[4 : part.nbytes]
    for start in (-1, len(whole) - part.nbytes + 1):
        with pytest.raises(PlanError, match=f"weights/llm.layers.0 has {len(whole)} bytes, not"):
            plan.read_into("weights/llm.layers.0", part, start)


def test_an_entry_is_copied_to_its_place_in_another_file(path, tmp_path):
    plan = Plan(path)
    with open(tmp_path / "copy", "w+b") as file:
        plan.copy_into(file.fileno(), "weights/scale")
    place = plan.manifest["entries"]["weights/scale"]
    assert (tmp_path / "copy").read_bytes() == bytes(place["offset"]) + raw(ENTRIES["weights/scale"])


def test_standard_tools_read_it(path):
    listing = subprocess.run([sys.executable, "-m", "zipfile", "-l", path], capture_output=True, text=True, check=True)
    assert MANIFEST in listing.stdout and "weights/scale" in listing.stdout
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("graph/prefix.onnx") == ENTRIES["graph/prefix.onnx"]


def test_same_input_same_bytes(tmp_path):
    write_plan(tmp_path / "a.plan", ENTRIES)
    write_plan(tmp_path / "b.plan", ENTRIES)
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()


def test_streams_pieces(tmp_path):
    pieces = [os.urandom(n) for n in (3, 0, 2_500_000, 1)]
    with PlanWriter(tmp_path / "p") as plan:
        assert plan.write("stream", iter(pieces)) % 4096 == 0
        plan.finish(manifest())
    assert Plan(tmp_path / "p").read("stream") == b"".join(pieces)


def test_every_header_has_room_for_64_bit_sizes(path):
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if info.filename != MANIFEST]
    for info in infos:
        name_bytes, extra_bytes = struct.unpack_from("<HH", data, info.header_offset + 26)
        extra = data[info.header_offset + 30 + name_bytes :][:extra_bytes]
        assert struct.pack("<HHQQ", 1, 16, info.file_size, info.file_size) in extra


@given(
    entries=st.dictionaries(st.text("abc/._é", min_size=1, max_size=12), st.binary(max_size=300), max_size=6),
    alignment=st.sampled_from([1, 2, 64, 4096]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_entries_round_trip(tmp_path, entries, alignment):
    with PlanWriter(tmp_path / "p") as plan:
        offsets = {name: plan.write(name, data, alignment) for name, data in entries.items()}
        plan.finish(manifest())
    plan = Plan(tmp_path / "p")
    assert {name: plan.read(name) for name in plan.names} == entries
    assert all(offset % alignment == 0 for offset in offsets.values())


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small plan's bytes and, for each entry and the manifest, its (offset, size)."""
    path = tmp_path_factory.mktemp("small") / "engine.plan"
    write_plan(path, {"graph/step.onnx": b"step" * 20, "weights/w": bytes(range(200)), "tokenizer.model": b"t" * 50})
    data = path.read_bytes()
    spans = {name: (entry["offset"], entry["bytes"]) for name, entry in Plan(path).manifest["entries"].items()}
    with zipfile.ZipFile(path) as archive:
        text = archive.read(MANIFEST)
    spans[MANIFEST] = (data.index(text), len(text))
    return data, spans


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_in_an_entry_is_found(tmp_path, small, data):
    original, spans = small
    name = data.draw(st.sampled_from(sorted(spans)))
    offset, size = spans[name]
    position = offset + data.draw(st.integers(0, size - 1))
    damaged = bytearray(original)
    damaged[position] ^= data.draw(st.integers(1, 255))
    (tmp_path / "p").write_bytes(damaged)
    with pytest.raises(PlanError, match=name):
        Plan(tmp_path / "p")


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_byte_anywhere_is_harmless_or_an_error(tmp_path, small, data):
    """Also in the zip's own structures: never another exception, never other contents."""
    original, spans = small
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "p").write_bytes(damaged)
    try:
        plan = Plan(tmp_path / "p")
    except PlanError:
        return
    for name in plan.names:
        offset, size = spans[name]
        assert plan.read(name) == original[offset : offset + size]


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_truncation_is_found(tmp_path, small, data):
    original, _ = small
    (tmp_path / "p").write_bytes(original[: data.draw(st.integers(0, len(original) - 1))])
    with pytest.raises(PlanError):
        Plan(tmp_path / "p")


def test_messages_say_what_is_wrong(tmp_path, path):
    def message(data: bytes) -> str:
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(PlanError) as error:
            Plan(tmp_path / "bad")
        assert "\n" not in str(error.value)
        return str(error.value)

    whole = path.read_bytes()
    assert "cut short" in message(whole[: len(whole) // 2])
    assert "not an engine plan" in message(b"hello" * 100)
    assert "empty" in message(b"")
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("readme.txt", "hi")
    assert "without manifest.json" in message(other.getvalue())
    with pytest.raises(PlanError, match="No such file"):
        Plan(tmp_path / "missing.plan")
    with pytest.raises(PlanError, match="Is a directory"):
        Plan(tmp_path)


def test_missing_entry(tmp_path, path):
    """A plan from which an entry was deleted (its manifest still names it)."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "less", "w") as less:
        less.writestr(MANIFEST, archive.read(MANIFEST))
    with pytest.raises(PlanError, match="graph/prefix.onnx is missing"):
        Plan(tmp_path / "less")
    with pytest.raises(PlanError, match="no entry nothing"):
        Plan(path).read("nothing")


def test_repacked_plan_is_refused(tmp_path, path):
    """Another tool's repacking moves the data, and the graphs refer to it by offset: an error even unverified."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "moved", "w") as moved:
        for name in archive.namelist():
            moved.writestr(name, archive.read(name))
    with pytest.raises(PlanError, match="packed again"):
        Plan(tmp_path / "moved", verify=False)


@pytest.mark.parametrize("version, fix", [(FORMAT_VERSION + 1, "upgrade"), (0, "compile it again")])
def test_other_format_version(tmp_path, monkeypatch, version, fix):
    monkeypatch.setattr(duq.runtime.plan, "FORMAT_VERSION", version)
    write_plan(tmp_path / "p", ENTRIES)
    monkeypatch.undo()
    with pytest.raises(PlanError, match=fix):
        Plan(tmp_path / "p")


def test_unverified_open_skips_the_hashes(tmp_path, small):
    original, spans = small
    damaged = bytearray(original)
    damaged[spans["weights/w"][0]] ^= 1
    (tmp_path / "p").write_bytes(damaged)
    assert Plan(tmp_path / "p", verify=False).read("weights/w")[0] == 1


EDITS = ["drop", "repeat", "compress", "rename", "swap", "grow", "shrink", "add", "comment", "prepend", "append", "flag"]


@given(edits=st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 5)), min_size=1, max_size=3))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_was_put_together_otherwise_is_harmless_or_an_error(tmp_path, small, edits):
    original, spans = small
    with zipfile.ZipFile(io.BytesIO(original)) as archive:
        members = [[info, archive.read(info)] for info in archive.infolist()]
    head, tail, comment = b"", b"", b""
    for kind, at in edits:
        info, data = members[at % len(members)] if members else (zipfile.ZipInfo("a"), b"")
        match kind:
            case "drop":
                members = [each for each in members if each[0] is not info]
            case "repeat":
                members.append([info, data])
            case "compress":
                info.compress_type = zipfile.ZIP_DEFLATED
            case "rename":
                info.filename += "x"
            case "swap":
                members.reverse()
            case "grow" | "shrink":
                members = [[i, d + b"x" if kind == "grow" else d[:-1]] if i is info else [i, d] for i, d in members]
            case "add":
                members.append([zipfile.ZipInfo("weights/added"), b"x" * at])
            case "comment":
                comment = b"PK\x05\x06" + bytes(at)
            case "prepend":
                head += bytes(at + 1)
            case "append":
                tail += b"PK\x01\x02"[:at]
            case "flag":
                info.flag_bits |= 1 << at
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.comment = comment
        for info, data in members:
            archive.writestr(info, data)
    (tmp_path / "p").write_bytes(head + made.getvalue() + tail)
    try:
        plan = Plan(tmp_path / "p")
    except PlanError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
        return
    for name in plan.names:
        offset, size = spans[name]
        assert plan.read(name) == original[offset : offset + size]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_failure_leaves_nothing_behind(tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"the old plan")
    with pytest.raises(RuntimeError, match="boom"), PlanWriter(tmp_path / "engine.plan") as plan:
        plan.write("a", bytes(10))
        raise RuntimeError("boom")
    with PlanWriter(tmp_path / "engine.plan") as plan:
        plan.write("a", bytes(10))  # never finished
    assert [p.name for p in tmp_path.iterdir()] == ["engine.plan"]
    assert (tmp_path / "engine.plan").read_bytes() == b"the old plan"


def test_failing_stream_leaves_nothing_behind(tmp_path):
    def pieces():
        yield bytes(100)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), PlanWriter(tmp_path / "engine.plan") as plan:
        plan.write("a", pieces())
    assert not list(tmp_path.iterdir())


def test_bad_destinations_and_names(tmp_path):
    with pytest.raises(PlanError, match="does not exist"):
        PlanWriter(tmp_path / "nowhere" / "engine.plan")
    with pytest.raises(PlanError, match="is a folder"):
        PlanWriter(tmp_path)
    with PlanWriter(tmp_path / "p") as plan:
        plan.write("a", b"")
        for name in ("a", MANIFEST):
            with pytest.raises(PlanError, match="twice"):
                plan.write(name, b"")


# --- a file that changes ----------------------------------------------------------------------------------------------


def written_in_place(path):
    with open(path, "r+b") as file:
        file.write(b"PK")


CHANGES = {
    "written": written_in_place,
    "cut short": lambda path: os.truncate(path, 100),
    "emptied": lambda path: os.truncate(path, 0),
    "touched": os.utime,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_plan_that_was_written_to_is_not_read(path, change, monkeypatch):
    monkeypatch.undo()
    plan = Plan(path)  # with the wait: the file is milliseconds old
    plan.check_unchanged()
    change(path)
    for read in (plan.check_unchanged, lambda: plan.read("weights/scale"), lambda: plan.read_into("weights/scale", bytearray(4)),
                 lambda: plan.copy_into(1, "weights/scale")):  # fmt: skip
        with pytest.raises(PlanError, match="engine.plan: was written to while in use.*replace a plan by rename"):
            read()


def test_a_write_within_the_file_system_s_tick_is_noticed(path, monkeypatch):
    """Files are stamped with a clock that stands still for milliseconds: each round writes right after the opening."""
    monkeypatch.undo()
    for _ in range(20):
        path.write_bytes(data := path.read_bytes())
        plan = Plan(path)
        path.write_bytes(data)
        with pytest.raises(PlanError, match="was written to"):
            plan.check_unchanged()


def written_and_set_back(path):
    """Another byte in the middle of the large entry; the file's size and time of modification are as before."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


READS = {
    "read": lambda plan: plan.read("weights/llm.layers.0"),
    "a part": lambda plan: plan.read_into("weights/llm.layers.0", bytearray(4)),
    "copy": lambda plan: plan.copy_into(os.open(os.devnull, os.O_WRONLY), "weights/llm.layers.0"),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_write_whose_time_is_set_back_is_noticed_when_it_is_read(path, read, monkeypatch):
    monkeypatch.undo()
    plan = Plan(path)
    written_and_set_back(path)
    assert plan.read("weights/scale") == raw(ENTRIES["weights/scale"])  # which is what it was
    for call in (read, read, Plan.check_unchanged, lambda plan: plan.read("weights/scale")):
        with pytest.raises(PlanError, match="was written to while in use"):
            call(plan)
    unverified = Plan(path, verify=False)
    written_and_set_back(path)
    read(unverified)  # there is nothing to compare with


HARMLESS = {
    "renamed": lambda path: path.rename(path.with_name("elsewhere")),
    "renamed over": lambda path: os.replace(shutil.copy(path, path.with_name("new")), path),
    "removed": os.unlink,
    "another name": lambda path: os.link(path, path.with_name("link")),
    "another mode": lambda path: path.chmod(0o400),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_leaves_the_contents_alone_is_no_error(path, change, read, monkeypatch):
    monkeypatch.undo()
    plan, hashed = Plan(path), []
    sha256 = duq.runtime.plan._sha256
    monkeypatch.setattr(duq.runtime.plan, "_sha256", lambda *place: hashed.append(place) or sha256(*place))
    change(path)
    for _ in range(3):
        read(plan)
    expected = 0 if change in (HARMLESS["renamed over"], HARMLESS["removed"]) else 1
    assert len(hashed) <= expected  # once for each entry, and never when a plan is replaced as it should be


@pytest.mark.parametrize(("call", "read"), zip(("pread", "preadv", "sendfile"), READS.values(), strict=True))
def test_a_file_that_is_cut_short_while_it_is_read(path, call, read, monkeypatch):
    """In the middle of an entry, after some of it was read."""
    plan, original = Plan(path), getattr(os, call)

    def cut(*arguments):
        os.truncate(path, plan.manifest["entries"]["weights/llm.layers.0"]["offset"] + 2)
        return original(*arguments)

    monkeypatch.setattr(os, call, cut)
    with pytest.raises(PlanError, match="was written to while in use"):
        read(plan)


def test_what_was_opened_stays_when_its_name_goes(path, tmp_path):
    plan = Plan(path)
    write_plan(tmp_path / "new", {"weights/scale": b"other"})
    os.replace(tmp_path / "new", path)
    assert plan.read("weights/scale") == raw(ENTRIES["weights/scale"])
    path.unlink()
    plan.check_unchanged()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("stage", ["_read_directory", "_read_manifest", "_check_entries", "_check_hashes"])
def test_a_change_while_it_is_opened_is_found(path, change, stage, monkeypatch):
    original = getattr(duq.runtime.plan, stage)

    def then_change(*arguments):
        result = original(*arguments)
        change(path)
        return result

    monkeypatch.setattr(duq.runtime.plan, stage, then_change)
    monkeypatch.setattr(duq.runtime.plan, "_TICK_NS", 12_000_000)
    with pytest.raises(PlanError, match="engine.plan: "):
        Plan(path)


def test_close(path):
    gc.collect()
    descriptors = os.listdir("/proc/self/fd")
    plan = Plan(path)
    plan.close()
    plan.close()
    for read in (Plan.check_unchanged, lambda plan: plan.read("weights/scale")):
        with pytest.raises(PlanError, match="engine.plan: is closed; open it again"):
            read(plan)
    del plan
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


def test_a_plan_let_go_or_refused_holds_no_descriptor(path, tmp_path):
    (tmp_path / "bad").write_bytes(path.read_bytes()[:-10])
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        Plan(path)
        with pytest.raises(PlanError):
            Plan(tmp_path / "bad")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in ((tmp_path / "pipe", "is no regular file"), ("/dev/null", "is no regular file"),
                       (tmp_path / "a\0b", "embedded null"), ("x" * 300, "File name too long")):  # fmt: skip
        with pytest.raises(PlanError, match=says):
            Plan(path)


def test_entries_that_overlap_are_refused(tmp_path, monkeypatch):
    """Two entries of the zip whose headers lie in each other's data."""
    inner = tmp_path / "inner"
    write_plan(inner, {"weights/a": bytes(100)})
    real = duq.runtime.plan._data_offset
    write_plan(tmp_path / "p", {"weights/a": bytes(100), "weights/b": bytes(100)})
    plan = Plan(tmp_path / "p")
    entries = {"weights/a": plan.manifest["entries"]["weights/a"], "weights/b": dict(plan.manifest["entries"]["weights/b"])}
    entries["weights/b"]["offset"] = entries["weights/a"]["offset"] + 50
    monkeypatch.setattr(
        duq.runtime.plan, "_data_offset", lambda path, fd, info: real(path, fd, info) and entries[info.filename]["offset"]
    )
    directory = duq.runtime.plan._read_directory(plan.path, plan._fd)
    with pytest.raises(PlanError, match="entries weights/a and weights/b overlap"):
        duq.runtime.plan._check_entries(plan.path, plan._fd, plan.size, directory, entries)
