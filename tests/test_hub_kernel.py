"""The package in the form of a hub kernel, loaded by transformers from a local folder, in processes that do not have it otherwise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_patch import llava
from tiny_models import make_batch, make_model

import hf_blocksparse
from hf_blocksparse import PerLayer, SinkWindow, SlidingWindow, patch_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import build_hub_kernel  # noqa: E402

REPO = "someone/hf-blocksparse"

# Only the download is replaced, and only where transformers finds no `kernels` package that it works with.
START = """
import importlib.util, json, os, sys, traceback, warnings
from pathlib import Path

repository, folder, work, repo, cases = sys.argv[1:]
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(repository)]
assert importlib.util.find_spec("hf_blocksparse") is None

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations import hub_kernels

def get_kernel(name, **options):
    assert name == repo, name
    variant = Path(folder) / "build" / "torch-cpu"
    metadata = json.loads((variant / "metadata.json").read_text())
    spec = importlib.util.spec_from_file_location(metadata["id"], variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[metadata["id"]] = module
    spec.loader.exec_module(module)
    return module

if not hub_kernels.is_kernels_available():
    hub_kernels.is_kernels_available = lambda: True
    hub_kernels.get_kernel = get_kernel

def load(path, kind=AutoModelForCausalLM, **options):
    return kind.from_pretrained(
        Path(work) / path, attn_implementation=repo, allow_all_kernels=True, **options
    )

def refused(error, call):
    try:
        call()
    except error as raised:
        return str(raised)
    raise AssertionError("was not refused")

batch, expected, hidden, whole = torch.load(Path(work) / "expected.pt")
real = batch["attention_mask"].bool()
torch.set_num_threads(1)
failed = []
for name, code in json.loads(cases).items():
    child = os.fork()
    if not child:
        status = 1
        try:
            exec(code)
            status = 0
        except BaseException:
            print(f"--- {name}", traceback.format_exc(), file=sys.stderr, flush=True)
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
print(json.dumps(failed))
"""

# Each in a process of its own, whose first model it is.
CASES = {
    "a sparse checkpoint": """
model = load("sparse")
package = sys.modules["hf_blocksparse"]
assert Path(package.__file__).is_relative_to(folder), package.__file__
assert model.config._attn_implementation == "block_sparse"
torch.testing.assert_close(model(**batch).logits[real], expected[real])
tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
assert tokens.shape[1] == batch["input_ids"].shape[1] + 4
# What it saves, it loads, by the name or by what is imported now.
model.save_pretrained(Path(work) / "again")
for again in (load("again"), AutoModelForCausalLM.from_pretrained(Path(work) / "again")):
    torch.testing.assert_close(again(**batch).logits[real], expected[real])
package.unpatch_model(model)
torch.testing.assert_close(model(**batch).logits[real], whole[real])
assert "whose configuration has no layouts" in refused(ValueError, lambda: load("dense"))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    AutoModelForCausalLM.from_pretrained(Path(work) / "sparse", attn_implementation="eager")
assert any("'eager' was asked for" in str(one.message) for one in warned), warned
""",
    "a base model": """
model = load("sparse", AutoModel)
torch.testing.assert_close(model(**batch).last_hidden_state[real], hidden[real])
""",
    "a dense checkpoint": """
assert "whose configuration has no layouts" in refused(ValueError, lambda: load("dense"))
""",
    "a layout in the configuration": """
config = AutoConfig.from_pretrained(Path(work) / "dense")
config.block_sparse = {"kind": "per_layer", "layers": LAYERS}
model = load("dense", config=config)
torch.testing.assert_close(model(**batch).logits[real], expected[real])
assert set(model.config.block_sparse["layouts"]) == {"0", "1"}
""",
    "a dense model, switched": """
model = AutoModelForCausalLM.from_pretrained(Path(work) / "dense")
model.set_attn_implementation(repo, allow_all_kernels=True)
assert "but has no layout; use patch_model" in refused(RuntimeError, lambda: model(**batch))
""",
    "a part of a model": """
from transformers import AutoModelForImageTextToText
config = AutoConfig.from_pretrained(Path(work) / "llava")
config.text_config.block_sparse = {"kind": "sliding_window", "window": 9}
model = AutoModelForImageTextToText.from_pretrained(
    Path(work) / "llava", config=config, attn_implementation={"text_config": repo}, allow_all_kernels=True
)
assert model.config._attn_implementation == model.config.vision_config._attn_implementation == "sdpa"
layers = model.model.language_model.layers
assert all(layer.self_attn._block_sparse.layout.window == 9 for layer in layers)
""",
    "an older release is there": """
package = type(sys)("hf_blocksparse")
package.__version__ = "0.0.9"
sys.modules["hf_blocksparse"] = package
message = refused(ValueError, lambda: load("sparse"))
assert "got the installed release 0.0.9, which comes before that of this kernel" in message, message
""",
}
LAYOUT = PerLayer({0: SinkWindow(4, 16), 1: SlidingWindow(9)})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The kernel, and the checkpoints of one model without and with layouts."""
    folder = tmp_path_factory.mktemp("hub")
    build_hub_kernel.main([str(folder / "kernel"), f"--repo={REPO}"])
    model, batch = make_model("llama", "sdpa"), make_batch()
    model.save_pretrained(folder / "dense")
    with torch.no_grad():
        whole = model(**batch).logits
        patch_model(model, LAYOUT).save_pretrained(folder / "sparse")
        expected = model(**batch).logits, model.model(**batch).last_hidden_state
    llava().save_pretrained(folder / "llava")
    torch.save((batch, *expected, whole), folder / "expected.pt")
    return folder


def test_transformers_loads_the_package_as_a_kernel(work):
    # Other packages may stand on the path; this one must not.
    hidden = (ROOT, ROOT / "tests", ROOT / "scripts")
    others = [path for path in sys.path if Path(path or ".").resolve() not in hidden]
    layers = json.dumps(LAYOUT.to_dict()["layers"])
    cases = json.dumps({name: code.replace("LAYERS", layers) for name, code in CASES.items()})
    made = subprocess.run(
        [sys.executable, "-c", START, str(ROOT), str(work / "kernel"), str(work), REPO, cases],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, others)),
            "LOCAL_KERNELS": f"{REPO}={work / 'kernel'}",
        },
        cwd=work,
    )
    assert made.returncode == 0 and json.loads(made.stdout.splitlines()[-1]) == [], made.stderr


