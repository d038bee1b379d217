"""What a GPU has to prove, in at most ten minutes:

    python tests/gpu                     # writes gpu/gpu.json and gpu/gpu.md; exits with 1 where something failed
    python tests/gpu --device cpu        # what a CPU can prove; the rest is skipped, and the page says why
    python tests/gpu --parts golden,runs --out FOLDER

No download, no image set: the models have weights that a recipe makes or that come with the package, the pictures are
the rendered demo set. Differences are stated beside their limits; nothing is measured against a number typed in here.
"""
import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_golden import GOLDEN, published_state

from smart_iqa import create_scorer, load_checkpoint
from smart_iqa.backbones import forward_flops
from smart_iqa.config import make_config
from smart_iqa.crops import build_cache, normalise
from smart_iqa.data import load_set
from smart_iqa.devices import environment, use_bf16
from smart_iqa.files import write_json, write_whole
from smart_iqa.images import load_image, resize
from smart_iqa.lab.estimate import matmul_rate
from smart_iqa.lab.figures import markdown
from smart_iqa.metrics import srcc
from smart_iqa.training import CropFeed, Solver, add_gradients, make_model, take_step, train_epoch

SIZES = ("lite", "tiny", "small", "base")


class Skipped(Exception):
    "This machine cannot answer the question; the message says why."


