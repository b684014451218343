"""Packaging: maps the folders of the checkout to the one import package `cutset`.

The four parts (`compiler/`, `passes/`, `cost_models/`, `runtime/`) lie at the top level of the
checkout and install as `cutset.compiler`, `cutset.passes` and so on. Nested packages are listed by
hand; `tests/house/test_packaging.py` fails when one is forgotten.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).absolute().parent

# package -> folder, every package
PACKAGE_FOLDERS = {
    "cutset": "cutset",
    "cutset.compiler": "compiler",
    "cutset.compiler.capture": "compiler/capture",
    "cutset.compiler.cli": "compiler/cli",
    "cutset.compiler.codegen": "compiler/codegen",
    "cutset.compiler.export": "compiler/export",
    "cutset.compiler.ir": "compiler/ir",
    "cutset.compiler.ir.text": "compiler/ir/text",
    "cutset.compiler.ir.verify": "compiler/ir/verify",
    "cutset.compiler.sharding": "compiler/sharding",
    "cutset.compiler.sharding.rules": "compiler/sharding/rules",
    "cutset.cost_models": "cost_models",
    "cutset.passes": "passes",
    "cutset.passes.layouts": "passes/layouts",
    "cutset.passes.partition": "passes/partition",
    "cutset.passes.placement": "passes/placement",
    "cutset.runtime": "runtime",
}

REQUIRED = [
    "torch>=2.11",
    "networkx>=3.2",
    "ortools>=9.11",
    "numpy>=1.26",
    "onnx>=1.18",
    "jsonschema>=4.20",
]
ONNX = ["onnxscript>=0.5", "onnxruntime>=1.20"]
EXAMPLES = ["transformers>=5"]
SAFETENSORS = ["safetensors>=0.4.3"]
METIS = ["pymetis>=2023.1"]
DEVELOPMENT = [
    "build>=1.2",
    "hypothesis>=6.100",
    "import-linter>=2.2",
    "mypy>=1.15",
    "pytest>=8",
    "pytest-xdist>=3.7",
    "ruff>=0.12",
]


def version() -> str:
    """The version that `cutset/__init__.py` states."""
    text = (HERE / "cutset" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise SystemExit("cutset/__init__.py states no __version__")
    return match[1]


setup(
    name="cutset",
    version=version(),
    description="Automatic graph partitioning for PyTorch: plan, prove, generate and run",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=sorted(PACKAGE_FOLDERS),
    package_dir=PACKAGE_FOLDERS,
    package_data={"": ["*.json", "*/*.json", "*.toml", "py.typed"]},
    zip_safe=False,
    install_requires=REQUIRED,
    extras_require={
        "onnx": ONNX,
        "report": [],  # pictures are drawn with the standard library
        "safetensors": SAFETENSORS,  # to read such weights
        "metis": METIS,  # balanced cuts as a baseline of `cutset place`
        "examples": EXAMPLES,
        "dev": [*DEVELOPMENT, *ONNX, *SAFETENSORS, *EXAMPLES],
    },
    entry_points={"console_scripts": ["cutset=cutset.compiler.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX",
        "Typing :: Typed",
    ],
)
