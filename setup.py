"""steertune is a namespace package over the top-level folders: `adapters/` imports as `steertune.adapters`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

FOLDERS = ("adapters", "losses", "trainers", "recipes")


def subpackages(folder: str) -> dict[str, str]:
    """Import name -> directory, for one top-level folder and the packages below it."""
    found = {f"steertune.{folder}": folder}
    for name in find_namespace_packages(folder, exclude=["*__pycache__*"]):
        found[f"steertune.{folder}.{name}"] = f"{folder}/{name.replace('.', '/')}"
    return found


package_dir = {name: path for folder in FOLDERS for name, path in subpackages(folder).items()}

DATA = [
    "py.typed",
    "**/*.toml",
    "**/*.yaml",
    "**/*.jsonl",
    "**/*.md",
    "**/*.html",
    "**/*.js",
    "**/*.jinja",
    "zoo/**/*.json",
    "zoo/**/*.safetensors",
]

RECIPES = [
    "gguf>=0.17",
    "matplotlib>=3.9",
    "pydantic>=2.8",
    "rich>=13",
    "typer>=0.29",
    "jinja2>=3.1",
    "scipy>=1.15",
    "pandas>=2.2",
    "tabulate>=0.9",  # pandas writes Markdown tables with it
    "statsmodels>=0.14.4",
    "pyDOE3>=1.6",
    "filelock>=3.15",
    "psutil>=5.9",
    "requests>=2.32",
    "markdown-it-py>=3",
]

EVAL = ["lm-eval>=0.4.12"]
SERVE = ["fastapi>=0.120", "uvicorn>=0.38", "prometheus-client>=0.22"]

setup(
    name="steertune",
    version="0.1.0",
    description="Activation addition as ordinary training: steering vectors by SGD, with every ingredient a switch",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=list(package_dir),
    package_dir=package_dir,
    package_data=dict.fromkeys(package_dir, DATA),
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<5.24",  # the adapter methods of 5.24 ask for PEFT 0.22
        "trl>=1.12",
        "peft>=0.20",
        "accelerate>=1.12",
        "datasets>=4.7",
        "scikit-learn>=1.5",
        "xxhash>=3",
    ],
    entry_points={
        "console_scripts": ["steertune=steertune.recipes.cli:main"],
        "inspect_ai": ["steertune=steertune.recipes.inspect_provider"],
    },
    extras_require={
        "recipes": RECIPES,
        "deepspeed": ["deepspeed>=0.18", "ninja>=1.11"],
        "docs": ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=1.0"],
        "eval": EVAL,
        "serve": SERVE,
        "inspect": [*SERVE, "inspect-ai>=0.3.200"],
        "test": [
            *RECIPES,
            *EVAL,
            *SERVE,
            "openai>=2",
            "tensorboard>=2.18",
            "hotwire-vllm>=0.1",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "shapiq>=1.4",
            "hypothesis>=6.100",
            "bitsandbytes>=0.49",
            "ruff>=0.14",
            "pyright>=1.1.400",
            "build>=1.2",
            "sybil>=9.2",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
