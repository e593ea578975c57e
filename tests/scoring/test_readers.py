"""What is listed, in which order, and what cannot be listed is a row with an error."""

import csv
import gzip
import io
import json
import os
import tarfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from picture_files import picture

from diffreward.scoring.readers import Inputs


def png(seed=0) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names):
    for name in names:
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(png())


def ids(*paths, **options):
    return [item.id for item in Inputs(paths, **options)]


# -- folders ------------------------------------------------------------------------------------


def test_folder_is_recursive_and_sorted(here):
    touch("f/b.png", "f/a/z.JPG", "f/a/y.webp", "f/c.gif", "f/notes.md", "f/ä ☕.png")
    assert ids("f") == ["f/a/y.webp", "f/a/z.JPG", "f/b.png", "f/c.gif", "f/ä ☕.png"]
    assert ids("f/") == ids("f")


def test_names_that_are_no_unicode(here):
    touch("f/a.png")
    with open(b"f/\xff.png", "wb") as file:
        file.write(png())
    items = list(Inputs(["f"]))
    assert os.path.exists(items[1].file) and len({item.key() for item in items}) == 2


def test_links_to_folders_above_end(here):
    touch("f/a/x.png", "f/b/y.png")
    os.symlink("..", "f/a/up")
    os.symlink("../b", "f/a/across")
    os.symlink("here", "f/here")
    assert ids("f") == ["f/a/across/y.png", "f/a/x.png"]  # f/b is the folder across leads to


def test_what_is_no_file_is_skipped_and_what_is_gone_is_listed(here):
    touch("f/a.png")
    os.mkfifo("f/pipe.png")
    os.symlink("gone.png", "f/link.png")
    os.symlink("self.png", "f/self.png")
    assert ids("f") == ["f/a.png", "f/link.png", "f/self.png"]


def test_prompts_beside_images(here):
    touch("f/a.png", "f/b.png")
    with open("f/a.txt", "w", encoding="utf-8") as file:
        file.write("ein Käse ☕\n")
    assert [item.prompt for item in Inputs(["f"])] == ["ein Käse ☕", None]


def test_a_prompt_that_cannot_be_read_is_an_error_and_not_no_prompt(here):
    touch("f/a.png", "f/b.png")
    os.mkdir("f/a.txt")
    first, second = Inputs(["f"])
    assert first.error.startswith("its prompt cannot be read") and second.error is None


def test_a_folder_streams(here, monkeypatch):
    """Of a large folder, names are listed, but files are looked at one by one."""
    touch(*(f"f/{n:04d}.png" for n in range(300)))
    asked = []
    found = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kw: asked.append(path) or found(path, **kw))
    listed = Inputs(["f"])
    assert len(asked) < 80
    asked.clear()
    assert len(listed.first(3)) == 3
    assert len(asked) < 10


# -- globs and several inputs ---------------------------------------------------------------------


def test_globs(here):
    touch("f/a/1.png", "f/b/2.png", "f/b/deep/3.jpg", "odd[1].png")
    assert ids("f/*/*.png") == ["f/a/1.png", "f/b/2.png"]
    assert ids("f/**/*.*") == ["f/a/1.png", "f/b/2.png", "f/b/deep/3.jpg"]
    assert ids("f/*") == ["f/a/1.png", "f/b/2.png", "f/b/deep/3.jpg"]
    assert ids("odd[1].png") == ["odd[1].png"]  # a name comes before a pattern


def test_the_same_path_twice_is_two_rows_of_one_key(here):
    touch("a.png", "b.png")
    items = list(Inputs(["a.png", "b.png", "a.png"]))
    assert [item.id for item in items] == ["a.png", "b.png", "a.png"]
    assert len({item.key() for item in items}) == 2


def test_a_changed_file_is_another_input(here):
    touch("a.png")
    (before,) = Inputs(["a.png"])
    keys = {before.key()}
    second = 10**9
    for stamp in (second, second + 1000):
        os.utime("a.png", ns=(stamp, stamp))
        keys |= {item.key() for item in Inputs(["a.png"])}
    with open("a.png", "ab") as file:
        file.write(b"x")
    os.utime("a.png", ns=(stamp, stamp))
    keys |= {item.key() for item in Inputs(["a.png"])}
    assert len(keys) == 4


def test_prompt_and_context_are_part_of_the_key(here):
    touch("a.png")
    with open("m.jsonl", "w") as file:
        for prompt, target in [("x", 1), ("x", 2), ("y", 1)]:
            file.write(json.dumps({"path": "a.png", "prompt": prompt, "target": target}) + "\n")
    items = list(Inputs(["m.jsonl"]))
    assert len({item.key() for item in items}) == 2
    assert len({item.key(["target"]) for item in items}) == 3


# -- manifests ----------------------------------------------------------------------------------

