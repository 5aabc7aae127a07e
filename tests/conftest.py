"""What the tests share, made once a session: a tiny base folder, its tokenizer, a file of pairs.

tiny: the folder of a random Gemma-2 (2 layers, hidden 64, soft-caps, a window of 64 tokens), float weights
tokenizer: one token a byte
pairs_file: 64 generated pairs in the competition's columns, as parquet
runs, alone: two adapters that tell rows apart, and the probability of one row by itself
small_parts: inference in parts of five rows
demo: what the README's three demo commands left behind (the slowest thing here: it runs beside other tests)
"""

import fcntl
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

# Before torch and transformers are imported. One thread: the models are tiny, and two threads that wait for
# each other on a busy machine were measured 13 times slower than one.
os.environ["HF_HUB_OFFLINE"] = os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import CPU, TEXTS, adapted, write_pairs
from hypothesis import HealthCheck, configuration, settings

import infer
from minarena.ensemble import predict
from minarena.files.adapter import load_adapter_, save_adapter
from minarena.files.base import load_backbone
from minarena.model import AdapterConfig, PreferenceModel
from minarena.tiny import byte_tokenizer, demo_pairs, write_tiny

REPOSITORY = Path(__file__).parent.parent
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1 ... with `-n`, else None
# hypothesis would put a folder of examples beside the code, which may be read-only
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / f"hypothesis-{os.getuid()}")
# no test fails because the machine is busy
settings.register_profile("short", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("short")
settings.register_profile("long", max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.hookimpl(optionalhook=True)  # pytest-xdist may be missing
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a worker and its server of forked children take 1.5 GB, and half a minute to start."""
    return min(4, os.cpu_count())


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU, and there is none here"))
        if item.get_closest_marker("browser") and not (
            shutil.which("chromium") and shutil.which("chromedriver")
        ):
            item.add_marker(pytest.mark.skip(reason="needs chromium and chromedriver, and they are not here"))
    items.sort(key=lambda item: "demo" in getattr(item, "fixturenames", ()))  # by then the demo has run


def pytest_collection_finish():
    """What was imported stays: the collector of garbage need not walk through it again and again (a million
    objects: half a second each time)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def alike_everywhere(request, monkeypatch):
    """What a test draws is the same in any order of tests; unless marked gpu, it runs on the CPU."""
    torch.manual_seed(0)
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def compiler(request):
    """On a GPU, a compiler that has seen nothing: in one process a ninth model's layers would run uncompiled,
    with a warning. (Not by monkeypatch: its undoing hides an option of torch's for good.)"""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture
def unwritten_is_nan():
    """torch.empty has NaN in it, so that what is read before it is written, or never written, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def empty_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(autouse=True)
def working_folder(empty_folder, monkeypatch):
    """Every test begins in an empty folder and leaves it empty: what the README's commands left beside the
    code (runs/, submission.csv, report.html) decides nothing, and no test leaves files in a checkout."""
    monkeypatch.chdir(empty_folder)
    yield
    left = sorted(path.name for path in empty_folder.iterdir())
    for path in empty_folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left, f"left in the working folder: {left}"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return write_tiny(str(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs.parquet", demo_pairs(64, seed=5))


# The first of the two models sees 160 rows only: it has to be in the ensemble, not to be good.
DEMO = {
    "ba": ["train.py", "--swap"],
    "ab": ["train.py", "--limit", "160"],
    "infer": ["infer.py", "--adapter", "runs/ab", "runs/ba", "--probs", "probs.csv"],
}


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Started before the first test where a test that was collected needs it: what starts it later would be a
    test of something else, without what the children need (ten times slower)."""
    if "children" in sys.modules:
        sys.modules["children"].start_server()


@pytest.fixture(scope="session", autouse=True)
def demo_commands(request, tmp_path_factory) -> Path:
    """The demo's commands, one after the other, begun before the first test where one of the tests asks for
    `demo`: the slowest thing here runs beside the other tests. Gives the folder.

    The workers of pytest-xdist share one demo, which the first of them begins. Its shell holds a lock until
    it ends, however it ends: who waits for the lock waits for the demo.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if WORKER else folder) / "demo"  # a worker's own folder is below the session's
    if not any("demo" in getattr(item, "fixturenames", ()) for item in request.session.items):
        return folder
    folder.mkdir(exist_ok=True)
    lines = [
        f"{shlex.join([sys.executable, str(REPOSITORY / script), *words])} >{name}.out 2>{name}.err"
        for name, (script, *words) in DEMO.items()
    ]
    # what they say goes to files: a full pipe would stop them
    command = ["sh", "-c", f"({' && '.join(lines)}); echo $? >code"]
    # each import is listed on stderr: test_house.py counts what `train.py --swap` walks through
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "lock", "wb") as lock, suppress(BlockingIOError):  # another began it, and it runs
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (folder / "pid").exists():
            more = dict(cwd=folder, env=environment, start_new_session=True, pass_fds=[lock.fileno()])
            (folder / "pid").write_text(str(subprocess.Popen(command, **more).pid), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def demo(demo_commands):
    """A folder in which the README's demo commands ran, and (stdout's last line, stderr) of each. No test
    writes into the folder: others read it at the same time."""
    folder = demo_commands
    with open(folder / "lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
    said = {
        name: [(folder / f"{name}.{end}").read_text(encoding="utf-8") for end in ("out", "err")]
        for name in DEMO
        if (folder / f"{name}.err").exists()
    }
    code = (folder / "code").read_text(encoding="utf-8") if (folder / "code").exists() else "killed"
    assert code == "0\n", (code, [err[-2000:] for _, err in said.values()][-1:])
    return folder, {name: (json.loads(out.splitlines()[-1]), err) for name, (out, err) in said.items()}


def pytest_unconfigure(config):
    """The last process to end stops a demo that is still at work: after a failure with -x, or Ctrl-C."""
    folder = config._tmp_path_factory.getbasetemp() / "demo"
    if not WORKER and (folder / "pid").exists() and not (folder / "code").exists():
        with suppress(ProcessLookupError):
            os.killpg(int((folder / "pid").read_text(encoding="utf-8")), signal.SIGKILL)


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory) -> list[str]:
    """Two adapters that tell rows apart, one of each order, in folders as train.py leaves them."""
    folders = []
    for number, order in enumerate(("ab", "ba")):
        folder = tmp_path_factory.mktemp(order)
        model, config = adapted(tiny, AdapterConfig(r=6, alpha=9.0))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(number)
            for parameter in model.score.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_adapter(folder, model, config, tiny)
        record = {"model": tiny, "order": order, "max_length": 200, "truncation": "left", "matmul": "dequant"}
        (folder / "train_config.json").write_text(json.dumps(record), encoding="utf-8")
        folders.append(str(folder))
    return folders


@pytest.fixture(scope="session")
def alone(tiny, runs):
    """A function (row, adapter number, order) -> P(response_a wins): the row by itself, its text by hand."""
    models = [PreferenceModel(load_backbone(tiny, CPU, torch.float32), torch.nn.Identity()) for _ in runs]
    for model, run in zip(models, runs, strict=True):
        load_adapter_(model, run)
    tokenizer = byte_tokenizer()

    @cache
    @torch.no_grad()
    def p_shown_first(prompt: str, first: str, second: str, number: int) -> float:
        text = f"<prompt>: {prompt}\n\n<response_a>: {first}\n\n<response_b>: {second}"
        ids = torch.tensor([[2, *tokenizer(text)["input_ids"][-198:], 1]])
        return models[number].eval()(ids, torch.ones_like(ids)).double().softmax(-1)[0, 0].item()

    def p_a(row, number: int, order: str) -> float:
        prompt, a, b = (row[name] for name in TEXTS)
        return (
            p_shown_first(prompt, a, b, number) if order == "ab" else 1 - p_shown_first(prompt, b, a, number)
        )

    return p_a


@pytest.fixture
def small_parts(monkeypatch):
    for module in (predict, infer):
        monkeypatch.setattr(module, "PART", 5)
