import json
import math
import sys
import types

import pytest
import torch
import yaml
from accelerate import PartialState
from painter import Painter
from PIL import Image
from toys import MaskedChain

from diffreward.finetuning import card, figures, record
from diffreward.finetuning.monitor import Evaluation, Evaluator, paired
from diffreward.finetuning.record import Card, Record, read_metrics
from diffreward.finetuning.team import Team
from diffreward.policies.gaussian import GaussianLaw
from diffreward.rewards import make_reward
from diffreward.samples import Samples


class One(Team):
    """The only process, or one of several of which nothing is asked."""

    def __init__(self, rank=0, size=1):
        self.rank, self.size = rank, size

    def gather(self, value):
        return [value]


PROMPTS = ["a red heart", "a cat", "two blue stars"]
CARD = Card("owner/name", "PRDP", "target_color", 50, options={"beta": 2.0, "clip": 0.1})


class Redder(Painter):
    """Its pictures end 1.5 logits redder, after ``share`` of the training."""

    def __init__(self, share=1.0):
        super().__init__()
        self.share = share

    def step_law(self, x, i, condition):
        law = super().step_law(x, i, condition)
        if i < self.num_steps - 1:
            return law
        red = self.share * torch.tensor([[1.5, -0.8, -0.8]])
        return GaussianLaw(law.x0, law.mean + red, law.std, law.x0_std)


REWARDS = {
    "target_color": make_reward("target_color", color="red"),
    "colorfulness": make_reward("colorfulness"),
    "shapes_checker": make_reward("shapes_checker"),
}


def evaluations(iterations=(0, 25, 50), rewards=REWARDS, k=3):
    last = iterations[-1]
    return [
        Evaluator(Redder(n / last), Painter(), rewards, PROMPTS, k, team=One())(n)
        for n in iterations
    ]


@pytest.fixture(scope="module")
def run():
    return evaluations()


def new(folder, **options):
    options = {"team": One(), "progress": False, **options}
    return Record(folder, "seed: 0\nreward: target_color\n", {"device": "cpu"}, **options)


def row(n):
    return {"reward": 0.1 * n, "kl": 0.5 * n, "flat_groups": 0.0}


def play(found, run, start=0, end=50):
    """Iterations start + 1 .. end of a run that evaluates every 25."""
    for n in range(start + 1, end + 1):
        found.iteration(n, row(n))
        for evaluation in run:
            if evaluation.iteration == n:
                found.evaluation(evaluation, ["it is dull"] if n == 25 else [])


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    found = new(folder)
    found.evaluation(run[0])
    play(found, run)
    found.finish(CARD)
    found.close()
    return folder


def test_files(whole):
    found = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    grids = {f"samples/iteration-{n:06d}.{end}" for n in (0, 25, 50) for end in ("png", "jsonl")}
    assert found == grids | {
        "README.md", "config.yaml", "env.json", "metrics.jsonl", "before_after.png", "curves.png",
        "samples/before.safetensors", "samples/latest.safetensors",
    }  # fmt: skip
    assert yaml.safe_load((whole / "config.yaml").read_text())["seed"] == 0
    assert json.loads((whole / "env.json").read_text()) == {"device": "cpu"}


# -- metrics ------------------------------------------------------------------------------------


def test_metrics(whole, run):
    rows = read_metrics(whole / "metrics.jsonl")
    assert len(rows) == 50 + 3
    assert [r for r in rows if "evaluation" not in r] == [
        {"iteration": n, **row(n)} for n in range(1, 51)
    ]
    last = rows[-1]["evaluation"]
    change = paired(run[0].scores["colorfulness"], run[2].scores["colorfulness"])
    assert last["scores"]["colorfulness"] == {
        "mean": pytest.approx(run[2].scores["colorfulness"].double().mean().item()),
        "count": 9,
        "change": change.mean,
        "se": change.se,
    }
    assert last["scores"]["shapes_checker"]["count"] == 6
    # the last of six steps of std 0.6 has moved by (1.5, -0.8, -0.8)
    assert last["kl"] == pytest.approx((1.5**2 + 2 * 0.8**2) / (2 * 0.6**2), rel=1e-5)
    assert last["diversity"] == pytest.approx(run[2].diversity.mean().item())
    before, after = (e.probes["saturation"].double() for e in (run[0], run[2]))
    assert last["probes"]["saturation"] == {
        "mean": pytest.approx(after.mean().item()),
        "shift": pytest.approx(((after.mean() - before.mean()) / before.std()).item()),
    }
    assert [r["warnings"] for r in rows if "evaluation" in r] == [[], ["it is dull"], []]