def test_the_folder_is_what_the_kernels_library_asks_for(work, tmp_path, capsys):
    variants = sorted(path.name for path in (work / "kernel" / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-rocm"]
    identities = set()
    for variant in variants:
        metadata = json.loads((work / "kernel" / "build" / variant / "metadata.json").read_text())
        identities.add(metadata.pop("id"))
        assert metadata == {
            "name": "hf-blocksparse",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": variant.removeprefix("torch-")},
        }
    assert len(identities) == 3 and all(name.isidentifier() for name in identities)
    copied = work / "kernel" / "build" / "torch-cuda" / "hf_blocksparse"
    own = Path(hf_blocksparse.__file__).parent
    files = {path.relative_to(own) for path in own.rglob("*.py")}
    assert {path.relative_to(copied) for path in copied.rglob("*") if path.is_file()} >= files
    assert not list(copied.rglob("__pycache__"))
    assert REPO in (work / "kernel" / "README.md").read_text()
    # Written anew, and nothing else overwritten.
    build_hub_kernel.main([str(work / "kernel"), f"--repo={REPO}"])
    for precious in ("precious", "build/precious"):
        path = tmp_path / precious.replace("/", "-") / precious
        path.parent.mkdir(parents=True)
        path.write_text("")
        folder = tmp_path / precious.replace("/", "-")
        with pytest.raises(ValueError, match=f"which holds {precious}, no part of a kernel"):
            build_hub_kernel.main([str(folder), f"--repo={REPO}"])
        assert path.exists()
    for name in ("hf-blocksparse", "someone/flash-sparse", "someone/a:b", "/a"):
        with pytest.raises(SystemExit):
            build_hub_kernel.main([str(tmp_path / "new"), f"--repo={name}"])
        assert "repo got" in capsys.readouterr().err
