"""Write this package in the form of a hub kernel, for `attn_implementation="<org>/<repo>"`.

    python scripts/build_hub_kernel.py dist/hub-kernel --repo someone/hf-blocksparse
    hf upload someone/hf-blocksparse dist/hub-kernel . --repo-type kernel --revision v1

The folder holds `build/<variant>/` for each backend, as https://huggingface.co/docs/kernels/kernel-requirements asks of kernels
without compiled parts: `metadata.json`, `__init__.py`, and the package. With the `kernels` package and the environment variable
`LOCAL_KERNELS=someone/hf-blocksparse=dist/hub-kernel` it is loaded from there, without an upload.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import hf_blocksparse

PACKAGE = Path(hf_blocksparse.__file__).parent
BACKENDS = ("cpu", "cuda", "rocm")
# A kernel's version counts incompatible changes of what it offers; transformers asks for 1.
KERNEL_VERSION = 1

MODULE = '''"""Block-sparse attention for transformers models, as a hub kernel. See hf_blocksparse/hub_kernel.py."""

import importlib.util
import sys
from pathlib import Path

VERSION = "{version}"


def _import_package():
    """hf_blocksparse: the installed one, or else the one in this folder.

    A process has one, since its operators and what it adds to transformers have one name each.
    """
    if "hf_blocksparse" not in sys.modules and importlib.util.find_spec("hf_blocksparse") is None:
        folder = Path(__file__).parent / "hf_blocksparse"
        spec = importlib.util.spec_from_file_location(
            "hf_blocksparse", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules["hf_blocksparse"] = package
        try:
            spec.loader.exec_module(package)
        except BaseException:
            del sys.modules["hf_blocksparse"]
            raise
    import hf_blocksparse

    numbers = [
        tuple(map(int, version.split(".")[:3])) for version in (hf_blocksparse.__version__, VERSION)
    ]
    if numbers[0] < numbers[1]:
        raise ImportError(
            f"hf_blocksparse got the installed release {{hf_blocksparse.__version__}}, which comes before that of this kernel, "
            f"{{VERSION}}; a process has one of them; upgrade: pip install 'hf-blocksparse>={{VERSION}}'."
        )
    return hf_blocksparse


hf_blocksparse = _import_package()

from hf_blocksparse import block_sparse_attention, patch_model  # noqa: E402
from hf_blocksparse.hub_kernel import flash_attn_forward, supports_flash_attn  # noqa: E402

__all__ = [
    "block_sparse_attention",
    "flash_attn_forward",
    "hf_blocksparse",
    "patch_model",
    "supports_flash_attn",
]
'''

CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
- attention
- block-sparse
---

# hf-blocksparse {version} as a hub kernel

Block-sparse attention for pretrained models, in Triton. A model whose `config.json` has layouts (`patch_model` and
`save_pretrained` of hf-blocksparse write them) runs with them:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("a/sparse-model", attn_implementation="{repo}", allow_all_kernels=True)
```

A model without layouts is given them in its configuration:

```python
config = AutoConfig.from_pretrained("a/dense-model")
config.block_sparse = {{"kind": "sink_window", "sink": 64, "window": 4096}}
model = AutoModelForCausalLM.from_pretrained("a/dense-model", config=config, attn_implementation="{repo}", allow_all_kernels=True)
```
"""


def build(folder: Path, repo: str) -> None:
    """Write the kernel to `folder`, which may hold an earlier one."""
    # What is there is deleted, so it must be an earlier kernel of this script and nothing else.
    found = {str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("build/*"))}
    if stray := sorted(
        found - {"README.md", "build", *(f"build/torch-{name}" for name in BACKENDS)}
    ):
        raise ValueError(
            f"folder got {folder}, which holds {stray[0]}, no part of a kernel; it is written anew; give an "
            "empty or a new one."
        )
    shutil.rmtree(folder, ignore_errors=True)
    version = hf_blocksparse.__version__
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(
            PACKAGE, variant / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__")
        )
        (variant / "__init__.py").write_text(MODULE.format(version=version), encoding="utf-8")
        metadata = {
            "id": f"_{PACKAGE.name}_{backend}_{_digest(variant)}",
            "name": PACKAGE.name.replace("_", "-"),
            "version": KERNEL_VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        text = json.dumps(metadata, indent=2) + "\n"
        (variant / "metadata.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(CARD.format(version=version, repo=repo), encoding="utf-8")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo", required=True, help="the name on the hub, <org>/<repo>")
    arguments = parser.parse_args(argv)
    organisation, slash, name = arguments.repo.partition("/")
    if not (organisation and slash and name) or "flash" in arguments.repo or set(":@/") & set(name):
        parser.error(
            f"repo got {arguments.repo!r}; it must be <org>/<repo> without ':', '@' and the word flash, which sends "
            "transformers to other kernels; for example someone/hf-blocksparse."
        )
    build(arguments.folder, arguments.repo)
    print(arguments.folder)


if __name__ == "__main__":
    main()