@pytest.mark.parametrize("killed, checkpoint", [(10, 5), (30, 25), (30, 20), (50, 50)])
def test_a_resumed_run_leaves_the_same(whole, run, tmp_path, killed, checkpoint):
    first = new(tmp_path)
    first.evaluation(run[0])
    play(first, run, 0, killed)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 31, "rew')
    second = new(tmp_path)
    second.resume(checkpoint)
    play(second, run, checkpoint)
    if killed == checkpoint == 50:  # everything is done, but the end
        second.evaluation(run[2])
    second.finish(CARD)
    for name in ("metrics.jsonl", "README.md"):
        assert (tmp_path / name).read_text() == (whole / name).read_text()
    for name in ("before_after.png", "samples/iteration-000050.png"):
        with Image.open(tmp_path / name) as a, Image.open(whole / name) as b:
            assert a.tobytes() == b.tobytes()


def test_resume_reads_the_evaluations_back(run, tmp_path):
    first = new(tmp_path)
    first.evaluation(run[0])
    play(first, run, 0, 40)
    second = new(tmp_path)
    second.resume(40)
    assert (second.before.iteration, second.after.iteration) == (0, 25)
    assert second.warnings == [(25, "it is dull")]
    third = new(tmp_path)
    third.resume(10)  # of then, the latest evaluation is gone
    assert third.before.iteration == 0 and third.after is None and third.warnings == []
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 11


def test_a_file_cut_anywhere_is_a_prefix(whole, tmp_path):
    data = (whole / "metrics.jsonl").read_bytes()[:1200]
    rows = read_metrics(whole / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for length in {*range(len(data) - 150, len(data)), *range(0, len(data), 7)}:
        path.write_bytes(data[:length])
        found = read_metrics(path)
        assert found == rows[: data[:length].count(b"\n")]


def test_a_damaged_line_is_named(whole, tmp_path):
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "metrics.jsonl"
    for bad in ('{"iter\n', "[1]\n", '{"reward": 1.0}\n', '{"iteration": "x"}\n'):
        path.write_text("".join([*lines[:3], bad, *lines[3:]]))
        with pytest.raises(ValueError, match="line 4 of .* is damaged"):
            read_metrics(path)
    assert path.read_text().count("\n") == len(lines) + 1  # nothing was changed


def test_numbers_that_json_has_not(tmp_path):
    found = new(tmp_path)
    found.iteration(1, {"reward": math.nan, "kl": torch.tensor(2.0), "worst": -math.inf})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"iteration": 1, "reward": None, "kl": 2.0, "worst": "-inf"}
    ]


def test_only_the_main_process_writes(run, tmp_path):
    other = new(tmp_path, team=One(1, 2))
    other.evaluation(run[0])
    play(other, run, 0, 25)
    other.finish(CARD)
    other.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder(run, capsys):
    found = new(None)
    found.evaluation(run[0])
    play(found, run, 0, 25)
    found.finish(CARD)
    found.close()
    assert "it is dull" in capsys.readouterr().err


def test_progress(run, tmp_path, capsys):
    found = new(tmp_path, progress=True, iterations=50)
    found.evaluation(run[0])
    play(found, run, 10, 50)
    assert found._bar.initial == 10  # else a resumed run would seem faster than it is
    found.close()
    err = capsys.readouterr().err
    assert "50/50" in err and "reward=5, kl=25" in err
    assert "diffreward: warning after 25 iterations: it is dull" in err


# -- pictures -----------------------------------------------------------------------------------


def colours(picture):
    """The colours of areas of at least 100 x 100 pixels, in reading order, but for white."""
    picture, found = picture.convert("RGB"), []
    for y in range(50, picture.height, 40):
        for x in range(20, picture.width, 40):
            box = picture.crop((x, y, x + 20, y + 20)).getcolors()
            if len(box) == 1 and box[0][1] != (255, 255, 255) and box[0][1] not in found:
                found.append(box[0][1])
    return found


def pixels(evaluation, rows):
    data = (evaluation.samples.data[:, :, 0, 0] * 255).round().int()
    return [tuple(data[r].tolist()) for r in rows]


