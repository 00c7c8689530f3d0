"""Export folders: whole or refused, visible only when complete, pruned without losing what is protected."""

import hashlib
import json
import os

import pytest
from blake3 import blake3

from pact_nemo.checkpoints import manifest as m
from pact_nemo.errors import CheckpointError
from pact_nemo.runtime import digests


def make_export(root, version, content=b"weights"):
    with m.new_export(root, version, extra={"step": version}) as folder:
        (folder / "model.safetensors").write_bytes(content * 1000)
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "sub").mkdir()
        (folder / "sub" / "vocab.txt").write_text("x")
    return m.export_path(root, version)


def test_round_trip(tmp_path):
    folder = make_export(tmp_path, 7)
    manifest = m.verify_manifest(folder, expect_version=7)
    assert folder.name == "v000007"
    assert manifest.version == 7 and manifest.extra == {"step": 7}
    assert set(manifest.files) == {"model.safetensors", "config.json", "sub/vocab.txt"}
    assert manifest.total_bytes == 7000 + 8 + 1
    assert m.versions(tmp_path) == [7]


def test_flipped_bit_is_refused_by_name(tmp_path):
    folder = make_export(tmp_path, 0)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[3333] ^= 0x10
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        m.verify_manifest(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "sub/vocab.txt"])
def test_missing_file_is_refused_by_name(tmp_path, name):
    folder = make_export(tmp_path, 0)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing.*export that version again"):
        m.verify_manifest(folder)


def test_truncated_file_is_refused_before_hashing(tmp_path, monkeypatch):
    folder = make_export(tmp_path, 0)
    os.truncate(folder / "model.safetensors", 100)
    monkeypatch.setattr(m, "check_files", lambda *_: pytest.fail("hashed a file of the wrong size"))
    with pytest.raises(CheckpointError, match="has 100 bytes, the manifest says 7000"):
        m.verify_manifest(folder)


def test_unlisted_weights_are_refused(tmp_path):
    folder = make_export(tmp_path, 0)
    (folder / "old.safetensors").write_bytes(b"stale shard")
    with pytest.raises(CheckpointError, match=r"old\.safetensors is not in the manifest"):
        m.verify_manifest(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 99, "version": 0, "files": {}, "extra": {}}']
)
def test_unreadable_manifest(tmp_path, text):
    folder = make_export(tmp_path, 0)
    (folder / m.MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        m.verify_manifest(folder)


def test_missing_manifest_and_wrong_version(tmp_path):
    folder = make_export(tmp_path, 4)
    with pytest.raises(CheckpointError, match="says version 4, expected 5"):
        m.verify_manifest(folder, expect_version=5)
    (folder / m.MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        m.verify_manifest(folder)


def test_nothing_is_visible_when_writing_fails(tmp_path):
    with pytest.raises(RuntimeError), m.new_export(tmp_path, 1) as folder:
        (folder / "model.safetensors").write_bytes(b"x")
        assert m.versions(tmp_path) == []  # not visible while it is being written either
        raise RuntimeError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_weights_gets_no_manifest(tmp_path):
    with pytest.raises(CheckpointError, match="no .*safetensors"), m.new_export(tmp_path, 1) as folder:
        (folder / "config.json").write_text("{}")
    assert m.versions(tmp_path) == []


def test_versions_are_written_once(tmp_path):
    make_export(tmp_path, 1)
    with pytest.raises(CheckpointError, match="exported once"):
        make_export(tmp_path, 1)


def test_prune_keeps_newest_and_protected(tmp_path):
    for version in range(6):
        make_export(tmp_path, version)
    (tmp_path / "v_notes").mkdir()
    assert m.prune_exports(tmp_path, keep=2, protect={1}) == [0, 2, 3]
    assert m.versions(tmp_path) == [1, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v000001", "v000004", "v000005", "v_notes"]
    m.verify_manifest(m.export_path(tmp_path, 1))
    assert m.prune_exports(tmp_path, keep=10) == []
    with pytest.raises(CheckpointError):
        m.prune_exports(tmp_path, keep=0)


def test_manifest_is_plain_json(tmp_path):
    folder = make_export(tmp_path, 2)
    row = json.loads((folder / m.MANIFEST_NAME).read_text())
    assert row["schema"] == 2 and row["files"]["config.json"] == {
        "size": 8,
        "blake3": [[8, blake3(b'{"a": 1}').hexdigest()]],
    }


def test_manifests_of_schema_1_are_still_read_and_checked(tmp_path):
    folder = make_export(tmp_path, 2)
    row = json.loads((folder / m.MANIFEST_NAME).read_text())
    for name in row["files"]:
        data = (folder / name).read_bytes()
        row["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / m.MANIFEST_NAME).write_text(json.dumps({**row, "schema": 1}))
    assert m.verify_manifest(folder, expect_version=2).total_bytes == 7000 + 8 + 1
    (folder / "config.json").write_text('{"a": 2}')
    with pytest.raises(CheckpointError, match=r"config\.json is corrupt: its SHA-256"):
        m.verify_manifest(folder)


def test_every_part_of_a_large_file_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "PART_BYTES", 1000)
    folder = make_export(tmp_path, 0)
    assert len(m.read_manifest(folder).files["model.safetensors"].parts) == 7
    for position in (0, 999, 1000, 6999):
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[position] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt: its BLAKE3"):
            m.verify_manifest(folder)
        data[position] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    m.verify_manifest(folder)


@pytest.mark.parametrize("parts", [[], [[8, "x"], [7, "y"]], [[4, "x"]], [[9, "x"]]])
def test_parts_that_do_not_cover_the_file_are_refused(tmp_path, parts):
    folder = make_export(tmp_path, 0)
    row = json.loads((folder / m.MANIFEST_NAME).read_text())
    row["files"]["config.json"]["blake3"] = parts
    (folder / m.MANIFEST_NAME).write_text(json.dumps(row))
    with pytest.raises(CheckpointError, match=r"manifest\.json can't be read"):
        m.verify_manifest(folder)


def test_pruning_removes_what_a_killed_process_left(tmp_path):
    make_export(tmp_path, 1)
    for name in (".v000002.123.tmp", ".v000000.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".v_notes").mkdir()
    m.prune_exports(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".v_notes", "v000001"]