ROWS = [
    {"path": "img/a.png", "prompt": 'one, "two"\nthree', "seed": 1},
    {"path": "img/b ☕.png", "prompt": "", "seed": 2},
    {"path": "img/a.png", "prompt": "again", "seed": None},
]


def write_manifest(name):
    if name.endswith((".csv", ".tsv")):
        with open(name, "w", newline="", encoding="utf-8-sig") as file:
            rows = csv.DictWriter(file, ROWS[0], delimiter="\t" if name[-3] == "t" else ",")
            rows.writeheader()
            rows.writerows(ROWS)
    elif name.endswith(".jsonl"):
        with open(name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n\n" for row in ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), name)


@pytest.mark.parametrize("end", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_manifests(here, end):
    os.mkdir("data")
    write_manifest(f"data/m{end}")
    items = list(Inputs([f"data/m{end}"]))
    assert [item.file for item in items] == [f"data/{row['path']}" for row in ROWS]
    empty = None if end in (".csv", ".tsv") else ""
    assert [item.prompt for item in items] == [ROWS[0]["prompt"], empty, "again"]
    seeds = [1, 2, None] if end in (".jsonl", ".parquet") else ["1", "2", None]
    assert [item.extra["seed"] for item in items] == seeds


def test_columns_can_be_named(here):
    with open("m.jsonl", "w") as file:
        file.write('{"id": "first", "where": "a.png", "says": "hello"}\n')
    with pytest.raises(ValueError, match=r"m.jsonl: no column 'path' or .* among 'id', 'where'"):
        Inputs(["m.jsonl"])
    (item,) = Inputs(["m.jsonl"], data_column="where", prompt_column="says")
    assert (item.id, item.file, item.prompt) == ("first", "a.png", "hello")


def test_bad_lines_are_rows(here):
    with open("m.jsonl", "wb") as file:
        file.write(b'{"path": "a.png"}\n{"path": \n[1]\n{"other": 1}\n{"path": 3}\n{"path": ""}\n')
        file.write(b'{"path": "http://x/y.png"}\n{"path": "\xff.png", "prompt": "\xff"}\n')
    items = list(Inputs(["m.jsonl"]))
    assert [item.error is None for item in items] == [1, 0, 0, 0, 0, 0, 0, 1]
    assert items[1].id == "m.jsonl:2" and "no JSON" in items[1].error
    items[-1].prompt.encode()  # can be written
    with open("m.csv", "w") as file:
        file.write("path,prompt\na.png,x\nb.png,y,more\n,z\nc.png\n")
    assert [item.error is None for item in Inputs(["m.csv"])] == [1, 0, 0, 1]


@pytest.mark.parametrize("kind", ["parquet", "dataset"])
def test_images_inside_tables(here, kind):
    """As Hugging Face's datasets keep them: bytes with the name they had, or a path."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": png(n), "path": f"{n}.png"} for n in range(3)]
    table = pa.table({"image": pa.array(rows, image), "caption": ["a", "b", None]})
    if kind == "parquet":
        pq.write_table(table, "d.parquet")
        where = "d.parquet"
    else:
        where = "d"
        for split in ("train", "test"):
            os.makedirs(f"d/{split}")
            with pa.ipc.new_stream(f"d/{split}/data-00000-of-00001.arrow", table.schema) as file:
                file.write_table(table)
            with open(f"d/{split}/state.json", "w") as file:
                json.dump({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}, file)
        with open("d/dataset_dict.json", "w") as file:
            json.dump({"splits": ["train", "test"]}, file)
    items = list(Inputs([where]))
    assert [item.data for item in items[:3]] == [row["bytes"] for row in rows]
    assert [item.prompt for item in items[:3]] == ["a", "b", None]
    assert len(items) == (3 if kind == "parquet" else 6)
    assert items[1].id == ("d.parquet:2" if kind == "parquet" else "d:2")


def test_no_row_of_a_long_dataset_is_left_out(here):
    os.makedirs("d")
    table = pa.table({"image": [f"{n}.png" for n in range(200)]})
    with pa.ipc.new_stream("d/data.arrow", table.schema) as file:
        file.write_table(table)
    with open("d/state.json", "w") as file:
        json.dump({"_data_files": [{"filename": "data.arrow"}]}, file)
    assert ids("d") == [f"d/{n}.png" for n in range(200)]


def test_datasets_as_the_library_writes_them(here):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")})
    rows = {"image": [picture(n) for n in range(5)], "prompt": list("abcde")}
    made = datasets.Dataset.from_dict(rows, features=features).select([3, 1, 0])
    made.save_to_disk("d", num_shards=2)
    items = list(Inputs(["d"]))
    assert [item.prompt for item in items] == ["d", "b", "a"]
    assert all(item.data.startswith(b"\x89PNG") for item in items)


# -- tars ---------------------------------------------------------------------------------------


def write_tar(name, mode="w"):
    with tarfile.open(name, mode) as tar:
        for stem in ("a/1", "a/2", "b/1"):
            for end, data in [
                (".png", png(len(stem))),
                (".txt", f"prompt {stem}".encode()),
                (".cls", b"3"),
                *([(".json", b'{"prompt": "of json", "seed": 4}')] if stem == "a/2" else []),
            ]:
                info = tarfile.TarInfo(stem + end)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("end", [".tar", ".tar.gz"])
def test_webdataset(here, end):
    write_tar(f"s{end}", "w:gz" if end.endswith("gz") else "w")
    items = list(Inputs([f"s{end}"]))
    assert [item.id for item in items] == [f"s{end}/{name}.png" for name in ("a/1", "a/2", "b/1")]
    assert [item.prompt for item in items] == ["prompt a/1", "of json", "prompt b/1"]
    assert items[1].extra == {"seed": 4}
    for item in items:
        data = item.data
        if item.span is not None:
            with open(item.file, "rb") as file:
                file.seek(item.span[0])
                data = file.read(item.span[1])
        assert data == png(3)
    assert len({item.key() for item in items}) == 3
    unprompted = {replace(item, prompt=None).key() for item in items}
    assert len(unprompted) == (3 if end == ".tar" else 1)  # places in a file, or the same bytes


@pytest.mark.parametrize("end", [".tar", ".tar.gz"])
def test_half_a_tar(here, end):
    write_tar(f"s{end}", "w:gz" if end.endswith("gz") else "w")
    data = open(f"s{end}", "rb").read()
    with open(f"s{end}", "wb") as file:
        file.write(data[: len(data) // 3])
    items = list(Inputs([f"s{end}"]))
    assert items[-1].error.startswith("the rest cannot be read")
    with open("no.tar", "wb") as file:
        file.write(b"x" * 2000)
    (item,) = Inputs(["no.tar"])
    assert item.error


# -- sequences and text -------------------------------------------------------------------------


@pytest.mark.parametrize("end", [".fasta", ".fa.gz"])
def test_fasta(here, end):
    text = b"ACG\n>one first of all\nACGT\nacg\n\n>two\n>three\nA\n"
    with (gzip.open if end.endswith("gz") else open)(f"s{end}", "wb") as file:
        file.write(text)
    items = list(Inputs([f"s{end}"], "sequence"))
    assert [item.id for item in items] == [f"s{end}:1", "one", "two", "three"]
    assert [item.data for item in items] == [None, "ACGTacg", None, "A"]
    assert "empty" in items[2].error and "'>'" in items[0].error


def test_texts(here):
    with open("t.txt", "w", encoding="utf-8") as file:
        file.write("first\n\n zweite ☕ \n")
    items = list(Inputs(["t.txt"], "text"))
    assert [(item.id, item.data) for item in items] == [
        ("t.txt:1", "first"),
        ("t.txt:3", " zweite ☕ "),
    ]
    with open("t.jsonl", "w") as file:
        file.write('{"text": "a", "prompt": "b"}\n')
    (item,) = Inputs(["t.jsonl"], "text")
    assert (item.data, item.prompt) == ("a", "b")


# -- prompts given, and what is refused -----------------------------------------------------------


def test_prompts_for_all_or_one_for_each(here):
    touch("a.png", "b.png")
    assert [i.prompt for i in Inputs(["a.png", "b.png"], prompts="x")] == ["x", "x"]
    assert [i.prompt for i in Inputs(["a.png", "b.png"], prompts=["x", "y"])] == ["x", "y"]
    with pytest.raises(ValueError, match="3 prompts came for 2 inputs"):
        Inputs(["a.png", "b.png"], prompts=["x", "y", "z"])


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("gone.png", "image", "gone.png does not exist"),
        ("*.webp", "image", "matches nothing"),
        ("empty", "image", "nothing to score in empty"),
        ("s.fasta", "image", "s.fasta cannot be scored by these rewards: expected folders"),
        ("a.png", "text", "a.png cannot be scored by these rewards: expected .txt"),
        ("a.png", "sequence", "expected .fasta"),
        ("embedded:nothing", "image", "no embedded asset"),
    ],
)
def test_refused(here, path, kind, message):
    touch("a.png", "s.fasta")
    os.mkdir("empty")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Inputs([path], kind)


def test_missing_prompts_say_where_they_would_be(here):
    touch("f/a.png")
    write_tar("with.tar")
    Inputs(["with.tar"]).require_prompts("reward 'x'")
    with pytest.raises(ValueError, match=r"reward 'x' .* f has none: .* x.txt beside it"):
        Inputs(["f"]).require_prompts("reward 'x'")
    with open("m.csv", "w") as file:
        file.write("path,title\na.png,b\n")
    with pytest.raises(ValueError, match="expected a column 'prompt' or 'caption' or 'text'"):
        Inputs(["m.csv"]).require_prompts("reward 'x'")
    Inputs(["m.csv"], prompts="given").require_prompts("reward 'x'")
