"""Packaging: every fact comes from settings.ini, so that no second list can drift from it."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
facts = config["DEFAULT"]

SUFFIX = "_requirements"  # of the extras
STATUS = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
CLASSIFIERS = [
    f"Development Status :: {STATUS[facts['status']]}",
    "Framework :: Pytest",
    f"Intended Audience :: {facts['audience']}",
    f"Natural Language :: {facts['language']}",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Topic :: Scientific/Engineering",
    "Typing :: Typed",
]

setup(
    name=facts["lib_name"],
    version=facts["version"],
    description=facts["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=facts["author"],
    author_email=facts["author_email"],
    license="Apache-2.0",
    keywords=facts["keywords"],
    classifiers=CLASSIFIERS,
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=["ctxlab", "ctxlab.*"]),
    package_data={"": ["*.pyi"], "ctxlab": ["py.typed", "*.mplstyle", "assets/*"]},
    install_requires=facts["requirements"].split(),
    extras_require={
        key.removesuffix(SUFFIX): facts[key].split() for key in facts if key.endswith(SUFFIX)
    },
    entry_points={
        "console_scripts": facts["console_scripts"].split(),
        "pytest11": facts["pytest_plugins"].split(),
    },
)