def test_sample_grid_has_every_sample_in_its_place(whole, run):
    with Image.open(whole / "samples" / "iteration-000050.png") as picture:
        assert colours(picture) == pixels(run[2], range(9))
    rows = (whole / "samples" / "iteration-000050.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in rows]
    assert [r["prompt"] for r in rows] == [p for p in PROMPTS for _ in range(3)]
    assert [r["sample"] for r in rows] == [0, 1, 2] * 3
    scores = [r["scores"]["target_color"] for r in rows]
    assert scores == run[2].scores["target_color"].tolist()
    assert rows[4]["scores"]["shapes_checker"] is None
    assert rows[0]["kl"] == run[2].kl[0].item() and set(rows[0]["probes"]) == set(run[2].probes)


def test_before_and_after_side_by_side(whole, run):
    with Image.open(whole / "before_after.png") as picture:
        first, last = pixels(run[0], range(9)), pixels(run[2], range(9))
        expected = [
            c for p in range(3) for s in (0, 1) for c in (first[3 * p + s], last[3 * p + s])
        ]
        assert colours(picture) == expected


def test_tokens_are_told_rather_than_shown(tmp_path):
    policy = MaskedChain()
    rewards = {"ones": lambda samples: (samples.data == 1).double().mean(1)}
    rewards = {name: make_reward(f) for name, f in rewards.items()}
    found = Evaluator(policy, policy, rewards, ["x"], 1, team=One())(0)
    folder = new(tmp_path)
    folder.evaluation(found)
    folder.finish(CARD)
    row = json.loads((tmp_path / "samples" / "iteration-000000.jsonl").read_text())
    assert row["tokens"] == found.samples.data[0].tolist()
    assert not list(tmp_path.rglob("*0.png")) and (tmp_path / "curves.png").exists()
    assert "before_after.png" not in (tmp_path / "README.md").read_text()


def test_sequences_are_written_in_letters(tmp_path):
    """As Biopython reads them: before and after, with their rewards; and logos."""
    SeqIO = pytest.importorskip("Bio.SeqIO")
    folder, letters = new(tmp_path), {}
    for n, tokens in enumerate([[[0, 1, 2], [3, 3, 0]], [[2, 2, 2], [1, 1, 0]]]):
        scores = {"gc_content": torch.tensor([0.5, 0.25]), "a judge": torch.tensor([1.0, math.nan])}
        samples = Samples(torch.tensor(tokens), "dna")
        one = torch.zeros(2)
        found = Evaluation(n, samples, ["x"], scores, {}, torch.zeros(1), one)
        folder.evaluation(found)
        letters[n] = ["".join("ACGT"[k] for k in row) for row in tokens]
    folder.finish(CARD)
    records = list(SeqIO.parse(tmp_path / "before_after.fasta", "fasta"))
    assert [r.id for r in records] == ["before-0-0", "before-0-1", "after-0-0", "after-0-1"]
    assert [str(r.seq) for r in records] == letters[0] + letters[1]
    assert records[2].description == "after-0-0 gc_content=0.5 a_judge=1"
    assert records[3].description == "after-0-1 gc_content=0.25"
    rows = (tmp_path / "samples" / "iteration-000001.jsonl").read_text().splitlines()
    assert [json.loads(r)["sequence"] for r in rows] == letters[1]
    with Image.open(tmp_path / "logos.png") as image:
        assert image.width > 1000
    text = (tmp_path / "README.md").read_text()
    assert "(logos.png)" in text and "before_after.fasta" in text
    assert "before_after.png" not in text and "diffusers" not in text


def test_videos_show_their_middle_frame():
    clips = torch.zeros(2, 5, 3, 8, 8)
    clips[:, 2] = 1
    scores = {"a": torch.zeros(2)}
    found = Evaluation(0, Samples(clips, "video"), ["x"], scores, {}, torch.zeros(1), None)
    assert figures.pictures(found).eq(1).all()


def test_curves(whole, run):
    rows = read_metrics(whole / "metrics.jsonl")
    figure = figures.curves(rows)
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert list(axes) == [
        "target_color (trained)", "colorfulness (held out)", "shapes_checker (held out)",
        "KL to the pretrained model", "diversity within a prompt", "probes",
    ]  # fmt: skip
    assert all(axis.get_xlabel() == "iteration" and axis.get_ylabel() for axis in axes.values())
    rollouts, means = axes["target_color (trained)"].lines[:2]
    assert list(rollouts.get_xdata()) == list(range(1, 51))
    assert rollouts.get_ydata() == pytest.approx([0.1 * n for n in range(1, 51)])
    assert list(means.get_xdata()) == [0, 25, 50]
    expected = [e.scores["target_color"].double().mean().item() for e in run]
    assert means.get_ydata() == pytest.approx(expected)
    # an error bar is 1.96 standard errors of the change to either side
    held = axes["colorfulness (held out)"]
    assert held.lines[-1].get_ydata()[0] == held.containers[0].lines[0].get_ydata()[0]
    (bars,) = held.containers[0].lines[2]
    low, high = bars.get_segments()[2][:, 1]
    se = paired(run[0].scores["colorfulness"], run[2].scores["colorfulness"]).se
    assert high - low == pytest.approx(2 * 1.96 * se)
    nats = axes["KL to the pretrained model"].lines[0].get_ydata()
    assert nats == pytest.approx([e.kl.mean().item() for e in run])
    assert len(axes["probes"].get_legend().get_texts()) == 4


def test_curves_of_little(tmp_path):
    """One evaluation, one sample a prompt, nothing but the trained reward."""
    scores = {"a": torch.tensor([1.0])}
    found = Evaluation(
        0, Samples(torch.zeros(1, 2), "toy"), ["x"], scores, {}, torch.full((1,), math.nan), None
    )
    folder = new(tmp_path)
    folder.evaluation(found)
    folder.finish(CARD)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["evaluation"]["diversity"] is None
    figure = figures.curves(read_metrics(tmp_path / "metrics.jsonl"))
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["a (trained)"]
    text = (tmp_path / "README.md").read_text()
    assert "no reward was held out" in text and "one pair" in text


# -- the model card -----------------------------------------------------------------------------


def split(text):
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_readme(whole, run):
    front, body = split((whole / "README.md").read_text())
    assert front["base_model"] == "owner/name" and front["base_model_relation"] == "adapter"
    assert front["license"] == "other" and {"lora", "prdp", "diffreward"} <= set(front["tags"])
    lines = {
        line.split("|")[1].strip(): line.split("|") for line in body.splitlines() if "|" in line
    }
    change = paired(run[0].scores["colorfulness"], run[2].scores["colorfulness"])
    cells = [cell.strip() for cell in lines["colorfulness (held out)"][2:-1]]
    low, high = change.interval
    assert cells == [
        f"{run[0].scores['colorfulness'].double().mean():.4g}",
        f"{run[2].scores['colorfulness'].double().mean():.4g}",
        f"{change.mean:+.4g}", f"{low:+.4g} to {high:+.4g}", "9",
    ]  # fmt: skip
    assert lines["shapes_checker (held out)"][-2].strip() == "6"
    assert "target_color (trained)" in lines and lines["`beta`"][2].strip() == "2.0"
    assert "`target_color` rose because it was asked to" in body
    worse = card.readme(CARD, run[2], run[0], [], images=True)
    assert "`target_color` did not rise; whether" in worse
    assert "- after 25 iterations: it is dull" in body
    assert f"{run[2].kl.mean():.3g} nats" in body
    share = run[2].diversity.mean() / run[0].diversity.mean()
    assert f"{share:.0%} of before" in body
    assert "- saturation: " in body and "![curves](curves.png)" in body


@pytest.mark.parametrize("model", ["owner/name", "embedded:emoji", "./my'model", "Painter"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_cards_of_other_models(run, model, method):
    about = Card(model, "DDPO", "r|s\n{[", 1, method=method, options={"x": "a|b", "y": None})
    front, body = split(card.readme(about, run[0], run[2], [], images=True))
    assert front.get("base_model") == ("owner/name" if model == "owner/name" else None)
    assert ("lora" in front["tags"]) is (method == "lora")
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "final" in code and "a\\|b" in body and "gave none" in body
    own = Card(model, "DDPO", "r", 1, loading="import this")
    assert "```python\nimport this\n```" in card.readme(own, run[0], run[2], [], images=True)


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert card.is_hub_id("models/mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not card.is_hub_id("models/mine")
    assert not card.is_hub_id("/models/mine") and not card.is_hub_id("a/b/c")


def test_a_hard_constraint_that_is_not_met_is_not_hidden():
    def made(*values):
        samples, scores = Samples(torch.zeros(3, 2), "toy"), {"a": torch.tensor(values)}
        return Evaluation(0, samples, ["x"], scores, {}, torch.zeros(1), None)

    before, after = made(1.0, 2.0, 3.0), made(2.0, -math.inf, math.nan)
    found = figures.summary(before, after)["scores"]["a"]
    assert found["mean"] == -math.inf and found["count"] == 2 and found["change"] == 1
    cells = [c.strip() for c in card.comparison(before, after).splitlines()[2].split("|")]
    assert cells[2:5] == ["1", "2", "+1"] and cells[-2] == "1"  # of the pair that there is


def test_finish_needs_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="no evaluation was recorded"):
        new(tmp_path).finish(CARD)


# -- trackers -----------------------------------------------------------------------------------


def test_loggers_are_checked_before_anything(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        new(tmp_path, loggers=["wandb"])
    with pytest.raises(ValueError, match="no logger 'mlflow'; there is tensorboard, wandb"):
        new(tmp_path, loggers=["mlflow"])
    assert list(tmp_path.iterdir()) == []


class Tracker:
    name = "fake"

    def __init__(self):
        self.logged, self.pictures, self.finished = [], [], 0

    def log(self, values, step):
        self.logged.append((step, values))

    def log_images(self, values, step):
        self.pictures.append((step, values))

    def finish(self):
        self.finished += 1


def test_trackers_get_numbers(run, tmp_path, monkeypatch):
    tracker = Tracker()
    monkeypatch.setattr(record, "check_loggers", lambda names: None)
    monkeypatch.setattr(record, "start_tracker", lambda *options: tracker)
    found = new(tmp_path, loggers=["fake"])
    found.evaluation(run[0])
    found.iteration(1, {"reward": 1.0, "why": "words", "nothing": None, "flag": True})
    found.close()
    found.close()
    (_, first), second = tracker.logged
    assert second == (1, {"train/reward": 1.0})
    assert first["evaluation/target_color"] == pytest.approx(
        run[0].scores["target_color"].mean().item()
    )
    assert {"evaluation/kl", "evaluation/diversity", "probes/sharpness"} <= set(first)
    assert tracker.pictures[0][0] == 0 and tracker.finished == 1


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A module in place of wandb that remembers how it was started."""
    PartialState(cpu=True)  # in a run, the team has an Accelerator
    started = []
    run = types.SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)
    module = types.ModuleType("wandb")
    module.init = lambda **options: started.append(options) or run
    module.config = types.SimpleNamespace(
        update=lambda values, **k: started[-1].update(config=values)
    )
    module.Image = lambda picture: picture
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return started


def test_wandb_is_offline_unless_someone_is_logged_in(wandb, tmp_path, monkeypatch):
    def mode():
        new(tmp_path, loggers=["wandb"]).close()
        assert wandb[-1]["dir"] == str(tmp_path) and wandb[-1]["project"] == "diffreward"
        assert wandb[-1]["config"] == {"seed": 0, "reward": "target_color"}
        return wandb[-1].get("mode")

    assert mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert mode() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mode() is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert mode() == "offline"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode() is None


def test_tensorboard(run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = new(tmp_path, loggers=["tensorboard"])
    found.evaluation(run[0])
    play(found, run, 0, 25)
    found.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rewards = events.Scalars("train/reward")
    assert [e.step for e in rewards] == list(range(1, 26))
    assert [e.value for e in rewards] == pytest.approx([0.1 * n for n in range(1, 26)])
    assert [e.step for e in events.Scalars("evaluation/target_color")] == [0, 25]
    assert [e.step for e in events.Images("samples")] == [0, 25]


# -- the hub ------------------------------------------------------------------------------------


class Hub:
    def __init__(self, error=None):
        self.error, self.calls = error, []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(("upload", options))


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_push_to_hub(online, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    hub = Hub()
    assert record.push_to_hub(tmp_path, "me/mine", api=hub, private=True).endswith("me/mine")
    (_, name, options), (_, upload) = hub.calls
    assert name == "me/mine" and options == {"private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/mine" and upload["folder_path"] == str(tmp_path)
    kept = ["README.md", "final/pytorch_lora_weights.safetensors", "samples/iteration-000000.png"]
    left = [
        "checkpoints/checkpoint-5/model.safetensors", "samples/before.safetensors",
        "tensorboard/events", "wandb/x/y", ".unfinished-3-README.md", "samples/.unfinished-3-a.png",
    ]  # fmt: skip
    patterns = upload["ignore_patterns"]
    assert list(filter_repo_objects([*kept, *left], ignore_patterns=patterns)) == kept


def test_push_to_hub_offline(tmp_path):
    hub = Hub()
    for act in (
        lambda: record.check_hub("me/mine"),
        lambda: record.push_to_hub(tmp_path, "me/mine", api=hub),
    ):
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            act()
    assert hub.calls == []


def test_push_to_hub_fails_clearly(online, tmp_path):
    class NoRoute(Exception):
        """Of an HTTP client."""

    for error in (NoRoute("no route"), OSError("no token")):
        with pytest.raises(ConnectionError, match="The run is whole in .*hf upload me/mine"):
            record.push_to_hub(tmp_path, "me/mine", api=Hub(error))
    with pytest.raises(ValueError, match="takes owner/name, but 'mine' came"):
        record.check_hub("mine")