def synchronise(device: torch.device):
    "Wait until the device has done what it was told."
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device: torch.device, turns: int = 3) -> float:
    "Median seconds of a call, after one that is not timed."
    times = []
    for _ in range(turns + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# --- the function

def golden(device, work):
    "Scores, attention and generated vectors of the published models, fp32, against the golden outputs."
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    crops = np.random.RandomState(GOLDEN["image_seed"]).standard_normal((2, 3, 224, 224)).astype("float32")
    rows = []
    for name, expected in sorted(GOLDEN["models"].items()):
        torch.save(published_state(name, GOLDEN["weight_seed"]), work / "published.pkl")
        model = load_checkpoint(work / "published.pkl").to(device).eval()
        with torch.no_grad():
            pooled = model.pool(model.features(torch.from_numpy(crops).to(device)))
            found = dict(score=model.head(pooled), target_in_vec_head=model.head.lda(pooled[:4])[:, :4])
        if expected["attention"]:
            found["attention"] = model.last_attention_weights
        errors = {k: float(np.abs(v.cpu().numpy() - np.array(expected[k])).max()) for k, v in found.items()}
        rows.append(dict(model=name, **errors))
    worst = max(v for row in rows for k, v in row.items() if k != "model")
    return dict(passed=worst <= 1e-3, limit=1e-3, worst=worst, table=rows)


def bf16(device, work):
    "Scores of demo pictures by the packaged model in fp32 and in bf16: SRCC with the labels, and between the two."
    images = load_set(make_config("demo", limit=40))
    rows = images.rows("test")
    scores = {}
    for amp in ("off", "on"):
        scorer = create_scorer("smart-lite", device=str(device), engine="torch", amp=amp)
        scores[amp] = np.array([scorer(images.path(name)) for name in rows.image], dtype=float)
    reached = {amp: float(srcc(values, rows.score)) for amp, values in scores.items()}
    between = float(srcc(scores["off"], scores["on"]))
    apart = float(np.abs(scores["off"] - scores["on"]).max())
    moved = abs(reached["on"] - reached["off"])
    return dict(passed=moved <= 0.01 and between >= 0.99, limit="SRCC moves by at most .01; .99 between the two",
                pictures=len(rows), srcc_fp32=reached["off"], srcc_bf16=reached["on"], srcc_between=between,
                largest_difference_points=apart)


# --- runs

def command(out: Path, device: torch.device, processes: int = 0, **values) -> list[str]:
    "Write the command that trains a short run; with `processes`, under torchrun."
    given = dict(profile="demo", epochs=2, limit=64, checkpoint_minutes=0.0, baseline=False, device=device.type,
                 dropout=0.0, out=out) | values
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    words = [f"{k}={v}" for k, v in given.items()]
    return [sys.executable, *launcher, "-m", "smart_iqa.lab.runs", *words]


def finish(line: list[str]) -> str:
    "Run a command to its end; what it printed. RuntimeError where it fails."
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return done.stdout


def journal(out: Path) -> pd.DataFrame:
    "Read the journal of the only run below a folder."
    lines = next(out.rglob("metrics.jsonl")).read_text().splitlines()
    return pd.DataFrame([json.loads(line) for line in lines])


def weights(out: Path) -> dict[str, torch.Tensor]:
    "Read the weights of the only run below a folder."
    return load_checkpoint(next(out.rglob("checkpoint.safetensors"))).state_dict()


def apart(a: Path, b: Path) -> dict:
    "Compare two runs: largest difference of losses and of weights."
    one, other = weights(a), weights(b)
    weight = max(float((one[k].double() - other[k].double()).abs().max()) for k in one)
    loss = float((journal(a).train_loss - journal(b).train_loss).abs().max())
    return dict(loss=loss, weight=weight)


def interrupted(out: Path, device: torch.device, how: int) -> bool:
    "Start a run, end it by a signal after its first resume point, and start it again; whether it was ended."
    process = subprocess.Popen(command(out, device), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while process.poll() is None and not list(out.rglob("resume.pt")):
        if time.monotonic() > until:
            process.kill()
            raise RuntimeError("no resume point within 200 seconds")
        time.sleep(0.02)
    ended = process.poll() is None
    process.send_signal(how)
    process.wait()
    finish(command(out, device))
    return ended


def runs(device, work):
    "A run; the same one again; interrupted and resumed; killed and resumed. All must give one result."
    finish(command(work / "whole", device))
    finish(command(work / "again", device))
    was = dict(interrupted=interrupted(work / "interrupted", device, signal.SIGINT),
               killed=interrupted(work / "killed", device, signal.SIGKILL))
    compared = {name: apart(work / "whole", work / name) for name in ("again", "interrupted", "killed")}
    noise = compared["again"]["loss"]  # what the device itself does differently from one run to the next
    limit = 3 * noise + 1e-6 if device.type == "cuda" else 0.0
    worst = max(compared[name]["loss"] for name in was)
    return dict(passed=all(was.values()) and worst <= limit, limit=limit, worst=worst, were_ended_in_time=was,
                table=[dict(run=name, **row) for name, row in compared.items()],
                epochs=journal(work / "whole")[["epoch", "train_loss", "val_srcc", "seconds"]].to_dict("records"))


def several(device, work):
    "torchrun with one process and with two, one per card (NCCL), or on the CPU where there are no two cards."
    cards = torch.cuda.device_count() if device.type == "cuda" else 0
    where = {1: device, 2: device if cards >= 2 else torch.device("cpu")}
    for n, place in where.items():
        finish(command(work / f"of-{n}", place, processes=n, amp="off"))
    compared = apart(work / "of-1", work / "of-2")
    said = {n: "NCCL, a card each" if place.type == "cuda" else "gloo, on the CPU" for n, place in where.items()}
    loss = journal(work / "of-1").train_loss.abs().max()
    return dict(passed=compared["loss"] <= 0.02 * loss, limit=0.02 * loss, worst=compared["loss"], processes=said,
                cards=cards)


# --- memory and speed

def steps_of(size: str, device: torch.device, batch: int):
    "Return a function that takes one training step of a model on crops that lie on the device already."
    cfg = make_config("paper", dataset="demo", model_size=size, pretrained="none", device=str(device), batch_size=batch)
    model = make_model(cfg).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    crops, scores = torch.randn(batch, 3, 224, 224, device=device), torch.rand(batch, device=device) * 100

    def step(reduced: bool = use_bf16("auto", device)):
        with torch.autocast(device.type, torch.bfloat16, enabled=reduced):
            loss = (model(crops).float() - scores).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, model, crops


def memory(device, work):
    "Memory of a training step per crop, by model: what twice the batch takes more."
    if device.type != "cuda":
        raise Skipped("a CPU's allocator does not tell a model's memory")
    rows = []
    for size in SIZES:
        peaks = []
        for batch in (8, 16):
            step, *_ = steps_of(size, device, batch)
            step()
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peaks.append(torch.cuda.max_memory_allocated(device) / 2**20)
            del step
            torch.cuda.empty_cache()
        rows.append(dict(model=size, per_crop_mib=(peaks[1] - peaks[0]) / 8, at_16_mib=peaks[1]))
    return dict(passed=all(row["per_crop_mib"] > 0 for row in rows), table=rows)


def published_step(images, model, optimizer, rows, crop: int, size: int):
    "One step as the published loop takes it: each crop decodes its picture, fp32, one crop after the other."
    rng, crops = np.random.default_rng(0), []
    for name in rows.image:
        whole = np.asarray(resize(load_image(images.path(name)), size))
        y, x = (int(rng.integers(0, n - crop + 1)) for n in whole.shape[:2])
        crops.append(torch.from_numpy(whole[y : y + crop, x : x + crop].copy()).permute(2, 0, 1))
    device = next(model.parameters()).device
    inputs = normalise(torch.stack(crops), device)
    loss = (model(inputs).float() - torch.tensor(rows.score.to_numpy(np.float32), device=device)).abs().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def speed(device, work):
    "Crops per second of training steps, against the published loop and the device's matrix rate, by model."
    few = device.type != "cuda"
    reduced = use_bf16("auto", device)
    rate = matmul_rate(torch.bfloat16 if reduced else torch.float32, device)
    cfg = make_config("demo", limit=64)
    images = load_set(cfg)
    table = []
    for size in SIZES[:1] if few else SIZES:
        batch = 8 if few else 64
        step, model, crops = steps_of(size, device, batch)
        ours = batch / seconds(step, device)
        flops = 3 * forward_flops(copy.deepcopy(model).float().eval(), crops[:1])  # backward is about twice forward
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        rows = images.rows("train").iloc[: min(batch, 16)]
        theirs = len(rows) / seconds(partial(published_step, images, model, optimizer, rows, 224, cfg.size), device, 1)
        table.append(dict(model=size, crops_per_second=ours, published=theirs, times=ours / theirs,
                          tflops=ours * flops / 1e12, of_matrix_rate=ours * flops / 1e12 / rate))
    passed = all(row["times"] > 1 for row in table) or few  # a CPU's ratio is the business of the experiment `speed`
    return dict(passed=passed, matrix_tflops=rate, bf16=reduced, table=table)


def waiting(device, work):
    "The share of an epoch's time in which the device waits for crops: against the same steps on one batch, kept."
    slow = device.type == "cpu"
    size = dict(limit=16, train_crops=1) if slow else dict(limit=64, train_crops=8)
    cfg = make_config("demo", **size, device=str(device), checkpoint_minutes=1e6, epochs=3)
    images = load_set(cfg)
    cache = build_cache(images, cfg.size, cfg.fit, cfg.cache)
    feed = CropFeed(cache, images.table, cfg, device)
    solver = Solver(make_model(cfg, 50.0), feed, cfg, work)
    train_epoch(solver)  # not timed
    inputs, rows = next(iter(feed.train_batches(0)))

    def kept():
        for _ in range(len(feed)):
            add_gradients(solver, inputs, rows)
            take_step(solver)

    def fed():
        solver.state |= dict(epoch=1, batch=0)
        train_epoch(solver)

    turns = [(seconds(fed, device, 1), seconds(kept, device, 1)) for _ in range(1 if slow else 3)]
    shares = [max(0.0, 1 - b / a) for a, b in turns]
    return dict(passed=True, median=statistics.median(shares), of=shares, batches=len(feed), crops_of_a_batch=len(rows))


PARTS = {"golden": golden, "bf16": bf16, "runs": runs, "several": several, "memory": memory, "speed": speed,
         "waiting": waiting}


# --- the page

def describe(name: str, result: dict) -> str:
    "Write a part of the page: the question, the answer, its numbers."
    state = "skipped" if result["passed"] is None else "passed" if result["passed"] else "FAILED"
    lines = [f"## {name}: {state}", "", PARTS[name].__doc__, ""]
    plain = {k: v for k, v in result.items() if k not in ("passed", "table", "epochs")}
    lines += [f"- {k.replace('_', ' ')}: {round(v, 6) if isinstance(v, float) else v}" for k, v in plain.items()]
    for key in ("table", "epochs"):
        if result.get(key):
            lines += ["", markdown(pd.DataFrame(result[key]).round(6))]
    return "\n".join([*lines, ""])


def main() -> int:
    "Ask the parts, write JSON and page, and return 1 where one failed."
    parser = argparse.ArgumentParser(prog="python tests/gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: cuda where there is one")
    parser.add_argument("--out", default="gpu", type=Path, help="folder of gpu.json and gpu.md")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    asked = parser.parse_args()
    chosen = [p.strip() for p in asked.parts.split(",")]
    if unknown := [p for p in chosen if p not in PARTS]:
        parser.error(f"--parts {unknown[0]}: choose some of {', '.join(PARTS)}")
    name = asked.device if asked.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device, results = torch.device(name), {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        os.environ.setdefault("SMART_IQA_CACHE", str(Path(room) / "cache"))
        for part in chosen:
            (folder := Path(room) / part).mkdir()
            begun = time.monotonic()
            try:
                results[part] = PARTS[part](device, folder)
            except Skipped as e:
                results[part] = dict(passed=None, why=str(e))
            except Exception as e:  # the other parts are asked all the same
                results[part] = dict(passed=False, error=f"{type(e).__name__}: {e}")
            results[part]["took_seconds"] = round(time.monotonic() - begun, 1)
            print(f"{part}: {results[part]['passed']}, {results[part]['took_seconds']} s", flush=True)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card: CPU"
    whole = dict(device=str(device), card=card, seconds=round(time.monotonic() - started),
                 environment=environment(make_config("demo", device=str(device))), parts=results)
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "gpu.json", whole)
    head = f"# smart-iqa on {card}\n\n{whole['seconds']} seconds; torch {torch.__version__}.\n\n"
    text = head + "\n".join(describe(part, result) for part, result in results.items())
    write_whole(asked.out / "gpu.md", text)
    print(f"{asked.out / 'gpu.json'}\n{asked.out / 'gpu.md'}")
    return int(any(result["passed"] is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
