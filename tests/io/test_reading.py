"""Readers of files that nobody vouches for: what they take, and each thing that they refuse, in its words."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

from rlrr_kernels.io.checks import LARGEST_JSON, expect, inside, read_json
from rlrr_kernels.io.reading import npz_arrays, npz_headers, read_pickled, read_state_dict


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_is_read_in_any_of_its_encodings(tmp_path, encoding):
    (tmp_path / "a.json").write_text('{"a": ["ü", 1]}\r\n', encoding)
    assert read_json(tmp_path / "a.json") == {"a": ["ü", 1]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not JSON: Expecting value"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": 1, "a": 1}', "is not JSON: 'a' is there twice"),
        (b'{"b": {"a": 1, "a": 2}}', "'a' is there twice"),
        (b'{"a": "\xff"}', "is not JSON: 'utf-8' codec"),
        (b'{"a": ' + b"[" * 100_000, "is not JSON: maximum recursion depth"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
        (b" " * 101, "has more than 100 bytes, which is more than such a file can have"),
    ],
)
def test_bad_json_is_named(tmp_path, data, words):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.json:? {words}|a\.json.* {words}"):
        read_json(tmp_path / "a.json", 100 if data[:2] == b"  " else LARGEST_JSON)


def test_a_state_dict_is_found_where_timm_finds_it(tmp_path):
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    (tmp_path / "a.safetensors").write_bytes(save(tensors))
    torch.save({"state_dict": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        found = read_state_dict(tmp_path / name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[each], tensors[each]) for each in tensors)


def test_tensors_that_are_not_plain_are_refused(tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        torch.save({"a": tensor}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"nothing in it was run(: 'a' is no plain tensor)?$"):
            read_pickled(tmp_path / "a.pth")
    torch.save({"a": torch.nn.Parameter(torch.ones(3))}, tmp_path / "a.pth")
    assert torch.equal(read_pickled(tmp_path / "a.pth")["a"], torch.ones(3))


def test_headers_of_arrays_are_believed_where_they_agree_with_the_archive(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.asfortranarray(np.ones((4, 5), "f2")), "c": np.zeros((0, 7))}
    np.savez_compressed(path, **arrays)
    headers = npz_headers(path)
    assert {name: (h.shape, h.dtype) for name, h in headers.items()} == {
        n: (a.shape, a.dtype) for n, a in arrays.items()
    }
    assert all(np.array_equal(values, arrays[name]) for name, values in npz_arrays(path, headers).items())
    data = path.read_bytes()
    np.savez(path, a=arrays["a"])
    grown = path.read_bytes().replace(b"(2, 3)", b"(9, 3)")
    for bad in (data[:-30], grown):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"a\.npz is damaged or no \.npz archive: "):
            npz_headers(path)


@pytest.mark.parametrize(
    ("name", "is_inside"),
    [("a.jpg", True), ("a/b.jpg", True), ("a/../b", True), ("..a/b", True), ("../a", False), ("a/../../b", False),
     ("/a", False), ("..", False), ("a\0", False)],
)  # fmt: skip
def test_a_path_stays_inside_or_not(name, is_inside):
    assert inside(name) is is_inside


@pytest.mark.parametrize(
    ("value", "kinds", "least", "fits"),
    [
        (1, (int,), None, True), (1, (float,), None, True), (1.0, (int,), None, False), (True, (int,), None, False),
        (True, (bool,), None, True), (None, (str, type(None)), None, True), (0, (int,), 1, False),
        (2**63, (int,), None, False),
        (float("nan"), (float,), 0, False), (float("inf"), (float,), 0, False), (float("nan"), (float,), None, True),
    ],
)  # fmt: skip
def test_a_value_has_the_type_and_the_least_that_is_expected(value, kinds, least, fits):
    values = json.loads(json.dumps({"a": value}))
    if fits:
        assert expect(values, "a", *kinds, least=least) is values["a"]
    else:
        with pytest.raises(ValueError, match=r"a: expected .*, got "):
            expect(values, "a", *kinds, least=least)
